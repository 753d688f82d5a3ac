"""Soft prompts in chats: where each family's template puts them, to the token, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from lopa_lightning.backbones.chat import PLACEHOLDER, ChatFormat, listed_prompts, question, reads_parts
from lopa_lightning.errors import LoPAError
from tests.backbones.chat_templates import TEMPLATES, tokenizer_of
from tests.tiny import causal_tokenizer

ASKED = [{"role": "user", "content": "It was good"}]
READS_PARTS = {"gemma3", "qwen3_vl"}
IN_CHAT = [
    (name, placement, getattr(template, placement))
    for name, template in TEMPLATES.items()
    for placement in ("system", "user")
    if getattr(template, placement) is not None
]


def chat_format(name: str, placement: str) -> ChatFormat:
    return ChatFormat(tokenizer_of(TEMPLATES[name]), placement)


@pytest.mark.parametrize(("name", "placement", "around"), IN_CHAT)
def test_a_soft_prompt_stands_where_a_familys_template_puts_it(
    name: str, placement: str, around: tuple[str, str]
) -> None:
    chat = chat_format(name, placement)
    chat.check()
    before, after = (chat.tokenizer(text, add_special_tokens=False)["input_ids"] for text in around)
    assert chat.prompt(ASKED) == f"{around[0]}{PLACEHOLDER}{around[1]}"
    assert chat.ids([chat.prompt(ASKED)]) == ([[*before, *after]], [len(before)])
    assert PLACEHOLDER not in chat.tokenizer.get_vocab()


@pytest.mark.parametrize(("name", "placement"), [each[:2] for each in IN_CHAT])
def test_a_server_reads_what_is_sent_as_training_does(name: str, placement: str) -> None:
    chat, part = chat_format(name, placement), {"type": "prompt_embeds", "data": "..."}
    server = tokenizer_of(TEMPLATES[name])
    server.add_tokens([PLACEHOLDER], special_tokens=True)
    for messages in (ASKED, [*ASKED, {"role": "assistant", "content": "Yes"}, {"role": "user", "content": "No"}]):
        (ids,), (at,) = chat.ids([chat.prompt(messages)])
        read = []
        for message in chat.sent(messages, part):
            content = message["content"]
            if not isinstance(content, str):
                texts = [each.get("text", PLACEHOLDER) for each in content]
                as_parts = [{"type": "text", "text": text} for text in texts]
                content = as_parts if name in READS_PARTS else "\n".join(texts)
            read.append({**message, "content": content})
        tokens = server.apply_chat_template(read, add_generation_prompt=True, return_dict=False)
        assert tokens == [*ids[:at], server.convert_tokens_to_ids(PLACEHOLDER), *ids[at:]]


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_answer_is_what_the_template_adds(name: str) -> None:
    for placement in ("before", "user"):
        chat = chat_format(name, placement)
        prompt, answer = chat.answered([*ASKED, {"role": "assistant", "content": "Yes"}])
        assert prompt == chat.prompt(ASKED)
        assert answer.strip().startswith("Yes")
        assert chat.of_pair("It was good", "Yes") == (prompt, answer)
        assert chat.of_pair("It was good", None) == (prompt, None)
        assert (PLACEHOLDER in prompt) == (placement == "user")
        assert chat.answer_start("Yes") == (" Yes" if name == "mistral" else "Yes")
    with pytest.raises(LoPAError, match="template changes the label word '  Yes'"):
        chat_format("gemma2", "user").answer_start("  Yes")


def test_a_chat_without_a_soft_prompt_in_it_is_the_templates_own() -> None:
    for name, template in TEMPLATES.items():
        chat = chat_format(name, "before")
        whole = chat.tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, return_dict=False)
        assert chat.ids([chat.prompt(ASKED)]) == ([whole], [0]), name
        assert chat.template == template.text


def test_several_turns_and_a_system_message_of_ones_own() -> None:
    turns = [*ASKED, {"role": "assistant", "content": "Yes"}, {"role": "user", "content": "No"}]
    own = [{"role": "system", "content": "Maybe"}, *turns]
    begin, end = "<|im_start|>", "<|im_end|>\n"
    asked = f"{begin}user\nIt was good{end}{begin}assistant\nYes{end}{begin}user\n"
    last = f"No{end}{begin}assistant\n"
    # A string-format template gets parts joined by newlines, one that goes through parts gets them as they are.
    for name, join in (("qwen2.5", "\n"), ("qwen3_vl", "")):
        system, user = (chat_format(name, placement) for placement in ("system", "user"))
        assert system.prompt(turns) == f"{begin}system\n{PLACEHOLDER}{end}{asked}{last}"
        assert system.prompt(own) == f"{begin}system\nMaybe{join}{PLACEHOLDER}{end}{asked}{last}"
        assert user.prompt(own) == f"{begin}system\nMaybe{end}{asked}{PLACEHOLDER}{join}{last}"
    part = {"type": "prompt_embeds", "data": "..."}
    assert system.sent(turns, part) == [{"role": "system", "content": [part]}, *turns]
    assert system.sent(own, part)[0] == {"role": "system", "content": [{"type": "text", "text": "Maybe"}, part]}
    asking = {"role": "user", "content": [part, {"type": "text", "text": "No"}]}
    assert user.sent(own, part) == [*own[:-1], asking]
    assert [message["content"] for message in turns] == ["It was good", "Yes", "No"]


def test_a_template_without_a_place_for_the_soft_prompt_is_refused() -> None:
    with pytest.raises(LoPAError, match=r"with placement 'system'; use placement user or before: .*System role not"):
        chat_format("gemma2", "system").check()
    dropping = ChatFormat(causal_tokenizer(), "system")
    dropping.tokenizer.chat_template = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    with pytest.raises(LoPAError, match="leaves out the soft prompt with placement 'system'; use placement user or"):
        dropping.check()
    twice = ChatFormat(causal_tokenizer(), "user")
    twice.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}"
    with pytest.raises(LoPAError, match="puts 2 times the soft prompt with placement 'user'"):
        twice.check()
    with pytest.raises(LoPAError, match="placement 'user' needs a backbone whose tokenizer has a chat template"):
        ChatFormat(causal_tokenizer(), "user").check()
    ChatFormat(causal_tokenizer(), "before").check()
    with pytest.raises(LoPAError, match="the backbone's tokenizer has no chat template"):
        ChatFormat(causal_tokenizer()).prompt(ASKED)


@pytest.mark.parametrize(
    ("messages", "fault"),
    [
        ([{"role": "user", "content": f"a{PLACEHOLDER}"}], "a text must not contain <prompt_embeds>"),
        ([{"role": "user", "content": "a", "reasoning_content": "b"}], "content .* no more; got .*reasoning"),
        ([{"role": "assistant", "content": None, "tool_calls": [{}]}], "content .* no more; got .*tool_calls"),
        ([{"role": "developer", "content": "a"}], r"role \(system, user, assistant\), .* got .*developer"),
        ([{"role": "system", "content": "a"}], "must have a message of the user"),
    ],
)
def test_a_chat_that_a_server_would_read_otherwise_is_refused(messages: Any, fault: str) -> None:
    with pytest.raises(LoPAError, match=fault):
        chat_format("smollm2", "user").prompt(messages)


def test_prompts_are_one_or_several_texts_or_chats() -> None:
    assert listed_prompts("Yes") == ["Yes"]
    assert listed_prompts(ASKED) == [ASKED]
    assert listed_prompts(["Yes", ASKED]) == ["Yes", ASKED]
    assert [question(each) for each in ("Yes", ASKED)] == ["Yes", "It was good"]
    for wrong, fault in (
        (7, "texts must be a text, a chat .* or a list of either; got 7"),
        (b"Yes", "texts must be a text"),
        (["Yes", ""], "a text to complete must not be empty; text 1 is"),
        ([None], "prompt 0 is None"),
        ([[{"role": "user"}]], "prompt 0 is .*user"),
        ([[*ASKED, {"role": "assistant", "content": "Yes"}]], "whose last message asks; prompt 0 is"),
    ):
        with pytest.raises(LoPAError, match=fault):
            listed_prompts(wrong)


def test_which_templates_go_through_parts() -> None:
    assert {name for name, template in TEMPLATES.items() if reads_parts(tokenizer_of(template))} == READS_PARTS

    def reads(template: str) -> bool:
        tokenizer = causal_tokenizer()
        tokenizer.chat_template = template
        return reads_parts(tokenizer)

    loop = "{% for part in content %}{{ part.text }}{% endfor %}"
    assert reads(f"{{% for m in messages %}}{{% set content = m.content %}}{loop}{{% endfor %}}")
    assert reads(f"{{% for m in messages %}}{loop.replace('content', 'm.content | list')}{{% endfor %}}")
    macro = f"{{% macro shown(content) %}}{loop}{{% endmacro %}}"
    assert reads(macro + "{% for m in messages %}{{ shown(m.content) }}{% endfor %}")
    assert reads(macro + "{% for m in messages %}{{ shown(content=m['content']) }}{% endfor %}")
    assert not reads(macro + "{% for m in messages %}{{ shown(m.extra) }}{% endfor %}")  # a list by that name
    assert not reads("{% for part in messages[0].content %}{{ part }}{% endfor %}")
    assert not reads("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert not reads("{% for m in messages %}{{ m.content | tojson }}{% endfor %}")
    assert not reads("{% for m in messages %}{{ '- ' + m.content }}{% endfor %}")
    assert not reads("{% for m in messages %}{% if m.content is string %}{{ m.content }}{% endif %}{% endfor %}")

"""Chats as a model reads them: rendered by the tokenizer's own template, with a soft prompt where one is to stand.

A server such as vLLM takes a soft prompt as a part of a message, templates and tokenises the rest by itself, and puts
the soft prompt where the template has left that part. The same is done here, to the token.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from lightning.pytorch.utilities import rank_zero_warn
from transformers import PreTrainedTokenizerBase

from lopa_lightning.backbones.injection import CHAT_PLACEMENTS
from lopa_lightning.backbones.tokens import running_ids
from lopa_lightning.errors import LoPAError, is_unicode, listed, one_line, shown

PLACEHOLDER = "<prompt_embeds>"
"""Stands for the soft prompt in a rendered chat. vLLM's own, which it takes in no text."""

Chat = Sequence[Mapping[str, Any]]
"""Messages, each with ``role`` and ``content``."""

# What a server hands to a template as it is; it has its own ways with calls of tools, and the role of a developer.
_KEYS, _ROLES = {"role", "content", "name"}, ("system", "user", "assistant")


@dataclass(frozen=True)
class ChatFormat:
    """Renders chats by a tokenizer's template, and tokenises what was rendered.

    With a placement in a chat, the soft prompt is the content of the ``system`` message, after the text of one that
    is there, or stands before the text of the last message of the ``user``.

    Args:
        tokenizer: The backbone's.
        placement: Where virtual tokens go. Only one in a chat puts a placeholder into what is rendered.
    """

    tokenizer: PreTrainedTokenizerBase
    placement: str = "before"

    @property
    def holds_prompt(self) -> bool:
        """Whether the soft prompt stands in the chat."""
        return self.placement in CHAT_PLACEMENTS

    @functools.cached_property
    def template(self) -> str:
        """The tokenizer's template.

        Raises:
            LoPAError: If it has none.
        """
        try:
            return str(self.tokenizer.get_chat_template())
        except ValueError as error:
            raise LoPAError("the backbone's tokenizer has no chat template, which chats are rendered by") from error

    @functools.cached_property
    def template_hash(self) -> str:
        """A hash of the template, by which a checkpoint knows it."""
        return hashlib.sha256(self.template.encode()).hexdigest()[:16]

    def check(self) -> None:
        """Renders a chat of one question.

        Raises:
            LoPAError: If there is no template, or it has no place for the soft prompt.
        """
        if self.holds_prompt:
            if self.tokenizer.chat_template is None:
                raise LoPAError(
                    f"placement {self.placement!r} needs a backbone whose tokenizer has a chat template, and this has "
                    "none; use an instruction-tuned backbone, or placement before"
                )
            self.ids([self.prompt([{"role": "user", "content": "x"}])])

    def prompt(self, asked: Chat) -> str:
        """Renders a chat up to where its answer begins.

        Args:
            asked: Its messages, without the answer.

        Raises:
            LoPAError: If the template does not take it, or does not put the soft prompt into it exactly once.
        """
        return self._rendered(asked, asks=True)

    def answered(self, chat: Chat) -> tuple[str, str]:
        """Renders a chat that ends with an answer: what comes before the answer, and the answer with its end.

        Raises:
            LoPAError: As :meth:`prompt`, or if the template renders what comes before otherwise once it is answered.
        """
        prompt, whole = self.prompt(chat[:-1]), self._rendered(chat)
        if not whole.startswith(prompt):
            raise LoPAError("the tokenizer's chat template formats a question otherwise once it is answered")
        return prompt, whole[len(prompt) :]

    def of_pair(self, prompt: str, completion: str | None) -> tuple[str, str | None]:
        """Renders a prompt as a message of the user and its completion, if there is one, as the answer."""
        asked = [{"role": "user", "content": prompt}]
        if completion is None:
            return self.prompt(asked), None
        return self.answered([*asked, {"role": "assistant", "content": completion}])

    def answer_start(self, word: str) -> str:
        """Returns what an answer begins with whose first word is given: some templates put a space before it.

        Raises:
            LoPAError: If the template changes the word, as by taking space from around it.
        """
        before, found, _ = str(self.of_pair("x", word)[1]).partition(word)
        if not found:
            raise LoPAError(f"the backbone's chat template changes the label word {word!r}; choose another word")
        return before + found

    def sent(self, messages: Chat, part: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Returns a chat as a client sends it to a server: with the soft prompt as a part of a message.

        Args:
            messages: The chat.
            part: Of the soft prompt, ``{"type": "prompt_embeds", "data": ...}``.

        Raises:
            LoPAError: If a server would read something else than what is in the messages.
        """
        for message in messages:
            given = {key for key, value in message.items() if value is not None}
            if given - _KEYS or message["role"] not in _ROLES or not isinstance(message.get("content"), str):
                raise LoPAError(
                    f"with placement {self.placement!r} a message must have role ({', '.join(_ROLES)}), "
                    f"content (a text) and perhaps name, and no more; got {shown(dict(message))}"
                )
            refuse_placeholder(message["content"])
        sent = [{key: message[key] for key in message if message[key] is not None} for message in messages]
        if self.placement == "user":
            asking = [message for message in sent if message["role"] == "user"]
            if not asking:
                raise LoPAError(f"with placement 'user' a chat must have a message of the user, got {shown(messages)}")
            asking[-1]["content"] = [dict(part), _text(asking[-1]["content"])]
        elif sent and sent[0]["role"] == "system":
            sent[0]["content"] = [_text(sent[0]["content"]), dict(part)]
        else:
            sent = [{"role": "system", "content": [dict(part)]}, *sent]
        return sent

    def check_fits(self, tokens: int, room: int) -> None:
        """Raises a LoPAError if a chat around a soft prompt, which is not cut, is too long."""
        if self.holds_prompt and tokens > room:
            raise LoPAError(
                f"a chat has {tokens} tokens, room for {room}, and with placement {self.placement!r} it is not cut"
            )

    def ids(self, rendered: Sequence[str]) -> tuple[list[list[int]], list[int]]:
        """Tokenises rendered chats.

        Returns:
            The tokens of each, and how many of them stand before the soft prompt: 0 where it is not in the chat.
        """
        if not self.holds_prompt:
            return running_ids(self.tokenizer, rendered, with_special=True), [0] * len(rendered)
        mark = cast(int, self._marked.convert_tokens_to_ids(PLACEHOLDER))
        found = running_ids(self._marked, rendered, with_special=True)
        positions = [ids.index(mark) for ids in found]
        return [ids[:at] + ids[at + 1 :] for ids, at in zip(found, positions)], positions

    @functools.cached_property
    def _marked(self) -> PreTrainedTokenizerBase:
        """A copy that knows the placeholder as a special token, as a server's does: what is around is split there."""
        copied = copy.deepcopy(self.tokenizer)
        copied.add_tokens([PLACEHOLDER], special_tokens=True)
        return copied

    @functools.cached_property
    def _reads_parts(self) -> bool:
        return reads_parts(self.tokenizer)

    def _rendered(self, messages: Chat, asks: bool = False) -> str:
        shaped = self._as_served(messages) if self.holds_prompt else list(messages)
        render: Any = self.tokenizer.apply_chat_template
        template = self.template
        try:
            text = str(render(shaped, chat_template=template, tokenize=False, add_generation_prompt=asks))
        except Exception as error:  # a template raises what it likes, as where roles do not alternate
            what = f"the backbone's chat template does not take {shown(list(messages))}"
            raise LoPAError(f"{what}{self._advice()}: {one_line(error)}") from error
        if self.holds_prompt and (count := text.count(PLACEHOLDER)) != 1:
            does = "leaves out" if count == 0 else f"puts {count} times"
            raise LoPAError(f"the backbone's chat template {does} the soft prompt{self._advice()}")
        return text

    def _advice(self) -> str:
        other = {"system": "user", "user": "system"}.get(self.placement)
        return "" if other is None else f" with placement {self.placement!r}; use placement {other} or before"

    def _as_served(self, messages: Chat) -> list[dict[str, Any]]:
        """Returns the messages as a server hands them to the template, with the placeholder."""
        served = self.sent(messages, _text(PLACEHOLDER))
        for message in served:
            parts = [_text(message["content"])] if isinstance(message["content"], str) else message["content"]
            joined = "\n".join(part["text"] for part in parts if part["text"])
            message["content"] = parts if self._reads_parts else joined
        return served


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def refuse_placeholder(text: str) -> None:
    """Raises a LoPAError if a text contains the placeholder of soft prompts."""
    if PLACEHOLDER in text:
        raise LoPAError(f"a text must not contain {PLACEHOLDER}, which stands for the soft prompt; got {shown(text)}")


def listed_prompts(texts: Any) -> list[str | Chat]:
    """Returns prompts as a list: one text or one chat as a list of one.

    Args:
        texts: A text, a chat (a list of messages), or a list of either.

    Raises:
        LoPAError: If there is something else among them, or an empty text, or one that is not Unicode, or a chat
            without a question.

    Example:
        >>> listed_prompts("Hello"), listed_prompts([{"role": "user", "content": "Hello"}])
        (['Hello'], [[{'role': 'user', 'content': 'Hello'}]])
    """
    if isinstance(texts, str) or (isinstance(texts, Sequence) and texts and isinstance(texts[0], Mapping)):
        texts = [texts]
    if not isinstance(texts, Sequence) or isinstance(texts, bytes):
        raise LoPAError(f"texts must be a text, a chat (a list of messages), or a list of either; got {shown(texts)}")
    for place, prompt in enumerate(texts):
        if isinstance(prompt, str):
            if not prompt:
                raise LoPAError(f"a text to complete must not be empty; text {place} is")
        elif not is_chat(prompt) or prompt[-1]["role"] == "assistant":
            raise LoPAError(
                "a prompt must be a text, or a chat: a list of {role, content} whose last message asks; "
                f"prompt {place} is {shown(prompt)}"
            )
        messages = [{"content": prompt}] if isinstance(prompt, str) else prompt
        _check_unicode("text", place, [each.get("content") or "" for each in messages])
    return list(texts)


def _check_unicode(name: str, place: int, texts: Sequence[str]) -> None:
    if wrong := [text for text in texts if not is_unicode(text)]:
        raise LoPAError(f"a text must be Unicode, without half a character; {name} {place} is {shown(wrong[0])}")


def with_instances(
    texts: Any, instance_texts: str | Sequence[str] | None, column: str | None = None
) -> tuple[list[str | Chat], list[str]]:
    """Returns prompts as a list, and what the instance encoder reads of each.

    Args:
        texts: See :func:`listed_prompts`.
        instance_texts: One for each prompt; None for the texts, of a chat its last message.
        column: Where the instance encoder read texts of its own in training, their column.

    Raises:
        LoPAError: See :func:`listed_prompts`; or if there is not one for each.
    """
    prompts = listed_prompts(texts)
    if instance_texts is None and column is not None:
        rank_zero_warn(
            f"in training the instance encoder read texts of their own, the column {column!r}, and reads the prompts "
            "now: give these texts as instance_texts, or instance_text in a request"
        )
    given = [instance_texts] if isinstance(instance_texts, str) else instance_texts
    instances = [question(each) for each in prompts] if given is None else listed("instance_texts", given)
    if len(instances) != len(prompts):
        raise LoPAError(f"there must be one instance text for each text, got {len(instances)} for {len(prompts)}")
    for place, text in enumerate(instances):
        if not text:
            raise LoPAError(f"an instance text must not be empty; instance text {place} is")
        _check_unicode("instance text", place, [text])
    return prompts, instances


def question(prompt: str | Chat) -> str:
    """Returns what an instance encoder reads of a prompt: the text, or a chat's last message."""
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def is_chat(messages: Any) -> bool:
    """Returns whether something is a list of messages."""
    return isinstance(messages, Sequence) and bool(messages) and all(map(_is_message, messages))


def _is_message(message: Any) -> bool:
    """Returns whether something is a message of a chat; one that calls tools need not have a text."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        return False
    return isinstance(message.get("content"), str) or bool(message["role"] == "assistant" and message.get("tool_calls"))


def reads_parts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Returns whether a tokenizer's chat template goes through a message's content part by part.

    vLLM decides so whether it hands over a content as a list of parts (its content format ``openai``) or joined by
    newlines (``string``). It reads the template's syntax for a loop over the content; here a part is rendered, of which
    such a loop shows the text alone.

    Args:
        tokenizer: With the template.
    """
    message: dict[str, Any] = {"role": "user", "content": [_text(PLACEHOLDER)]}
    try:
        text = str(tokenizer.apply_chat_template([message], tokenize=False))
    except Exception:  # a template raises what it likes, as where it adds a list to a text
        return False
    return PLACEHOLDER in text and re.search("""["']type["']""", text) is None  # the part itself, as Python or JSON

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from lopa_lightning.data.template import Side, Template, Tokenize, backbone_template, plain_template
from lopa_lightning.errors import LoPAError
from tests.data.conftest import SpecOf, TokenizerOf

REVIEW = Template(("Review : {text} . It was {mask} .",))
PAIR = Template(("{first}", "{second} {mask}"))

SIDES = st.sampled_from(["left", "right"])
TEXTS = st.one_of(
    st.text(max_size=40),
    st.text("a great film . 😀👩\u200d🎤é\u0301İß中\u3000\u00a0\n\t", max_size=40),
    st.lists(st.sampled_from(["great", "terrible", "film", "😀", " ", "\n"]), max_size=30).map("".join),
)


class Patient:
    """A tokenizer that gives up on who asks without end."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, calls: int) -> None:
        self._tokenizer, self._calls = tokenizer, calls

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._calls -= 1
        assert self._calls >= 0, "truncation makes no progress"
        return self._tokenizer(*args, **kwargs)


def encode(
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    texts: dict[str, str],
    limit: int | None = None,
    side: Side = "right",
) -> dict[str, Any]:
    # Each cut takes a character at least and asks once for the whole and once for each text.
    enough = (1 + len(texts)) * (1 + len(texts) + sum(map(len, texts.values()))) + 2
    tokenize = Tokenize(Patient(tokenizer, enough), template, limit, side)  # type: ignore[arg-type]
    return {key: values[0] for key, values in tokenize({name: [text] for name, text in texts.items()}).items()}


# Rendering


def test_masked_lm_reads_the_whole_template_with_the_mask_token(tokenizer: TokenizerOf, text_spec: SpecOf) -> None:
    template = backbone_template(REVIEW, None, text_spec("bert", "masked_lm"))
    ids = encode(tokenizer("bert"), template, {"text": "a great film"})["input_ids"]
    assert ids == tokenizer("bert")("Review : a great film . It was [MASK] .")["input_ids"]


def test_causal_lm_reads_what_stands_before_the_mask_without_the_space(
    tokenizer: TokenizerOf, text_spec: SpecOf
) -> None:
    template = backbone_template(REVIEW, None, text_spec("gpt2", "causal_lm"))
    ids = encode(tokenizer("gpt2"), template, {"text": "a great film"})["input_ids"]
    assert ids == tokenizer("gpt2")("Review : a great film . It was")["input_ids"]


def test_causal_lm_reads_a_pair_as_lines(tokenizer: TokenizerOf, text_spec: SpecOf) -> None:
    template = backbone_template(PAIR, None, text_spec("gpt2", "causal_lm"))
    ids = encode(tokenizer("gpt2"), template, {"first": "a film", "second": "a story"})["input_ids"]
    assert ids == tokenizer("gpt2")("a film\na story")["input_ids"]


def test_causal_wording_is_for_causal_lms_alone(text_spec: SpecOf) -> None:
    causal = Template(("Is {text} good? {mask}",))
    assert backbone_template(REVIEW, causal, text_spec("gpt2", "causal_lm")).pieces == ("Is {text} good?",)
    assert backbone_template(REVIEW, causal, text_spec("bert", "masked_lm")) == REVIEW


def test_head_reads_the_columns_alone(tokenizer: TokenizerOf, text_spec: SpecOf) -> None:
    template = backbone_template(REVIEW, None, text_spec("bert", "head"))
    ids = encode(tokenizer("bert"), template, {"text": "a great film"})["input_ids"]
    assert ids == tokenizer("bert")("a great film")["input_ids"]


@pytest.mark.parametrize(
    ("columns", "pieces"),
    [
        (["a"], ("{a}",)),
        (["a", "b"], ("{a}", "{b}")),
        (["a", "b", "c"], ("{a}\n{b}", "{c}")),
    ],
)
def test_plain_columns_are_a_text_or_a_pair(columns: list[str], pieces: tuple[str, ...]) -> None:
    assert plain_template(columns).pieces == pieces


def test_columns_are_named_once_in_order_of_appearance() -> None:
    assert Template(("{b} and {a}", "{b} {mask}")).columns == ["b", "a"]


def test_doubled_braces_are_text(text_spec: SpecOf) -> None:
    template = Template(("{{mask}} {text} is {mask}",))
    assert template.render({"text": "it"}, "[MASK]") == ["{mask} it is [MASK]"]
    cut = backbone_template(template, None, text_spec("gpt2", "causal_lm"))
    assert cut.render({"text": "it"}) == ["{mask} it is"]


def test_fields_are_not_read_from_a_text() -> None:
    assert REVIEW.render({"text": "{mask} {text} {0}"}, "[MASK]") == ["Review : {mask} {text} {0} . It was [MASK] ."]


# Pairs


def test_bert_pairs_have_its_separator_and_token_types(tokenizer: TokenizerOf) -> None:
    bert = tokenizer("bert")
    encoded = encode(bert, PAIR, {"first": "a great film", "second": "it was"})
    assert bert.convert_ids_to_tokens(encoded["input_ids"]) == [
        *("[CLS]", "a", "great", "film", "[SEP]"),
        *("it", "was", "[MASK]", "[SEP]"),
    ]
    assert encoded["token_type_ids"] == [0] * 5 + [1] * 4


def test_roberta_pairs_have_two_separators_and_no_token_types(tokenizer: TokenizerOf) -> None:
    roberta = tokenizer("roberta")
    encoded = encode(roberta, PAIR, {"first": "the film", "second": "the story"})
    tokens = roberta.convert_ids_to_tokens(encoded["input_ids"])
    assert [token for token in tokens if token.startswith("<") or token.startswith("</")] == [
        *("<s>", "</s>", "</s>"),
        *("<mask>", "</s>"),
    ]
    middle = tokens.index("</s>")
    assert roberta.convert_tokens_to_string(tokens[1:middle]) == "the film"
    assert roberta.convert_tokens_to_string(tokens[middle + 2 : -2]).strip() == "the story"
    assert set(encoded) == {"input_ids", "truncated"}


def test_pairs_are_lines_where_there_is_no_separator(tokenizer: TokenizerOf) -> None:
    encoded = encode(tokenizer("gpt2"), plain_template(["a", "b"]), {"a": "the film", "b": "the story"})
    assert encoded == {"input_ids": tokenizer("gpt2")("the film\nthe story")["input_ids"], "truncated": False}


# Truncation


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2"])
@given(text=TEXTS, room=st.integers(1, 25), side=SIDES)
def test_a_long_text_loses_one_end_and_the_template_nothing(
    tokenizer: TokenizerOf, text_spec: SpecOf, kind: str, text: str, room: int, side: Side
) -> None:
    read = tokenizer(kind)
    objective = "causal_lm" if kind == "gpt2" else "masked_lm"
    mask = read.mask_token or ""
    ending = " . It was" if kind == "gpt2" else f" . It was {mask} ."
    assume(not any(special in text for special in read.all_special_tokens))

    def whole(text: str) -> list[int]:
        ids: list[int] = read(f"Review : {text}{ending}")["input_ids"]
        return ids

    limit = len(whole("")) + room
    template = backbone_template(REVIEW, None, text_spec(kind, objective))
    encoded = encode(read, template, {"text": text}, limit, side)
    ids = encoded["input_ids"]

    assert len(ids) <= limit
    assert ids.count(read.mask_token_id) == (kind != "gpt2")
    assert encoded["truncated"] == (len(whole(text)) > limit)
    if not encoded["truncated"]:
        assert ids == whole(text)
    else:
        lengths = range(len(text))
        assert ids in [whole(text[:n] if side == "right" else text[len(text) - n :]) for n in lengths]
    start = read("Review :", add_special_tokens=False)["input_ids"]
    first = 0 if kind == "gpt2" else 1
    assert ids[first : first + len(start)] == start
    end = read(ending, add_special_tokens=False)["input_ids"] + ([] if kind == "gpt2" else [read.sep_token_id])
    assert ids[-len(end) :] == end


@given(first=TEXTS, second=TEXTS, room=st.integers(1, 25), side=SIDES)
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_long_pair_stays_a_pair(
    tokenizer: TokenizerOf, kind: str, first: str, second: str, room: int, side: Side
) -> None:
    read = tokenizer(kind)
    assume(not any(special in first + second for special in read.all_special_tokens))
    bare = read("", f" {read.mask_token}")["input_ids"]
    encoded = encode(read, PAIR, {"first": first, "second": second}, len(bare) + room, side)
    ids, whole = encoded["input_ids"], read(first, f"{second} {read.mask_token}")
    assert len(ids) <= len(bare) + room
    special = {i for i in read.all_special_ids if i != read.unk_token_id}
    assert [i for i in ids if i in special] == [i for i in bare if i in special]
    assert encoded["truncated"] == (len(whole["input_ids"]) > len(bare) + room)
    if not encoded["truncated"]:
        assert ids == whole["input_ids"]
    if kind == "bert":
        border = ids.index(read.sep_token_id) + 1
        assert encoded["token_type_ids"] == [0] * border + [1] * (len(ids) - border)


WORDS = st.lists(st.sampled_from(["great", "film", "the", "was"]), max_size=30)


@given(words=WORDS, room=st.integers(1, 20), side=SIDES)
def test_of_one_token_words_as_many_stay_as_fit(
    tokenizer: TokenizerOf, words: list[str], room: int, side: Side
) -> None:
    bert = tokenizer("bert")
    kept = words[:room] if side == "right" else words[-room:]
    ids = encode(bert, Template(("{text} {mask}",)), {"text": " ".join(words)}, 3 + room, side)["input_ids"]
    assert bert.convert_ids_to_tokens(ids) == ["[CLS]", *kept, "[MASK]", "[SEP]"]


@pytest.mark.parametrize(
    ("first", "second", "room", "kept_first", "kept_second"),
    [
        (9, 3, 8, 5, 3),
        (3, 9, 8, 3, 5),
        (9, 8, 10, 5, 5),
        (5, 4, 3, 1, 2),
        (60, 59, 36, 18, 18),
        (59, 60, 7, 4, 3),
        (20, 20, 1, 0, 1),
    ],
)
def test_the_longest_field_is_cut_first_and_none_below_another(
    tokenizer: TokenizerOf, first: int, second: int, room: int, kept_first: int, kept_second: int
) -> None:
    bert = tokenizer("bert")
    texts = {"first": " ".join(["great"] * first), "second": " ".join(["film"] * second)}
    tokens = bert.convert_ids_to_tokens(encode(bert, PAIR, texts, 4 + room)["input_ids"])
    assert tokens == ["[CLS]", *["great"] * kept_first, "[SEP]", *["film"] * kept_second, "[MASK]", "[SEP]"]


@given(first=st.sampled_from(["", " ", "a", "\u0301"]), second=st.sampled_from(["", " ", "  \n", "\u0301 "]))
def test_a_text_without_tokens_of_its_own_can_be_cut(tokenizer: TokenizerOf, first: str, second: str) -> None:
    # An unknown word is one token; a space within it makes known words of its end.
    bert = tokenizer("bert")
    template = Template(("{first} 😀great{second}betterbetter",))
    assert len(bert("😀greatbetterbetter")["input_ids"]) == 3
    assert len(bert("😀great betterbetter")["input_ids"]) > 4
    ids = encode(bert, template, {"first": first, "second": second}, 4)["input_ids"]
    assert len(ids) <= 4


@pytest.mark.parametrize("kind", ["roberta", "gpt2"])
def test_a_character_of_several_tokens_goes_as_a_whole(tokenizer: TokenizerOf, kind: str) -> None:
    read = tokenizer(kind)
    for text, side in (("great 😀", "right"), ("😀 great", "left")):
        one_too_long = len(read(text)["input_ids"]) - 1
        ids = encode(read, plain_template(["text"]), {"text": text}, one_too_long, side)["input_ids"]
        assert read.decode(ids, skip_special_tokens=True).strip() == "great"


# Special tokens in a text


@pytest.mark.parametrize("kind", ["bert", "roberta"])
@given(data=st.data())
def test_a_text_brings_no_special_tokens(tokenizer: TokenizerOf, kind: str, data: st.DataObject) -> None:
    read = tokenizer(kind)
    pieces = [*read.all_special_tokens, "[", "]", "<", "/", ">", "MASK]", "s>", "mask>", "a", " "]
    text = "".join(data.draw(st.lists(st.sampled_from(pieces), max_size=12)))
    limit = data.draw(st.none() | st.integers(14, 30))
    template = Template(("{text} . It was {mask} .",))
    special = {i for i in read.all_special_ids if i != read.unk_token_id}

    def specials(text: str) -> Counter[int]:
        return Counter(i for i in encode(read, template, {"text": text}, limit)["input_ids"] if i in special)

    assert specials(text) == specials("a")
    assert sum(specials("a").values()) == 3


def test_a_text_does_not_end_a_causal_lms_document(tokenizer: TokenizerOf) -> None:
    gpt2 = tokenizer("gpt2")
    ids = encode(gpt2, plain_template(["text"]), {"text": "good<|endoftext|>bad"})["input_ids"]
    assert gpt2.eos_token_id not in ids
    assert gpt2.decode(ids) == "good< |endoftext|>bad"


# Errors


@pytest.mark.parametrize(
    "pieces",
    [
        (),
        ("{a}", "{b}", "{c}"),
        ("It was {mask} .",),
        ("{text} {mask}", "{mask}"),
        ("{text",),
        ("{text} }",),
        ("{text} {}",),
    ],
)
def test_a_template_that_cannot_be_is_refused(pieces: tuple[str, ...]) -> None:
    with pytest.raises(LoPAError, match="template must be one or two pieces"):
        Template(pieces)


@pytest.mark.parametrize("limit", [0, 4, 9])
def test_a_template_must_leave_room_for_text(tokenizer: TokenizerOf, limit: int) -> None:
    template = Template(("{text} . It was great and {mask} .",))
    assert len(tokenizer("bert")(" . It was great and [MASK] .")["input_ids"]) == 9
    with pytest.raises(LoPAError, match=rf"9 tokens, which leaves no room for text in {limit}: those of max_length"):
        Tokenize(tokenizer("bert"), template, limit)


@pytest.mark.parametrize("objective", ["masked_lm", "causal_lm"])
def test_an_answer_in_words_needs_a_mask(text_spec: SpecOf, objective: str) -> None:
    with pytest.raises(LoPAError, match=rf"'{objective}' needs a template with {{mask}}, got \['{{text}}'\]"):
        backbone_template(Template(("{text}",)), None, text_spec("bert", objective))


def test_a_column_after_the_mask_is_not_left_out(text_spec: SpecOf) -> None:
    with pytest.raises(LoPAError, match=r"column second stands after {mask} in .*; give a causal_template"):
        backbone_template(Template(("{first}? {mask}, {second} {{second}}",)), None, text_spec("llama", "causal_lm"))


def test_a_mask_with_nothing_to_read_before_it_is_refused_for_causal_lms(text_spec: SpecOf) -> None:
    with pytest.raises(LoPAError, match="template"):
        backbone_template(Template(("{mask} : {text}",)), None, text_spec("gpt2", "causal_lm"))


def test_a_column_named_as_the_place_for_the_answer_is_refused() -> None:
    with pytest.raises(LoPAError, match="a column of text cannot be named 'mask'"):
        plain_template(["text", "mask"])

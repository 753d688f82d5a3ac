"""From a row's texts to token ids: templates, truncation, tokenisation."""

from __future__ import annotations

import itertools
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from lopa_lightning.backbones.chat import ChatFormat
from lopa_lightning.backbones.text_spec import TextSpec
from lopa_lightning.errors import LoPAError
from lopa_lightning.task import Side

_MASK = "mask"


@dataclass(frozen=True)
class Template:
    """One or two pieces of text with ``{column}`` fields, and ``{mask}`` where the answer goes.

    Two pieces are encoded as a pair, with the separators and token types of the tokenizer.

    Args:
        pieces: The pieces.

    Raises:
        LoPAError: If there are not one or two pieces, they have no field, or more than one mask.

    Example:
        >>> Template(("{sentence} . It was {mask} .",)).columns
        ['sentence']
    """

    pieces: tuple[str, ...]

    def __post_init__(self) -> None:
        try:
            fields = self._fields()
        except (TypeError, ValueError):  # no text, a brace without its other half, or a field with a format
            fields = []
        if len(self.pieces) not in (1, 2) or not set(fields) - {_MASK} or fields.count(_MASK) > 1 or "" in fields:
            raise LoPAError(
                "a template must be one or two pieces of text with at least one {column}, without a format, and at "
                f"most one {{mask}}; got {list(self.pieces)}"
            )

    def _fields(self) -> list[str]:
        parsed = [part for piece in self.pieces for part in string.Formatter().parse(piece) if part[1] is not None]
        if any(specification or conversion for _, _, specification, conversion in parsed):
            raise ValueError
        return [str(field) for _, field, _, _ in parsed]

    @property
    def columns(self) -> list[str]:
        """The columns that it reads."""
        return list(dict.fromkeys(field for field in self._fields() if field != _MASK))

    @property
    def has_mask(self) -> bool:
        """Whether it says where the answer goes."""
        return _MASK in self._fields()

    def until_mask(self) -> Template:
        """Returns the part before the answer, as one text: what a causal LM is to continue.

        Raises:
            LoPAError: If it leaves out a column.
        """
        before, read = "", set()
        for literal, field, _, _ in string.Formatter().parse("\n".join(self.pieces)):
            before += literal.replace("{", "{{").replace("}", "}}")
            if field == _MASK:
                break
            before += "" if field is None else f"{{{field}}}"
            read.add(field)
        if lost := [name for name in self.columns if name not in read]:
            raise LoPAError(
                f"column {', '.join(lost)} stands after {{mask}} in {list(self.pieces)}, where a model without a mask "
                "does not read it; give a causal_template"
            )
        return Template((before.rstrip(),))

    def render(self, texts: dict[str, str], mask: str = "") -> list[str]:
        """Fills in a row's texts.

        Args:
            texts: Text of each column.
            mask: The tokenizer's mask token.
        """
        values: dict[Any, str] = {**texts, _MASK: mask, None: ""}
        parsed = map(string.Formatter().parse, self.pieces)
        return ["".join(literal + values[field] for literal, field, _, _ in parts) for parts in parsed]


class Tokenize:
    """Encodes a template's texts with one tokenizer, cut to a length by cutting the rows' own texts.

    Never the template is cut, nor the mask: the longest field loses tokens until the whole fits.
    Strings in a text that the tokenizer would take for special tokens are broken by a space.

    Args:
        tokenizer: A fast tokenizer.
        template: What to encode.
        max_tokens: Length of the whole, special tokens included; None for no limit.
        side: Which end of a field is cut.
        chat: Renders the text as a message of the user, where a soft prompt stands in a chat; None for no chat.

    Raises:
        LoPAError: If the template alone is longer than ``max_tokens``.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: Template,
        max_tokens: int | None,
        side: Side = "right",
        chat: ChatFormat | None = None,
    ) -> None:
        self.tokenizer, self.max_tokens, self.side, self.chat = tokenizer, max_tokens, side, chat
        # Without a separator of its own, a tokenizer would glue the two pieces together.
        glued = len(template.pieces) == 2 and tokenizer.sep_token is None
        self.template = Template(("\n".join(template.pieces),)) if glued else template
        specials = sorted((t for t in tokenizer.all_special_tokens if len(t) > 1), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, specials))) if specials else None
        self._has_token_types = "token_type_ids" in tokenizer.model_input_names
        bare = len(self._encode([dict.fromkeys(self.template.columns, "")])["input_ids"][0])
        if max_tokens is not None and bare >= max_tokens:
            raise LoPAError(
                f"the template alone has {bare} tokens, which leaves no room for text in {max_tokens}: those of "
                "max_length, or the positions that virtual tokens leave"
            )

    def __call__(self, columns: Mapping[str, Sequence[str]]) -> dict[str, list[Any]]:
        """Encodes rows.

        Args:
            columns: Texts of each column of the template.

        Returns:
            ``input_ids``, ``token_type_ids`` where the tokenizer has them, ``prompt_position`` where a soft prompt
            stands in a chat, and ``truncated``, a list of bools.
        """
        return self._encoded(columns)[1]

    def texts(self, columns: Mapping[str, Sequence[str]]) -> tuple[list[str], list[bool]]:
        """Returns rows as texts, for those who tokenise them by themselves, and whether each was cut.

        Args:
            columns: Texts of each column of the template.
        """
        rows, encoded = self._encoded(columns)
        return ["\n".join(self._rendered(row)) for row in rows], encoded["truncated"]

    def _encoded(self, columns: Mapping[str, Sequence[str]]) -> tuple[list[dict[str, str]], dict[str, list[Any]]]:
        """Rows as they are read, cut where they are too long, and their encoding."""
        names = self.template.columns
        rows = [dict(zip(names, map(self._plain_text, texts))) for texts in zip(*(columns[name] for name in names))]
        encoded, limit = self._encode(rows), self.max_tokens
        too_long = [limit is not None and len(ids) > limit for ids in encoded["input_ids"]]
        for i in itertools.compress(range(len(rows)), too_long):
            rows[i], cut = self._encode_cut(rows[i])
            for key, values in cut.items():
                encoded[key][i] = values
        return rows, {**encoded, "truncated": too_long}

    def _rendered(self, row: dict[str, str]) -> list[str]:
        return self.template.render(row, self.tokenizer.mask_token or "")

    def _plain_text(self, text: str) -> str:
        return self._special.sub(lambda m: f"{m[0][0]} {m[0][1:]}", text) if self._special is not None else text

    def _encode(self, rows: list[dict[str, str]]) -> dict[str, list[Any]]:
        rendered = list(map(self._rendered, rows))
        if self.chat is not None:
            ids, positions = self.chat.ids([self.chat.of_pair("\n".join(parts), None)[0] for parts in rendered])
            return {"input_ids": ids, "prompt_position": positions}
        pieces = [list(piece) for piece in zip(*rendered)]
        # verbose=False: the tokenizer's own warning on long texts would come before they are cut.
        encoded = self.tokenizer(*pieces, return_attention_mask=False, verbose=False)
        keys = ["input_ids", "token_type_ids"] if self._has_token_types else ["input_ids"]
        return {key: list(encoded[key]) for key in keys}

    def _encode_cut(self, row: dict[str, str]) -> tuple[dict[str, str], dict[str, Any]]:
        """Cuts the longest fields to one length, as often as it takes; returns what is left, and its encoding."""
        row = dict(row)
        while True:
            encoded = self._encode([row])
            surplus = len(encoded["input_ids"][0]) - (self.max_tokens or 0)
            if surplus <= 0:
                return row, {key: values[0] for key, values in encoded.items()}
            spans = {name: self._token_spans(text) for name, text in row.items()}
            name = max(spans, key=lambda field: (len(spans[field]), len(row[field])))
            row[name] = self._cut(row[name], spans[name], _common_length(list(map(len, spans.values())), surplus))

    def _cut(self, text: str, spans: list[tuple[int, int]], kept: int) -> str:
        """Keeps about ``kept`` of a text's tokens, and always less than the whole text."""
        if kept <= 0:
            return ""
        if self.side == "right":
            start, end = spans[kept - 1]
            # Several tokens may share one character, such as the bytes of an emoji: then it goes as a whole.
            return text[: end if end < len(text) else start]
        start, end = spans[-kept]
        return text[start if start > 0 else max(end, 1) :]

    def _token_spans(self, text: str) -> list[tuple[int, int]]:
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return [(int(start), int(end)) for start, end in encoded["offset_mapping"]]


def _common_length(lengths: Sequence[int], surplus: int) -> int:
    """Returns the length to which the longest fields are cut, so that all together lose a surplus of tokens.

    Example:
        >>> _common_length([60, 30, 4], surplus=20), _common_length([60, 30, 4], surplus=54)
        (40, 18)
    """
    ordered, room = sorted(lengths), sum(lengths) - surplus
    while ordered[0] <= room // len(ordered):
        room -= ordered.pop(0)
    return room // len(ordered)


def backbone_template(template: Template, causal: Template | None, spec: TextSpec) -> Template:
    """Returns what the backbone reads, for the way in which its answer is read.

    Args:
        template: The task's template.
        causal: Its wording for causal LMs, where that is another.
        spec: The model's.

    Returns:
        ``masked_lm``: the template. ``causal_lm``: the part before the mask. ``head``: the columns alone.

    Raises:
        LoPAError: If words are to be read but no ``{mask}`` says where.
    """
    if spec.objective == "head":
        return plain_template(template.columns)
    chosen = causal if causal is not None and spec.objective == "causal_lm" else template
    if not chosen.has_mask:
        raise LoPAError(f"objective {spec.objective!r} needs a template with {{mask}}, got {list(chosen.pieces)}")
    return chosen.until_mask() if spec.objective == "causal_lm" else chosen


def plain_template(columns: Sequence[str]) -> Template:
    """Returns the template of the columns' texts alone, two as a pair; further ones go with the first.

    Raises:
        LoPAError: If a column's name is that of the place for the answer.
    """
    if _MASK in columns:
        raise LoPAError("a column of text cannot be named 'mask', where a template has the answer; rename it")
    parts = [columns[:-1], columns[-1:]] if len(columns) > 1 else [columns]
    return Template(tuple("\n".join(f"{{{name}}}" for name in part) for part in parts))

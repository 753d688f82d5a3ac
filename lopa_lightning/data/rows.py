"""Encoders of rows into token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lopa_lightning.data.cache import Encoder
from lopa_lightning.data.columns import ColumnError, is_empty
from lopa_lightning.data.labels import LabelLookup, encoded_labels
from lopa_lightning.data.template import Tokenize
from lopa_lightning.errors import is_unicode


class RowEncoder(Encoder, Protocol):
    """Encodes a batch of rows into ``input_ids``, ``index``, ``length``, and what else a batch is to have."""

    max_tokens: int | None
    """Tokens of a row at most."""

    @property
    def needed(self) -> Sequence[str]:
        """The columns that must not have an empty cell."""


class TextError(ColumnError):
    """Texts of a column cannot be used.

    Attributes:
        column: The column.
        fault: What is wrong, as :func:`fault_of` says it.
    """

    def __init__(self, column: str, fault: str, allow_empty: bool) -> None:
        super().__init__(column, fault, lambda text: fault_of(text, allow_empty) == fault)


def fault_of(text: Any, allow_empty: bool = False) -> str | None:
    """Returns why something in a column of texts cannot be read as one; None where it can.

    Args:
        text: A row's value. A number, list or mapping is no text: nobody wrote its ``str``.
        allow_empty: Whether it may be missing or blank.
    """
    if text is not None and text != [] and not isinstance(text, str):
        return "must hold texts"
    if not allow_empty and is_empty(text):
        return "is empty"
    if "\0" in (text or ""):
        return "has a NUL character"
    return None if is_unicode(text or "") else "is not Unicode"


def check_texts(texts: Mapping[str, Sequence[Any]], allow_empty: bool = False) -> None:
    """Checks columns of texts.

    Args:
        texts: Texts by column.
        allow_empty: Whether they may be missing or blank.

    Raises:
        TextError: If one cannot be used.
    """
    for column, values in texts.items():
        if fault := next((fault for text in values if (fault := fault_of(text, allow_empty))), None):
            raise TextError(column, fault, allow_empty)


@dataclass
class EncodeRows:
    """Encodes rows of text, with a label where there is one.

    Args:
        to_backbone: What the backbone reads.
        to_instance: What the instance encoder reads; None if no instance is read.
        columns: With text.
        labels: What the labels mean; None if there are none.
        allow_empty_text: Whether a text may be empty.
        several: Number of labels where a row has a list of them, which becomes 0s and 1s; 0 where it has one.
    """

    to_backbone: Tokenize
    to_instance: Tokenize | None
    columns: Sequence[str]
    labels: LabelLookup | None
    allow_empty_text: bool
    several: int = 0

    def __post_init__(self) -> None:
        self.max_tokens = self.to_backbone.max_tokens

    @property
    def needed(self) -> list[str]:
        """The columns that must not have an empty cell."""
        texts = [] if self.allow_empty_text else self.columns
        return [*texts, *([self.labels[0]] if self.labels is not None else [])]

    def key(self) -> list[Any]:
        """Returns all that the ids depend on."""
        parts = [tokenize_key(part) for part in (self.to_backbone, self.to_instance) if part is not None]
        return [self.allow_empty_text, self.labels, self.several, *parts]

    def __call__(self, rows: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        """Encodes rows.

        Raises:
            TextError: If a text cannot be used.
        """
        check_texts({name: rows[name] for name in self.columns}, self.allow_empty_text)
        texts = {name: [text or "" for text in rows[name]] for name in self.columns}
        encoded = self.to_backbone(texts)
        if self.to_instance is not None:
            encoded |= {f"instance_{key}": values for key, values in self.to_instance(texts).items()}
        if self.labels is not None:
            column, lookup = self.labels
            encoded["labels"] = encoded_labels(rows[column], lookup, self.several)
        return {**encoded, "index": indices, "length": [len(ids) for ids in encoded["input_ids"]]}


def tokenize_key(tokenize: Tokenize) -> list[Any]:
    """Returns all that a tokenisation depends on."""
    key = [*tokenizer_key(tokenize.tokenizer), tokenize.template.pieces, tokenize.max_tokens, tokenize.side]
    return key if tokenize.chat is None else [*key, tokenize.chat.placement, tokenize.chat.template]


def tokenizer_key(tokenizer: Any) -> list[Any]:
    """Returns what a tokenizer is, whatever it was used for before."""
    return [tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map]

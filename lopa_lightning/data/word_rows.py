"""Encodes rows of words with a label each: the label stands at a word's first token."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from transformers import PreTrainedTokenizerBase

from lopa_lightning.data.columns import ColumnError, RowError
from lopa_lightning.data.labels import LabelLookup
from lopa_lightning.data.rows import fault_of, tokenize_key, tokenizer_key
from lopa_lightning.data.template import Tokenize
from lopa_lightning.errors import LoPAError
from lopa_lightning.task import IGNORED, Side


def words_of(value: Any) -> list[str]:
    """Returns the words of a row: a list as it is, a text split at whitespace."""
    return value.split() if isinstance(value, str) else list(value)


def fault_of_words(value: Any) -> str | None:
    """Returns why something in a column of words cannot be read; None where it can."""
    if not isinstance(value, (str, list)) or not all(isinstance(word, str) for word in value):
        return "must hold lists of words"
    if not (words := words_of(value)):
        return "has no words"
    fault = next((fault for word in words if (fault := fault_of(word))), None)
    return "has an empty word" if fault == "is empty" else fault


def check_words(column: str, values: Sequence[Any]) -> None:
    """Checks a column of words.

    Raises:
        ColumnError: If there is a row that cannot be used.
    """
    if fault := next((fault for value in values if (fault := fault_of_words(value))), None):
        raise ColumnError(column, fault, lambda value: fault_of_words(value) == fault)


def word_rows(rows: Any, column: str) -> Any:
    """Returns rows that a user gives, lists of words as mappings of their column.

    Args:
        rows: A text or a list of words under its column, or a list of rows: lists of words, texts, or mappings.
        column: Of words.

    Example:
        >>> word_rows([["EU", "rejects"], "a text"], "tokens")
        [{'tokens': ['EU', 'rejects']}, 'a text']
    """
    words = rows.get(column) if isinstance(rows, Mapping) else rows if isinstance(rows, tuple) else None
    if isinstance(words, (list, tuple, str)) and all(isinstance(each, str) for each in words):
        rows = [rows]  # one row
    if isinstance(rows, (str, Mapping)):
        return rows
    return [{column: list(row)} if isinstance(row, (list, tuple)) else row for row in rows]


@dataclass
class EncodeWords:
    """Encodes rows of words. They are read as one text, in which a space stands between two.

    Args:
        tokenizer: The backbone's, a fast one.
        to_instance: What the instance encoder reads; None if no instance is read.
        column: Of words.
        labels: What the labels mean; None if there are none.
        max_tokens: Tokens of a row, special ones included; None for no limit.
        side: Which end of a row too long is cut.

    Raises:
        LoPAError: If special tokens leave no room for words.
    """

    tokenizer: PreTrainedTokenizerBase
    to_instance: Tokenize | None
    column: str
    labels: LabelLookup | None
    max_tokens: int | None
    side: Side

    def __post_init__(self) -> None:
        specials = self.tokenizer.num_special_tokens_to_add()
        if self.max_tokens is not None and self.max_tokens <= specials:
            raise LoPAError(
                f"{specials} special tokens leave no room for words in {self.max_tokens}: those of max_length, or the "
                "positions that virtual tokens leave"
            )

    @property
    def columns(self) -> list[str]:
        """The columns that it reads."""
        return [self.column, *([self.labels[0]] if self.labels is not None else [])]

    needed = columns

    def key(self) -> list[Any]:
        """Returns all that the ids depend on."""
        instance = [] if self.to_instance is None else tokenize_key(self.to_instance)
        own = ["words", self.max_tokens, self.side, self.columns, self.labels]
        return [*own, *tokenizer_key(self.tokenizer), instance]

    def __call__(self, rows: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        """Encodes rows.

        Returns:
            ``input_ids``, and ``token_type_ids`` where the tokenizer has them; ``words``, at a word's first token its
            number in the row, counted from 1, else 0; ``num_words``; ``labels`` at these tokens, else
            :data:`~lopa_lightning.task.IGNORED`; and whether the row was ``truncated``, or has ``untokenised`` words.

        Raises:
            ColumnError: If words cannot be used.
            RowError: If a row has not one label for each word.
        """
        check_words(self.column, rows[self.column])
        words = [words_of(value) for value in rows[self.column]]
        texts = [" ".join(row) for row in words]
        options: Any = {
            "return_offsets_mapping": True,
            "return_special_tokens_mask": True,
            "split_special_tokens": True,
        }
        # verbose=False: the tokenizer's own warning on long texts would come before they are cut.
        read = self.tokenizer(texts, return_attention_mask=False, verbose=False, **options)
        masks, spans = read.pop("special_tokens_mask"), read.pop("offset_mapping")
        read["words"] = [_first_tokens(*row) for row in zip(words, texts, spans, masks)]
        counts = [len(row) for row in words]
        encoded: dict[str, list[Any]] = {
            "untokenised": [sum(map(bool, row)) < count for row, count in zip(read["words"], counts)],
            "truncated": [self.max_tokens is not None and len(mask) > self.max_tokens for mask in masks],
            **{key: [self._cut(*row) for row in zip(values, masks)] for key, values in read.items()},
        }
        if self.labels is not None:
            encoded["labels"] = list(map(self._labels, rows[self.column], rows[self.labels[0]], encoded["words"]))
        if self.to_instance is not None:
            found = self.to_instance({self.column: texts})
            encoded |= {f"instance_{key}": values for key, values in found.items()}
        return {**encoded, "num_words": counts, "index": indices, "length": list(map(len, encoded["input_ids"]))}

    def _cut(self, values: list[int], mask: list[int]) -> list[int]:
        """Cuts a row's text from a list of what its tokens have; special tokens around it stay."""
        if self.max_tokens is None or len(values) <= self.max_tokens:
            return values
        first, after = mask.index(0), len(mask) - mask[::-1].index(0)
        kept = self.max_tokens - first - (len(mask) - after)
        start = first if self.side == "right" else after - kept
        return values[:first] + values[start : start + kept] + values[after:]

    def _labels(self, value: Any, labels: list[Any], numbers: list[int]) -> list[int]:
        """Returns a row's labels at the first tokens of its words."""
        assert self.labels is not None
        column, lookup = self.labels
        if len(labels) != (count := len(words_of(value))):
            row = {self.column: value, column: labels}
            raise RowError(row, f"has {count} words in {self.column!r} and {len(labels)} labels in {column!r}")
        return [int(lookup[labels[number - 1]]) if number else IGNORED for number in numbers]


def _first_tokens(words: list[str], text: str, spans: list[tuple[int, int]], mask: list[int]) -> list[int]:
    """Returns for each token of a text the number of the word whose first one it is, counted from 1; else 0."""
    starts = list(accumulate((len(word) + 1 for word in words), initial=0))
    numbers, last = [], 0
    for (start, end), is_special in zip(spans, mask):
        own = text[start:end].lstrip()  # a token may begin with the space before its word
        number = bisect_right(starts, end - len(own)) if own and not is_special else 0
        numbers.append(number if number > last else 0)
        last = max(number, last)
    return numbers

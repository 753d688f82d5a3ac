"""Text as data: tokenise once, batch by length, pad little."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, get_args

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

from lopa_lightning.backbones.text_spec import TextSpec
from lopa_lightning.data.cache import encoded_rows
from lopa_lightning.data.collate import Collate
from lopa_lightning.data.columns import whole_rows
from lopa_lightning.data.rows import RowEncoder
from lopa_lightning.data.splits import Role, SplitsDataModule
from lopa_lightning.data.types import Dataset
from lopa_lightning.errors import LoPAError, at_least, one_of
from lopa_lightning.task import Side


class TextDataModule(SplitsDataModule):
    """Turns rows of text into batches of token ids for a module's frozen models.

    Args:
        max_length: Tokens of a text for the backbone, virtual tokens not counted; None for as many as fit.
        truncation_side: Which end of a text too long is cut.
        padding_side: Where the backbone's padding goes.
        batch_tokens: Most tokens in a batch of one process, padding and virtual tokens included, in place of
            ``batch_size``; batches then differ in size, and each counts by its examples. Evaluation keeps to it as
            well, unless there is an ``eval_batch_size``.
        drop_empty: Drop rows with an empty cell, and say how many, in place of refusing them.
        **kwargs: See :class:`~lopa_lightning.data.splits.SplitsDataModule`.

    Raises:
        LoPAError: If arguments are out of range or contradict each other.
    """

    list_column: str | None = None
    """Column with a list of labels in each row, which may well be empty; None where there is none."""

    def __init__(
        self,
        max_length: int | None = None,
        truncation_side: Side = "right",
        padding_side: Side = "right",
        batch_tokens: int | None = None,
        drop_empty: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        at_least(1, batch_tokens=batch_tokens, max_length=max_length)
        one_of("truncation_side", truncation_side, get_args(Side))
        one_of("padding_side", padding_side, get_args(Side))
        self.batch_tokens, self.max_length = batch_tokens, max_length
        self.eval_batch_tokens = None if kwargs.get("eval_batch_size") is not None else batch_tokens
        self.truncation_side, self.padding_side = truncation_side, padding_side
        self.drop_empty = drop_empty

    @property
    def text_spec(self) -> TextSpec:
        """The tokenizers and lengths of the module that is connected."""
        if not isinstance(self.input_spec, TextSpec):
            raise LoPAError(f"{type(self).__name__} gives texts, and the module reads another kind of input")
        return self.input_spec

    def collate(self) -> Collate:
        """Returns the function that pads a batch to its longest text."""
        return Collate.of(self.text_spec, self.padding_side)

    def training_subset(self, data: Dataset) -> Dataset:
        """Draws the examples to train on from rows that will not be dropped."""
        if self.drop_empty and (self.shots_per_label or self.max_train_examples):
            kept = whole_rows(data, self.row_encoder(data, "train", "train").needed, "train", self.list_column)
            data = data if kept is None else data.select(kept)
        return super().training_subset(data)

    @abstractmethod
    def row_encoder(self, data: Dataset, what: str, role: Role) -> RowEncoder:
        """Builds the encoder of a split's rows into token ids.

        Args:
            data: The split.
            what: Its name, for messages.
            role: What it serves.

        Raises:
            LoPAError: If the rows are not what they must be.
        """

    def encode(self, data: Dataset, split: str, role: Role) -> Dataset:
        """Tokenises the rows of a split, from the cache where that was done before."""
        what = f"{role} ({split})"
        encoder = self.row_encoder(data, what, role)
        kept = whole_rows(data, encoder.needed, what, self.list_column) if self.drop_empty else None
        tokenised = encoded_rows(data, encoder, what, "Tokenising", kept)
        for column, message in self.warnings_of(encoder).items():
            if column in tokenised.column_names:
                if count := int(np.sum(tokenised.with_format("numpy")[column][:])):
                    rank_zero_warn(f"{what}: {count} of {len(tokenised)} {message}")
                if column == "left_out":
                    tokenised = self._without_left_out(tokenised, what)
                tokenised = tokenised.remove_columns(column)
        return tokenised

    @staticmethod
    def _without_left_out(data: Dataset, what: str) -> Dataset:
        kept = np.flatnonzero(~data.with_format("numpy")["left_out"][:])
        if len(kept) == 0:
            raise LoPAError(f"{what}: none of the {len(data)} rows fits; raise max_length")
        chosen: Dataset = data.select(kept)
        return chosen

    def warnings_of(self, encoder: RowEncoder) -> dict[str, str]:
        """Returns the warning, given once, on the rows for which a column of the encoder's is true."""
        instance = f"texts were cut to {self.text_spec.instance_max_tokens} tokens for the instance encoder"
        return {
            "truncated": f"texts were cut to {encoder.max_tokens} tokens",
            "instance_truncated": instance,
        }


def with_inputs(rows: list[dict[str, Any]], inputs: list[dict[str, Any]], gold: list[Any]) -> list[dict[str, Any]]:
    """Returns predictions beside the ``input`` that each is of, and its ``gold`` answer where any row has one.

    Args:
        rows: Predictions.
        inputs: What each was made of.
        gold: The right answers, or None where one is not known; empty where there are none.
    """
    answers = [{"gold": each} for each in gold] if any(each is not None for each in gold) else [{} for _ in rows]
    return [
        {"index": row["index"], "input": given, **answer, **row} for row, given, answer in zip(rows, inputs, answers)
    ]

"""Batches from rows: a plain dict of padded tensors."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lopa_lightning.data.types import Dataset
from lopa_lightning.task import IGNORED

if TYPE_CHECKING:
    from lopa_lightning.backbones.text_spec import TextSpec
    from lopa_lightning.data.instance_vectors import StoredVectors

_ROWS_AT_ONCE = 10_000  # are copied to be summed up


class Rows:
    """Gives encoded rows as a batch's columns, without a Python object for each token.

    Rows may be asked for with their ``epoch``, which then is a column too.

    Args:
        data: The rows.
        vectors: Of the rows, in place of the tokens that they were made of; None if there are none.
    """

    def __init__(self, data: Dataset, vectors: StoredVectors | None = None) -> None:
        if vectors is not None:
            data = data.remove_columns([name for name in data.column_names if name.startswith("instance_")])
        self.data = data.with_format("arrow")
        self.vectors = vectors

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, rows: list[int] | tuple[int, list[int]]) -> pa.Table:
        epoch, rows = rows if isinstance(rows, tuple) else (None, rows)
        table: pa.Table = self.data[rows]
        if epoch is not None:
            table = table.append_column("epoch", pa.array(np.full(len(table), epoch)))
        return table if self.vectors is None else table.append_column("instance", self.vectors.at(rows))

    __getitems__ = __getitem__  # torch asks so for the rows of a batch that it has made up itself

    @functools.cached_property
    def checksum(self) -> int:
        """CRC-32 of all that the backbone reads and is to answer, in the rows' order; of pixels, of their digests."""
        total = 0
        names = sorted(n for n in self.data.column_names if not n.startswith("instance_") and n != "pixels")
        for table in self.data.select_columns(names).iter(_ROWS_AT_ONCE):
            for name in names:
                values = table.column(name).combine_chunks()
                if pa.types.is_binary(values.type):
                    total = zlib.crc32(b"".join(values.to_pylist()), total)
                else:
                    is_list = pa.types.is_list(values.type) or pa.types.is_large_list(values.type)
                    numbers = (values.flatten() if is_list else values).to_numpy(zero_copy_only=False)
                    total = zlib.crc32(numbers.tobytes(), total)
        return total


class Collate:
    """Pads a batch to its longest row.

    Args:
        pad_id: Backbone token at padding.
        instance_pad_id: Instance encoder token at padding.
        side: Where the backbone's padding goes.

    Example:
        >>> batch = Collate(pad_id=0)([{"input_ids": [5, 6], "index": 0}, {"input_ids": [7], "index": 1}])
        >>> batch["input_ids"], batch["attention_mask"]
        (tensor([[5, 6],
                [7, 0]]), tensor([[1, 1],
                [1, 0]]))
    """

    def __init__(self, pad_id: int, instance_pad_id: int = 0, side: Literal["left", "right"] = "right") -> None:
        self.side = side
        self._padding = {"input_ids": pad_id, "instance_input_ids": instance_pad_id, "labels": IGNORED}
        self._masks = {"input_ids": "attention_mask", "instance_input_ids": "instance_attention_mask"}

    @classmethod
    def of(cls, spec: TextSpec, side: Literal["left", "right"] = "right") -> Collate:
        """Returns the one for a module's tokenizers.

        Args:
            spec: The module's.
            side: Where the backbone's padding goes.
        """
        instance_pad = pad_id(spec.instance_tokenizer) if spec.instance_tokenizer is not None else 0
        return cls(pad_id(spec.tokenizer), instance_pad, side)

    def __call__(self, rows: pa.Table | Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Makes a batch.

        Args:
            rows: ``input_ids``, ``index``, and optionally ``token_type_ids``, ``instance_input_ids``,
                ``instance_token_type_ids``, ``instance``, ``labels``.

        Returns:
            ``input_ids``, ``attention_mask`` (and ``token_type_ids``) ``[B, T]``;
            ``instance_input_ids``, ``instance_attention_mask`` (and ``instance_token_type_ids``) ``[B, S]``,
            or ``instance [B, e]``;
            ``index``, ``labels`` ``[B]``; where rows have a label for each token, ``labels [B, T]`` with
            :data:`~lopa_lightning.task.IGNORED` at padding.
        """
        table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(list(rows))
        batch: dict[str, Tensor] = {}
        for key, column in zip(table.column_names, table.columns):
            values = column.combine_chunks()
            if pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
                batch |= self._padded(key, values)
            elif pa.types.is_fixed_size_list(values.type):
                batch[key] = _tensor(values.flatten().to_numpy().reshape(len(values), -1))
            else:
                batch[key] = _tensor(values.to_numpy(zero_copy_only=False))
        return batch

    def _padded(self, key: str, values: pa.ListArray) -> dict[str, Tensor]:
        lengths = np.diff(values.offsets.to_numpy())[:, None]
        width = int(lengths.max())
        position = np.arange(width)
        at_left = self.side == "left" and not key.startswith("instance_")
        is_token = position >= width - lengths if at_left else position < lengths
        padded = np.full(is_token.shape, self._padding.get(key, 0), dtype=np.int64)
        padded[is_token] = values.flatten().to_numpy()
        batch = {key: torch.from_numpy(padded)}
        if key in self._masks:
            batch[self._masks[key]] = torch.from_numpy(is_token.astype(np.int64))
        return batch


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns a tokenizer's token for padding; without one any id will do: the attention mask hides it."""
    found: int | None = tokenizer.pad_token_id
    return 0 if found is None else found


def _tensor(values: NDArray[Any]) -> Tensor:
    """Returns numbers as torch makes them of Python's: integers in 64 bits, others in 32."""
    return torch.from_numpy(values.astype(np.int64 if np.issubdtype(values.dtype, np.integer) else np.float32))

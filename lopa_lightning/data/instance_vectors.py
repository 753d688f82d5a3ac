"""Rows with the instance vectors that were made of them before."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn

from lopa_lightning.data.collate import Rows
from lopa_lightning.instances.vectors import StoredVectors, VectorCache

if TYPE_CHECKING:
    from datasets import Dataset


class WithVectors(Rows):
    """Rows, each with its vector as ``instance``, and without the tokens that the vector was made of.

    Args:
        data: The rows.
        vectors: Of each row one.
    """

    def __init__(self, data: Dataset, vectors: StoredVectors) -> None:
        super().__init__(data.remove_columns([name for name in data.column_names if name.startswith("instance_")]))
        self.vectors = vectors

    def __getitem__(self, rows: list[int]) -> pa.Table:
        vectors = self.vectors.at(rows)
        column = pa.FixedSizeListArray.from_arrays(vectors.ravel(), vectors.shape[1])
        return super().__getitem__(rows).append_column("instance", column)

    __getitems__ = __getitem__


def agrees_with(cache: VectorCache, trainer: Trainer | None) -> bool:
    """Whether vectors may be read in a run: not those of a backbone that is sharded.

    One process could not hold it to make them, and a process that lacks them would wait for the others to run it.

    Args:
        cache: Where the vectors would be kept.
        trainer: Of the run; None outside of one.
    """
    is_sharded = trainer is not None and isinstance(trainer.strategy, ModelParallelStrategy)
    return not (cache.encoder.spec.is_backbone and is_sharded)


def reads_all(trainer: Trainer, role: str, batch_size: int, rows: int) -> bool:
    """Whether a run reads as many rows as a set has, in all its epochs.

    If not, as with ``fast_dev_run`` or ``limit_train_batches``, vectors of all cost more than they save.

    Args:
        trainer: Of the run.
        role: What the rows serve: ``train``, ``val``, ``test`` or ``predict``.
        batch_size: Of one process.
        rows: Number of rows.
    """
    limit: int | float = getattr(trainer, f"limit_{role}_batches")
    step = batch_size * trainer.world_size
    share = min(1.0, limit * step / rows) if isinstance(limit, int) else limit
    if trainer.state.fn == TrainerFn.FITTING:
        share *= trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs >= 0 else float("inf")
    if role == "train" and trainer.max_steps >= 0:
        share = min(share, trainer.max_steps * trainer.accumulate_grad_batches * step / rows)
    return share >= 1

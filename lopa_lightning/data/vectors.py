"""Rows with the instance vectors that were made of them before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import Dataset as TorchDataset

from lopa_lightning.frozen.vectors import StoredVectors, VectorCache


class WithVectors(TorchDataset[dict[str, Any]]):
    """Rows, each with its vector as ``instance``, and without the tokens that the vector was made of.

    Args:
        data: The rows.
        vectors: Of each row one.
    """

    def __init__(self, data: Dataset, vectors: StoredVectors) -> None:
        self.data = data.remove_columns([name for name in data.column_names if name.startswith("instance_")])
        self.vectors = vectors

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Rows at their places, as a loader asks for a batch."""
        found = zip(self.data.__getitems__(list(rows)), self.vectors.at(rows))
        return [{**row, "instance": vector} for row, vector in found]


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

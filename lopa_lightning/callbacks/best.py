"""The checkpoint of the best validation."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor


class BestCheckpoint(ModelCheckpoint):
    """Keeps the best checkpoints as Lightning does, but none whose score is NaN or infinite."""

    def check_monitor_top_k(self, trainer: Any, current: Tensor | None = None) -> bool:
        """Returns whether a score is among the best so far.

        Args:
            trainer: The Trainer.
            current: The score.
        """
        return current is not None and bool(current.isfinite()) and super().check_monitor_top_k(trainer, current)

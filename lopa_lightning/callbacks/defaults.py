"""Gives a Trainer in Python the callbacks that `lopa` has."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import Callback

from lopa_lightning.callbacks.checkpoints import BestCheckpoint, LastCheckpoint
from lopa_lightning.callbacks.predictions import PredictionWriter
from lopa_lightning.callbacks.prompt_monitor import PromptMonitor
from lopa_lightning.callbacks.summary import FitSummary

BEST: dict[str, Any] = {"monitor": "val/score", "mode": "max", "filename": "best", "enable_version_counter": False}
# A checkpoint callback of its own: Lightning's save_last follows the best one, not the run.
LAST: dict[str, Any] = {"filename": "last"}


def default_callbacks(folder: str | None = None) -> list[Callback]:
    """Returns the callbacks that a run of the command line has.

    Args:
        folder: Where ``best.ckpt``, ``last.ckpt`` and the predictions go; by default the run's log folder, of it
            ``checkpoints``.

    Example:
        >>> [type(each).__name__ for each in default_callbacks("runs/reviews")]
        ['BestCheckpoint', 'LastCheckpoint', 'PromptMonitor', 'PredictionWriter', 'FitSummary']
    """
    checkpoints = [BestCheckpoint(folder, **BEST), LastCheckpoint(folder, **LAST)]
    return [*checkpoints, PromptMonitor(), PredictionWriter(folder), FitSummary()]

"""Checks, before weights are read, that a schedule is as long as the run."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch.callbacks import Callback
from torch.optim.lr_scheduler import OneCycleLR

from lopa_lightning.data.limits import used_batches
from lopa_lightning.errors import LoPAError
from lopa_lightning.modules.dry_run import dry_run_of


class ScheduleLength(Callback):
    """Refuses a scheduler that ends before the run."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Checks a run.

        Raises:
            LoPAError: If it cannot be right.
        """
        if trainer.datamodule is None:
            return
        scheduler = dry_run_of(pl_module).scheduler if stage == "fit" and pl_module.make_lr_scheduler else None
        scheduler = getattr(scheduler, "then", None)
        if isinstance(scheduler, OneCycleLR):
            steps = _steps(trainer)
            warmup = round(pl_module.warmup * steps if 0 < pl_module.warmup < 1 else pl_module.warmup)
            if steps - warmup > scheduler.total_steps:
                after = f" after warmup {warmup}" if warmup else ""
                raise LoPAError(
                    f"lr_scheduler: total_steps must be at least the {steps - warmup} steps of the run{after}, "
                    f"got {scheduler.total_steps}"
                )


def _steps(trainer: Any) -> float:
    epochs = math.inf if trainer.max_epochs in (None, -1) else trainer.max_epochs
    steps = epochs * math.ceil(used_batches(trainer) / trainer.accumulate_grad_batches) if epochs < math.inf else epochs
    return steps if trainer.max_steps == -1 else min(steps, trainer.max_steps)

"""Runs the schedule of learning rates within a Trainer."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau

from lopa_lightning.data.limits import used_batches
from lopa_lightning.errors import LoPAError
from lopa_lightning.modules.dry_run import dry_run_of
from lopa_lightning.modules.monitors import check_monitor
from lopa_lightning.modules.schedule import CosineDecay, WarmUp, steps_of_run, warmup_steps, warn_of_warmup
from lopa_lightning.plain import made_class


class Scheduling(Callback):
    """Begins the warm-up when training starts, and steps a ``ReduceLROnPlateau`` before checkpoints are saved."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuses a scheduler that ends before the run.

        Raises:
            LoPAError: If it does.
        """
        made = made_class(pl_module.make_lr_scheduler) if pl_module.make_lr_scheduler else None
        if stage != "fit" or trainer.datamodule is None or made is None or not issubclass(made, OneCycleLR):
            return
        pl_module.setup(stage)  # which only the process that prepared the data has done: a dry run needs the task
        scheduler: Any = getattr(dry_run_of(pl_module).scheduler, "then", None)
        warmup = warmup_steps(pl_module.warmup, steps := _steps(trainer))
        if steps - warmup > scheduler.total_steps:
            after = f" after warmup {warmup}" if warmup else ""
            raise LoPAError(
                f"lr_scheduler: total_steps must be at least the {steps - warmup} steps of the run{after}, "
                f"got {scheduler.total_steps}"
            )

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Begins the warm-up, unless a checkpoint has brought its state; warns where it is longer than the run.

        Raises:
            LoPAError: If the steps of the run are needed and not known, or more than a resumed cosine has.
        """
        warn_of_warmup(pl_module.warmup, trainer)
        for scheduler in [config.scheduler for config in trainer.lr_scheduler_configs]:
            if not isinstance(scheduler, WarmUp):
                continue
            cosine = scheduler.then if isinstance(scheduler.then, CosineDecay) else None
            is_share = scheduler.steps is None and 0 < pl_module.warmup < 1
            steps = steps_of_run(trainer) if cosine is not None or is_share else 0
            if scheduler.steps is None and trainer.ckpt_path is None:
                scheduler.begin(warmup_steps(pl_module.warmup, steps), steps)
            elif scheduler.steps is None:  # of a run without a schedule
                scheduler.steps = 0
            elif cosine is not None and steps > (end := scheduler.steps + cosine.steps):
                raise LoPAError(
                    f"lr_scheduler: the checkpoint's CosineDecay ends after {end} steps, and this run has {steps}; "
                    "start a new run"
                )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Steps a ``ReduceLROnPlateau``; callbacks that save checkpoints come after all others."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._step_plateau(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Does so after each epoch where there is no validation."""
        if not trainer.enable_validation:
            self._step_plateau(trainer)

    def _step_plateau(self, trainer: Trainer) -> None:
        for config in trainer.lr_scheduler_configs:
            if not isinstance(config.scheduler, ReduceLROnPlateau):
                continue
            check_monitor(config.monitor, trainer.callback_metrics)
            config.scheduler.step(trainer.callback_metrics[str(config.monitor)])


def _steps(trainer: Any) -> float:
    steps = math.inf
    if trainer.max_epochs not in (None, -1):
        steps = trainer.max_epochs * math.ceil(used_batches(trainer) / trainer.accumulate_grad_batches)
    return steps if trainer.max_steps == -1 else min(steps, trainer.max_steps)

"""Runs that are killed: callbacks that send the signal, and a fit that goes on from its last checkpoint."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint

from lopa_lightning.callbacks import LastCheckpoint

Where = str
"""``step``, ``save``, ``validation`` or ``epoch``."""


class Kill(Callback):
    """Sends its own process a signal, once.

    Args:
        where: In a ``step``, while a checkpoint is being written (``save``), in a ``validation``, or at an ``epoch``'s
            end.
        number: The signal.
        epoch: In which it is sent, counted from 0.
        batch: At which it is sent, of the epoch or of its validation; any for an epoch's end.
    """

    def __init__(self, where: Where, number: int, epoch: int, batch: int) -> None:
        self.where, self.number, self.epoch, self.batch = where, number, epoch, batch

    def _at(self, where: Where, trainer: Trainer, batch: int) -> None:
        if (where, trainer.current_epoch, batch) == (self.where, self.epoch, self.batch):
            self.where = "done"
            os.kill(os.getpid(), self.number)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._at("step", trainer, batch_idx)
        if self.where == "save" and (trainer.current_epoch, batch_idx) == (self.epoch, self.batch):
            self._in_the_next_save()

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._at("validation", trainer, batch_idx)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._at("epoch", trainer, self.batch)

    def _in_the_next_save(self) -> None:
        save = torch.save

        def half(checkpoint: Any, file: Any) -> None:
            torch.save = save
            save(checkpoint, file)
            if self.number == signal.SIGKILL:
                file.truncate(file.tell() // 2)
                file.flush()
            os.kill(os.getpid(), self.number)

        torch.save = half
        self.where = "done"


class Seen(Callback):
    """The rows of each step, in order, and each validation's step and loss."""

    def __init__(self) -> None:
        self.rows: list[Any] = []
        self.losses: list[Any] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.rows.append([trainer.current_epoch, batch_idx, *batch["index"].tolist()])

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.losses.append([trainer.global_step, float(trainer.callback_metrics["val/loss"])])


def fit(
    folder: Path,
    make: Callable[[], tuple[Any, Any]],
    extra: Callback | None = None,
    early_stopping: bool = False,
    every_n_train_steps: int | None = None,
    epochs: int = 3,
    **options: Any,
) -> None:
    """Fits, from the last checkpoint if there is one, and keeps what was seen and what came of it."""
    seed_everything(5)
    model, data = make()
    seen = Seen()
    best = ModelCheckpoint(folder, filename="best", monitor="val/score", mode="max", enable_version_counter=False)
    last = LastCheckpoint(str(folder), every_n_train_steps=every_n_train_steps)
    stopping = [EarlyStopping("val/loss", patience=50)] if early_stopping else []
    run = Trainer(
        **{
            "max_epochs": epochs,
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "callbacks": [*([] if extra is None else [extra]), seen, *stopping, best, last],
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": folder,
            "num_sanity_val_steps": 0,
            **options,
        }
    )
    path = folder / "last.ckpt"
    run.fit(model, data, ckpt_path=path if path.is_file() else None)
    result = {
        "rows": seen.rows,
        "losses": seen.losses,
        "state": model.state_dict(),
        "optimizer": run.optimizers[0].state_dict(),
        "schedulers": [config.scheduler.state_dict() for config in run.lr_scheduler_configs],
        "best": float(best.best_model_score),
        "stopping": [callback.state_dict() for callback in stopping],
        "steps": [run.global_step, run.fit_loop.epoch_loop.state_dict()["state_dict"]["_batches_that_stepped"]],
    }
    torch.save(result, folder / "result.pt")

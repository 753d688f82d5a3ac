"""What processes run that are killed: a fit that ends itself at a step, and one that goes on from it."""

from __future__ import annotations

import functools
import os
import signal
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy

from lopa_lightning.callbacks import LastCheckpoint
from lopa_lightning.files import replacing
from lopa_lightning.signals import Stopped
from tests.modules.helpers import LoPATiny, module, reviews, trainer

ROWS = 22


class Rows(Callback):
    """The rows of each step, in order."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(batch["index"].tolist())


class Signal(Callback):
    """Sends its own process a signal after a step."""

    def __init__(self, number: signal.Signals, step: int, rank: int | None = None) -> None:
        self.number, self.step, self.rank = number, step, rank

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and self.rank in (None, trainer.global_rank):
            os.kill(os.getpid(), self.number)


class SignalInValidation(Callback):
    """Sends its own process a signal in a validation, each process at another batch."""

    def __init__(self, number: signal.Signals) -> None:
        self.number = number

    def on_validation_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int, *_: Any) -> None:
        if not trainer.sanity_checking and batch_idx == trainer.global_rank:
            os.kill(os.getpid(), self.number)


def fit(
    backbone: str,
    folder: Path,
    callbacks: tuple[Callback, ...] = (),
    epochs: int = 2,
    resume: Any = None,
    workers: int = 0,
    **options: Any,
) -> tuple[Any, Rows]:
    """Fits and keeps the last state of every step."""
    seed_everything(5)
    folder.mkdir(exist_ok=True)
    model = module(backbone, objective="head", prompt_encoder=functools.partial(LoPATiny, dropout=0.3), warmup=3)
    rows = Rows()
    kept = LastCheckpoint(str(folder), every_n_train_steps=1)
    run = trainer(folder, epochs, callbacks=[rows, *callbacks, kept], **options)
    run.fit(model, reviews(folder.parent, rows=ROWS, num_workers=workers), ckpt_path=resume)
    return model, rows


def killed_while_writing(backbone: str, folder: Path, step: int) -> None:
    """Is killed when half of the checkpoint of a step is on the disk."""
    save = torch.save

    def half(checkpoint: Any, file: Any) -> None:
        save(checkpoint, file)
        if checkpoint["global_step"] == step:
            file.truncate(file.tell() // 2)
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = half
    fit(backbone, folder)


def fit_on_two(*args: Any, **kwargs: Any) -> tuple[Any, Rows]:
    return fit(*args, devices=2, strategy=DDPStrategy(process_group_backend="gloo"), **kwargs)


def stopped(backbone: str, folder: Path, callback: Callback) -> int:
    """The exit status of a run that is ended by a signal."""
    try:
        fit_on_two(backbone, folder, (callback,))
    except Stopped as stop:
        return int(stop.code or 0)
    return 0


def two_processes(backbone: str, folder: Path, step: int, part: str) -> None:
    if part == "killed":
        model, rows = fit_on_two(backbone, folder / "whole")
        rank = torch.distributed.get_rank()
        with replacing(folder / f"whole{rank}.pt") as file:
            torch.save({"state": model.state_dict(), "rows": rows.seen}, file)
        fit_on_two(backbone, folder / "parts", (Signal(signal.SIGKILL, step, rank=1),))
        return
    model, rows = fit_on_two(backbone, folder / "parts", resume=folder / "parts" / "last.ckpt")
    asked = (Signal(signal.SIGTERM, step, rank=1), Signal(signal.SIGINT, step), SignalInValidation(signal.SIGINT))
    ended = [stopped(backbone, folder / f"asked{i}", callback) for i, callback in enumerate(asked)]
    result = {"state": model.state_dict(), "rows": rows.seen, "ended": ended}
    torch.save(result, folder / f"resumed{torch.distributed.get_rank()}.pt")

"""Puts right what a checkpoint says of Lightning's loops, so that a resumed run goes on in the right position."""

from __future__ import annotations

import hashlib
import os
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn

from lopa_lightning.data.loader import ResumableLoader
from lopa_lightning.errors import LoPAError
from lopa_lightning.plain import built

_BATCHES, _VALIDATION = "epoch_loop.batch_progress", "epoch_loop.val_loop.batch_progress"


class ResumePoint(Callback):
    """Lets a checkpoint go on from where its weights and its optimizer are, whoever saves it, and when.

    Within an accumulation window that is the last optimizer step: the window's batches are computed again. Before or
    within a validation it is the batch that the validation follows: it is run from its start, where Lightning passes
    over it.
    """

    def __init__(self) -> None:
        self._last_step: dict[str, Any] | None = None
        self._metrics: dict[str, float] = {}
        self._seed_after = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forgets the state of another run."""
        self._last_step, self._metrics = None, {}

    def state_dict(self) -> dict[str, Any]:
        """Returns the metrics of the last validation: early stopping looks at them after an epoch."""
        return {"metrics": self._metrics}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes them from a checkpoint."""
        self._metrics = built(state_dict["metrics"], dict[str, float], "metrics")

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keeps the state that the run goes on from, for a checkpoint before its first step."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._last_step = checkpoint["loops"]["fit_loop"]
            _go_on(checkpoint["loops"]["fit_loop"], trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the metrics of the last validation back, and makes sure that the data are where they were.

        Raises:
            LoPAError: If they start from the beginning within an epoch.
        """
        saved = (self._last_step or {}).get("state_dict", {}).get("combined_loader") or [{}]
        done, loader = saved[0].get("batches"), trainer.train_dataloader
        if done and isinstance(loader, ResumableLoader) and not loader.state_dict()["batches"]:
            raise LoPAError(
                f"the checkpoint was saved after {done} batches of an epoch, but the training data were set up before "
                "that was restored: read trainer.estimated_stepping_batches in on_train_start, not before"
            )
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in self._metrics.items()})
        with torch.random.fork_rng(devices=[]):
            self._seed_after = int(torch.randint(2**62, ()))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Seeds what a program draws next: after the seed of the last step, all its runs would begin alike."""
        if os.environ.get("PL_GLOBAL_SEED"):
            torch.manual_seed(self._seed_after)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Makes a step's randomness (dropout) depend on seed, epoch, step and rank alone.

        A resumed run so draws what an uninterrupted one would have drawn.
        """
        if seed := os.environ.get("PL_GLOBAL_SEED"):
            key = f"{seed}/{trainer.current_epoch}/{batch_idx}/{trainer.global_rank}".encode()
            torch.manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:8], "big"))

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keeps the state of the loops after an optimizer step."""
        self._keep(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Does so after a validation that follows one, and keeps its metrics."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
            self._keep(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Does so at the end of an epoch."""
        self._keep(trainer, pl_module)

    def _keep(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.accumulate_grad_batches > 1 and not pl_module.window.batches:
            self._last_step = trainer.fit_loop.state_dict()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Puts the state of the loops right."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        if pl_module.window.batches and self._last_step is not None:
            checkpoint["loops"]["fit_loop"] = self._last_step
            return
        loop = checkpoint["loops"]["fit_loop"]
        batch, validation = loop[_BATCHES]["current"], loop[_VALIDATION]
        if trainer.validating:
            is_owed = (
                not validation["is_last_batch"] or validation["current"]["completed"] < validation["current"]["ready"]
            )
        else:
            is_owed = batch["completed"] < batch["processed"] and _validation_follows(trainer)
        if not is_owed:
            # What a validation left that was interrupted is made up for: nothing of it is to be run again.
            validation["total"] |= dict.fromkeys(("started", "processed", "completed"), validation["total"]["ready"])
            return
        # Lightning's state in the first batch of a validation, which alone it goes back to.
        for count in loop[_BATCHES]["total"], batch:
            count["completed"] = count["processed"]
        begun = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
        loop[_VALIDATION] = {"total": begun, "current": dict(begun), "is_last_batch": False}


def _validation_follows(trainer: Trainer) -> bool:
    """Returns whether Lightning validates after the batch at hand."""
    epochs, batches = trainer.check_val_every_n_epoch, trainer.val_check_batch
    if not trainer.enable_validation or batches is None or (epochs and (trainer.current_epoch + 1) % epochs):
        return False
    done = trainer.fit_loop.total_batch_idx if epochs is None else trainer.fit_loop.batch_idx
    return (done + 1) % batches == 0


def _go_on(loop: dict[str, Any], trainer: Trainer) -> None:
    """Lets a run that was saved when an epoch ended go on with the next, or with what ``max_steps`` has left of it.

    Lightning goes on with the next in either case and, where there is ``max_steps``, ends the old one again before.
    """
    epoch, batches = loop["epoch_progress"], loop[_BATCHES]
    if epoch["total"]["processed"] < epoch["total"]["ready"] or not batches["current"]["ready"]:
        return
    if not batches["is_last_batch"]:
        for count in epoch.values():
            count["processed"] = count["completed"] = count["ready"] - 1
    elif trainer.max_steps != -1:
        for count in epoch.values():
            count["completed"] = count["processed"]
        loop[_BATCHES] |= {"current": dict.fromkeys(batches["current"], 0), "is_last_batch": False}
        epochs = trainer.check_val_every_n_epoch
        if trainer.enable_validation and not (epochs and (epoch["current"]["processed"] + 1) % epochs):
            # Before the epoch's first batch it passes over a validation, and counts that as a batch.
            loop["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1

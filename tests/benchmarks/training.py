"""Our side of every comparison: a real Trainer's loop, with what it is compared with run in its pauses."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, Trainer, seed_everything
from torch import Tensor

from lopa_lightning import LoPALightningModule
from lopa_lightning.data.text import TextDataModule
from tests.benchmarks.harness import Seconds, now

Batch = dict[str, Tensor]
Beside = Callable[[LoPALightningModule, list[Batch], int], dict[str, float]]
"""Of a module, batches that it was just trained on, and the number of the round: seconds by name."""


class Turns(Callback):
    """Times epochs of a training loop; all that the Trainer does counts, what is run beside it does not.

    Args:
        after_batch: Run after each batch, on that batch.
        after_epoch: Run after each epoch, on its batches.
        warmup: Epochs that are not counted.

    Attributes:
        seconds: Of each epoch, ours as ``ours``.
        batches: Of the last epoch.
    """

    def __init__(self, after_batch: Beside | None = None, after_epoch: Beside | None = None, warmup: int = 1) -> None:
        self.after_batch, self.after_epoch, self.warmup = after_batch, after_epoch, warmup
        self.seconds: Seconds = defaultdict(list)
        self.batches: list[Batch] = []
        self._epochs = 0
        self._round: dict[str, float] = defaultdict(float)
        self._since = 0.0

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.batches, self._round = [], defaultdict(float)
        self._since = now()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._round["ours"] += now() - self._since
        self.batches.append(batch)
        if self.after_batch is not None:
            self._add(self.after_batch(pl_module, [batch], self._epochs))
        self._since = now()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._round["ours"] += now() - self._since
        if self.after_epoch is not None:
            self._add(self.after_epoch(pl_module, self.batches, self._epochs))
        if self._epochs >= self.warmup:
            for name, seconds in self._round.items():
                self.seconds[name].append(seconds)
        self._epochs += 1

    def _add(self, measured: dict[str, float]) -> None:
        for name, seconds in measured.items():
            self._round[name] += seconds


class Until(Callback):
    """Ends a run that is said to have no end: one of a few batches would not have its vectors made before.

    Args:
        epochs: How many.
    """

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.should_stop = trainer.current_epoch + 1 >= self.epochs


def fit(module: LoPALightningModule, data: TextDataModule, epochs: int, *callbacks: Callback, **options: Any) -> None:
    """Trains for some epochs, quietly: no validation, no logger, no checkpoint."""
    seed_everything(0, verbose=False)
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "limit_val_batches": 0,
        "num_sanity_val_steps": 0,
    }
    Trainer(max_epochs=-1, callbacks=[*callbacks, Until(epochs)], **{**quiet, **options}).fit(module, data)


def tokens(batches: list[Batch], num_virtual_tokens: int) -> dict[str, float]:
    """Counts: ``batches``, ``examples``, ``tokens`` (virtual ones too, padding not), and the share of ``padding``."""
    examples = sum(len(batch["index"]) for batch in batches)
    real = sum(int(batch["attention_mask"].sum()) for batch in batches) + examples * num_virtual_tokens
    places = sum(batch["attention_mask"].numel() for batch in batches) + examples * num_virtual_tokens
    return {"batches": len(batches), "examples": examples, "tokens": real, "padding": 1 - real / places}

"""Shows the progress of a run."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import TQDMProgressBar


class EpochBar(TQDMProgressBar):
    """Shows a run's progress as Lightning does, with epochs counted from 1."""

    def on_train_epoch_start(self, trainer: Any, *args: Any) -> None:
        """Names the epoch."""
        super().on_train_epoch_start(trainer, *args)
        of = f"/{trainer.max_epochs}" if trainer.max_epochs and trainer.max_epochs > 0 else ""
        self.train_progress_bar.set_description(f"Epoch {trainer.current_epoch + 1}{of}")

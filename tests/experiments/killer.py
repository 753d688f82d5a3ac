"""What befalls runs, as a callback that a YAML names."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback


class KilledOnce(Callback):
    """Kills the process of seed 1 within the second epoch, the first time.

    Args:
        marker: A file that says it has happened.
    """

    def __init__(self, marker: str) -> None:
        self.marker = Path(marker)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        is_meant = os.environ.get("PL_GLOBAL_SEED") == "1"  # others run at the same time
        if is_meant and trainer.current_epoch == 1 and batch_idx == 2 and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)

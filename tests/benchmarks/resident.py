"""Memory that a process holds, by Linux's own count, and the moment of its first step."""

from __future__ import annotations

import ctypes
import gc
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from torch import nn

from lopa_lightning.files import write_whole

_MIB = 2**10  # of the kibibytes that the kernel counts in


def resident(peak: bool = False, own: bool = False) -> float:
    """MiB that this process holds.

    Args:
        peak: At most, since :func:`forget_peak`.
        own: Without pages of files, which the system takes back when it wants to; not known at most.
    """
    name = "VmHWM" if peak else "RssAnon" if own else "VmRSS"
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / _MIB


def forget_peak() -> None:
    """Sets the peak to what is held now, after what is free was given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def touch(models: Iterable[nn.Module]) -> None:
    """Reads every weight once: of a file that is mapped into memory, what was never read is not resident."""
    for model in models:
        for parameter in model.parameters():
            parameter.detach().sum()


class Peak(Callback):
    """MiB at most in training, above what there was once weights were loaded.

    Attributes:
        loaded: MiB with the weights loaded.
        above: MiB above them at most.
    """

    loaded = 0.0
    above = 0.0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        touch(pl_module.net.pretrained_models())
        forget_peak()
        self.loaded = resident()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.above = resident(peak=True) - self.loaded


class FirstStep(Callback):
    """Writes down when the first training step has ended, and what memory was held at most by then; then stops the run.

    Args:
        path: JSON file with ``ready`` (before the first batch is fetched) and ``at``, seconds since the epoch of the
            system's clock, and MiB: ``peak``, at most, and ``own``, of these now without pages of files.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.ready = 0.0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.ready = time.time()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 1:
            found = {"ready": self.ready, "at": time.time(), "peak": resident(peak=True), "own": resident(own=True)}
            write_whole(self.path, json.dumps(found) + "\n")
            trainer.should_stop = True

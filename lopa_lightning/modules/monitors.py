"""Checks what a run monitors to keep a checkpoint, to stop, or to lower a learning rate."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint

from lopa_lightning.errors import LoPAError

_OF_CALLBACKS = re.compile(r"train/(padding|skipped_steps)|per_second/(samples|tokens)|(lr|gradient_norm)/\w+")
_OURS = {"lopa_lightning", "lightning"}


def check_monitors(module: LightningModule, plateau: str | None, logged: Sequence[str]) -> None:
    """Refuses to monitor what is not logged. Modules and callbacks of others may log what they like.

    Args:
        module: With a Trainer.
        plateau: What the scheduler monitors.
        logged: Names that the module logs; those that begin with ``val`` only where there is validation.

    Raises:
        LoPAError: If a name is none of these, nor of those that our callbacks log.
    """
    trainer: Any = module.trainer
    if not {type(part).__module__.partition(".")[0] for part in (module, *trainer.callbacks)} <= _OURS:
        return
    always = logged if trainer.limit_val_batches else [name for name in logged if not name.startswith("val")]
    check_monitor(plateau, always)
    for callback in trainer.callbacks:  # without validation, Lightning warns that no checkpoint is kept by it
        known = logged if isinstance(callback, ModelCheckpoint) else always
        check_monitor(getattr(callback, "monitor", None), known)


def check_monitor(name: Any, logged: Iterable[str]) -> None:
    """Refuses to monitor a name that is not logged.

    Args:
        name: The name; what is no string monitors nothing.
        logged: What is, beside what our callbacks log.

    Raises:
        LoPAError: If it is not.
    """
    if isinstance(name, str) and name not in logged and not _OF_CALLBACKS.fullmatch(name):
        raise LoPAError(f"monitor must be one of {', '.join(dict.fromkeys(logged))}, got {name!r}")

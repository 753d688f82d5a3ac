"""What of a run may be monitored, to keep a checkpoint, to stop, or to lower a learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback

from lopa_lightning.errors import LoPAError

_OF_CALLBACKS = ("train/", "lr/", "gradient_norm/", "per_second/")
_OURS = {"lopa_lightning", "lightning"}


def check_monitors(module: LightningModule, callbacks: Sequence[Callback], logged: Sequence[str]) -> None:
    """Refuses to monitor what is not logged. Modules and callbacks of others may log what they like.

    Args:
        module: With the hyperparameters of its scheduler.
        callbacks: The Trainer's.
        logged: Names that the module logs.

    Raises:
        LoPAError: If a name is none of these, nor of the kinds that our callbacks log.
    """
    parts: list[Any] = [module, *callbacks]
    if not {type(part).__module__.partition(".")[0] for part in parts} <= _OURS:
        return
    scheduler = (module.hparams.get("lr_scheduler") or {}).get("init_args", {})
    for name in [scheduler.get("monitor"), *(getattr(callback, "monitor", None) for callback in callbacks)]:
        if isinstance(name, str) and name not in logged and not name.startswith(_OF_CALLBACKS):
            raise LoPAError(f"monitor must be one of {', '.join(dict.fromkeys(logged))}, got {name!r}")

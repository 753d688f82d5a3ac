"""Checks what a run monitors to keep a checkpoint, to stop, or to lower a learning rate."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.callbacks.early_stopping import EarlyStopping
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import Metric

from lopa_lightning.errors import LoPAError
from lopa_lightning.modules.schedule import monitored

_OF_CALLBACKS = re.compile(r"train/(padding|skipped_steps)|per_second/(samples|tokens)|(lr|gradient_norm)/\w+")
_OURS = {"lopa_lightning", "lightning"}


def check_monitors(
    module: LightningModule, scheduler: LRScheduler, logged: Sequence[str], metrics: Mapping[str, Metric]
) -> None:
    """Refuses to monitor what is not logged, or as if it were better the other way.

    Modules and callbacks of others may log what they like.

    Args:
        module: With a Trainer.
        scheduler: Of its optimizer, which may monitor something.
        logged: Names that the module logs; those that begin with ``val`` only where there is validation.
        metrics: Of an evaluation set; those that say so are better higher, or lower.

    Raises:
        LoPAError: If a name is none of these, nor of those that our callbacks log; or if its mode is the other one.
    """
    ways = {name: metric.higher_is_better for name, metric in metrics.items() if metric.higher_is_better is not None}
    known = {"loss": False, "score": True, "exact_match": True, "pearson": True, "spearman": True, **ways}
    ends = {name: "max" if way else "min" for name, way in known.items()}
    better = {name: ends[end] for name in logged if (end := name.rpartition("/")[2]) in ends}
    plateau = monitored(scheduler)
    check_mode("lr_scheduler", plateau, getattr(scheduler, "mode", None), better)
    trainer: Any = module.trainer
    for callback in trainer.callbacks:
        if isinstance(callback, ModelCheckpoint | EarlyStopping):
            name = "checkpoint" if isinstance(callback, ModelCheckpoint) else type(callback).__name__
            check_mode(name, callback.monitor, callback.mode, better)
    if not {type(part).__module__.partition(".")[0] for part in (module, *trainer.callbacks)} <= _OURS:
        return
    always = logged if trainer.limit_val_batches else [name for name in logged if not name.startswith("val")]
    check_monitor(plateau, always)
    for callback in trainer.callbacks:  # without validation, Lightning warns that no checkpoint is kept by it
        names = logged if isinstance(callback, ModelCheckpoint) else always
        check_monitor(getattr(callback, "monitor", None), names)


def check_mode(what: str, name: str | None, mode: str | None, better: Mapping[str, str]) -> None:
    """Refuses to take the worst of what is monitored for the best.

    Args:
        what: What monitors it.
        name: The name of what is monitored.
        mode: Whether ``max`` or ``min`` of it is taken as best.
        better: Which of them is, by name.

    Raises:
        LoPAError: If that is the other one.
    """
    wanted = better.get(str(name))
    if wanted is not None and mode != wanted:
        raise LoPAError(f"{what} monitors {name}, whose best value is the {wanted}; give mode: {wanted}, got {mode}")


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

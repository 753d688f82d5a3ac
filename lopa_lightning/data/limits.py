"""A Trainer's limits on batches, checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lopa_lightning.errors import LoPAError


def check_batch_limits(trainer: Any, roles: Sequence[str]) -> None:
    """Refuses limits that leave no batch, or no validation where one is asked for.

    Args:
        trainer: With a data module that is set up.
        roles: What its data serve: ``train``, ``val``, ``test``, ``predict``.

    Raises:
        LoPAError: If a share of the batches is less than one, or validations are further apart than an epoch's end.
    """
    for role in roles:
        limit = getattr(trainer, f"limit_{role}_batches")
        if isinstance(limit, float) and 0 < limit < 1 and limit * (count := _batches(trainer, role)) < 1:
            name = "overfit_batches" if trainer.overfit_batches else f"limit_{role}_batches"
            raise LoPAError(f"trainer.{name} must leave a batch of the {count} there are, got {limit:g}")
    interval, validates = trainer.val_check_interval, trainer.limit_val_batches and trainer.check_val_every_n_epoch
    if "train" in roles and validates and isinstance(interval, int) and interval > (batches := used_batches(trainer)):
        raise LoPAError(
            f"trainer.val_check_interval must be at most the {batches} batches of an epoch, got {interval}; "
            "trainer.check_val_every_n_epoch null counts on over epochs"
        )


def used_batches(trainer: Any) -> float:
    """Returns the number of training batches in an epoch; infinity where the loader does not know it."""
    count, limit = _batches(trainer, "train"), trainer.limit_train_batches
    return min(count, limit) if isinstance(limit, int) else math.inf if count == math.inf else int(limit * count)


def _batches(trainer: Any, role: str) -> float:
    loaders = getattr(trainer.datamodule, f"{role}_dataloader")()
    loaders = loaders if isinstance(loaders, list) else [loaders]
    return min((len(loader) for loader in loaders if hasattr(loader, "__len__")), default=math.inf)

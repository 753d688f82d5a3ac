"""Optimizer and scheduler tried out before anything is loaded."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lopa_lightning.errors import LoPAError
from lopa_lightning.modules.schedule import monitored

_MOST_GROUPS = 8  # a module has fewer


def check_optimization(make_optimizer: OptimizerCallable, make_scheduler: LRSchedulerCallable | None) -> str | None:
    """Builds optimizer and scheduler for parameters that are thrown away, so that they refuse what they would later.

    Args:
        make_optimizer: Still wants parameters.
        make_scheduler: Still wants an optimizer; None for none.

    Returns:
        What the scheduler monitors; None for nothing.

    Raises:
        LoPAError: If either refuses its options.

    Example:
        >>> import functools
        >>> check_optimization(functools.partial(torch.optim.SGD, lr=-1), None)
        Traceback (most recent call last):
        ...
        lopa_lightning.errors.LoPAError: optimizer: Invalid learning rate: -1
    """
    try:
        make_optimizer(_groups(1))
    except Exception as error:
        raise LoPAError(f"optimizer: {str(error) or type(error).__name__}") from error
    if make_scheduler is None:
        return None
    refused: list[Exception] = []
    # A scheduler may have a list with a value for each group, whose number is not known yet.
    for count in range(1, _MOST_GROUPS):
        try:
            scheduler = make_scheduler(make_optimizer(_groups(count)))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the optimizer has not stepped
                scheduler.step(1.0) if isinstance(scheduler, ReduceLROnPlateau) else scheduler.step()
        except Exception as error:
            refused.append(error)
        else:
            return monitored(scheduler)
    raise LoPAError(f"lr_scheduler: {type(refused[0]).__name__}: {refused[0]}") from refused[0]


def warn_of_warmup(warmup: float, trainer: Any) -> None:
    """Warns where learning rates do not reach their value.

    Args:
        warmup: Steps, or below 1 a share of the run.
        trainer: Of a run that has its data.
    """
    if warmup >= 1 and not trainer.fast_dev_run and warmup >= (steps := trainer.estimated_stepping_batches):
        rank_zero_warn(
            f"warmup {warmup:g} is not less than the {steps:g} steps of the run: learning rates do not reach their "
            "value"
        )


def _groups(count: int) -> list[dict[str, list[nn.Parameter]]]:
    return [{"params": [nn.Parameter(torch.zeros(2, 2))]} for _ in range(count)]

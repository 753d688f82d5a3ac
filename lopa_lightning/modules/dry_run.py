"""Optimizer and scheduler tried out before anything is loaded."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

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
    evaluations(make_optimizer)
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


def evaluations(make_optimizer: OptimizerCallable) -> int:
    """Takes a step with a small parameter that is thrown away, and returns how often the loss was computed for it.

    Args:
        make_optimizer: Still wants parameters.

    Raises:
        LoPAError: If it refuses its options, or the dense gradient that all parameters of ours have.

    Example:
        >>> evaluations(torch.optim.AdamW)
        1
    """
    groups, count = _groups(1), 0

    def closure() -> float:
        nonlocal count
        count += 1
        for parameter in groups[0]["params"]:
            parameter.grad = parameter.detach() - 1
        return 1.0 / count

    with named("optimizer"):
        make_optimizer(groups).step(closure=closure)
    return count


def check_with_shapes(module: Any) -> None:
    """Refuses an optimizer or scheduler that does not take what a module trains, or its batches for a step.

    Args:
        module: With its Trainer; no weights are needed.

    Raises:
        LoPAError: If it does not.
    """
    accumulated = module.trainer.accumulate_grad_batches
    if accumulated > 1 and evaluations(module.make_optimizer) > 1:
        raise LoPAError(
            "trainer.accumulate_grad_batches must be 1 with an optimizer that computes the loss of a step several "
            f"times, of its last batch alone; got {accumulated}"
        )
    on_shapes(module)


def on_shapes(module: Any) -> LRScheduler | None:
    """Returns a module's scheduler, over its optimizer of parameters that have shapes and no memory; None for none.

    Raises:
        LoPAError: If either refuses them.
    """
    groups = [
        {"name": name, "params": [nn.Parameter(torch.zeros((), dtype=p.dtype).expand(p.shape)) for p in group]}
        for name, group in module.meta_net().parameter_groups().items()
    ]
    with named("optimizer"):
        optimizer = module.make_optimizer(groups)
    if module.make_lr_scheduler is None:
        return None
    with named("lr_scheduler"):
        scheduler: LRScheduler = module.make_lr_scheduler(optimizer)
    return scheduler


@contextmanager
def named(option: str) -> Iterator[None]:
    """Names the option whose class, of torch or another library, raises an error in the block."""
    try:
        yield
    except Exception as error:
        raise LoPAError(f"{option}: {str(error) or type(error).__name__}") from error


def _groups(count: int) -> list[dict[str, list[nn.Parameter]]]:
    return [{"params": [nn.Parameter(torch.zeros(2, 2))]} for _ in range(count)]

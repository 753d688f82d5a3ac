"""Tries optimizer and scheduler before anything is loaded."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lopa_lightning.errors import LoPAError, one_line
from lopa_lightning.modules.optimizer_groups import with_rates
from lopa_lightning.modules.schedule import WarmUp, schedule


@dataclass(frozen=True)
class DryRun:
    """Holds an optimizer and a scheduler that have taken a step with small parameters.

    Attributes:
        parameters: One for each that is trained, by group; their sizes differ, so that state of their shape is known.
        optimizer: Over these.
        settings: The optimizer's groups, as they are without a scheduler.
        scheduler: Of the optimizer.
        evaluations: How often the optimizer computed the loss of its step.
    """

    parameters: dict[str, list[nn.Parameter]]
    optimizer: Optimizer
    settings: list[dict[str, Any]]
    scheduler: LRScheduler
    evaluations: int


def dry_run(
    groups: Mapping[str, list[nn.Parameter]],
    make_optimizer: OptimizerCallable,
    make_scheduler: LRSchedulerCallable | None = None,
    rates: Mapping[str, float] | None = None,
    warmup: float = 0.0,
    device: torch.device | None = None,
) -> DryRun:
    """Builds optimizer and scheduler and takes a step, so that they refuse now what they would later.

    Args:
        groups: Parameters by group. Their number, dimensions and dtypes count.
        make_optimizer: Still wants parameters.
        make_scheduler: Still wants an optimizer; None for none.
        rates: Learning rates by group.
        warmup: Steps, or below 1 a share of the run.
        device: The run's, which some optimizers need.

    Raises:
        LoPAError: If either refuses its options, or what is trained.

    Example:
        >>> import functools
        >>> dry_run({"head": [nn.Parameter(torch.ones(3))]}, functools.partial(torch.optim.SGD, lr=-1))
        Traceback (most recent call last):
        ...
        lopa_lightning.errors.LoPAError: optimizer: Invalid learning rate: -1
    """
    small = {
        name: [nn.Parameter(torch.zeros([*range(2, 2 + p.ndim)], dtype=p.dtype, device=device)) for p in parameters]
        for name, parameters in groups.items()
    }
    losses: list[float] = []

    def closure() -> float:
        for parameter in itertools.chain(*small.values()):
            parameter.grad = parameter.detach() - 1
        losses.append(1.0 / (1 + len(losses)))
        return losses[-1]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run itself says them
        with _named("optimizer"):
            optimizer = make_optimizer(with_rates(small, rates or {}))
            settings = optimizer.state_dict()["param_groups"]
            optimizer.step(closure=closure)
        with _named("lr_scheduler"):
            scheduler = schedule(optimizer, make_scheduler, warmup)["scheduler"]
            then = scheduler.then if isinstance(scheduler, WarmUp) else scheduler
            if then is not None:
                then.step(1.0) if isinstance(then, ReduceLROnPlateau) else then.step()
    return DryRun(small, optimizer, settings, scheduler, len(losses))


def dry_run_of(module: Any) -> DryRun:
    """Takes a dry run for what a module trains.

    Args:
        module: With its Trainer; no weights are needed.

    Raises:
        LoPAError: If its optimizer or scheduler refuses.
    """
    groups = (module.net or module.shapes).parameter_groups()
    make, rates, device = module.make_optimizer, module.learning_rates, module.trainer.strategy.root_device
    return dry_run(groups, make, module.make_lr_scheduler, rates, module.warmup, device)


def check_optimization(module: Any) -> LRScheduler:
    """Refuses an optimizer or scheduler that does not take what a module trains, or its batches for a step.

    Args:
        module: With its Trainer; no weights are needed.

    Returns:
        The scheduler, of an optimizer that is thrown away.

    Raises:
        LoPAError: If it does not.
    """
    accumulated, found = module.trainer.accumulate_grad_batches, dry_run_of(module)
    if accumulated > 1 and found.evaluations > 1:
        raise LoPAError(
            "trainer.accumulate_grad_batches must be 1 with an optimizer that computes the loss of a step several "
            f"times, of its last batch alone; got {accumulated}"
        )
    return found.scheduler


@contextmanager
def _named(option: str) -> Iterator[None]:
    """Names the option whose class, of torch or another library, raises an error in the block."""
    try:
        yield
    except LoPAError:
        raise
    except Exception as error:
        raise LoPAError(f"{option}: {one_line(error)}") from error

"""Learning rate schedules: warm-up before any of torch's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch.cli import LRSchedulerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LinearLR, ReduceLROnPlateau, SequentialLR

from lopa_lightning.errors import LoPAError


def with_rates(groups: Mapping[str, list[nn.Parameter]], rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """Parameter groups as an optimizer takes them.

    Args:
        groups: Trained parameters by group.
        rates: Learning rates by group, over the optimizer's own. One for a group that is not trained
            here has no effect, which is said.
    """
    if unused := sorted(set(rates) - set(groups)):
        rank_zero_warn(f"learning_rates has no effect for {', '.join(unused)}; trained are {', '.join(groups)}")
    return [
        {"name": name, "params": params, **({"lr": rates[name]} if name in rates else {})}
        for name, params in groups.items()
    ]


def warmup_steps(warmup: float, total: Callable[[], float]) -> int:
    """Optimizer steps of warm-up.

    Args:
        warmup: Steps, or below 1 a share of the run.
        total: Gives the optimizer steps of the whole run; asked only for a share.

    Raises:
        LoPAError: If a share is asked of a run without an end.
    """
    if warmup >= 1 or warmup == 0:
        return int(warmup)
    steps = total()
    if steps == float("inf"):
        raise LoPAError(f"warmup {warmup} is a share of a run that has no end; give steps, or max_epochs or max_steps")
    return round(warmup * steps)


def with_warmup(optimizer: Optimizer, make_scheduler: LRSchedulerCallable | None, steps: int) -> dict[str, Any] | None:
    """Builds what Lightning is told of the schedule.

    Args:
        optimizer: Its groups' learning rates are the ones after warm-up.
        make_scheduler: A scheduler that still wants the optimizer; None for a constant rate.
        steps: Optimizer steps over which rates rise linearly, from 1 / (steps + 1) of their value.

    Returns:
        Lightning's scheduler config, or None if the rate is constant from the first step.

    Raises:
        LoPAError: If a warm-up is to precede a ``ReduceLROnPlateau``, which is not stepped by count.
    """
    scheduler = make_scheduler(optimizer) if make_scheduler is not None else None
    if isinstance(scheduler, ReduceLROnPlateau):
        if steps:
            raise LoPAError("warmup cannot precede ReduceLROnPlateau; set warmup: 0 or choose another lr_scheduler")
        return {"scheduler": scheduler, "monitor": getattr(scheduler, "monitor", "val/loss")}
    if steps:
        rise = LinearLR(optimizer, start_factor=1 / (steps + 1), total_iters=steps)
        scheduler = rise if scheduler is None else SequentialLR(optimizer, [rise, scheduler], milestones=[steps])
    return None if scheduler is None else {"scheduler": scheduler, "interval": "step"}

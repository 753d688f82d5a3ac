"""Builds learning rate schedules: a warm-up before any of torch's own."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LRSchedulerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lopa_lightning.errors import LoPAError


def with_rates(groups: Mapping[str, list[nn.Parameter]], rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """Returns parameter groups as an optimizer takes them.

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


def check_warmup(warmup: float, trainer: Trainer) -> None:
    """Refuses a warm-up that has no length.

    Args:
        warmup: Steps, or below 1 a share of the run.
        trainer: Of the run.

    Raises:
        LoPAError: If it is a share of a run without an end.
    """
    if 0 < warmup < 1 and trainer.max_epochs == -1 and trainer.max_steps == -1:
        raise LoPAError(f"warmup {warmup} is a share of a run that has no end; give steps, or max_epochs or max_steps")


def warmup_steps(warmup: float, steps: float) -> int:
    """Returns the length of a warm-up in steps.

    Args:
        warmup: Steps, or below 1 a share of the run.
        steps: Of the run.
    """
    return round(warmup * steps if 0 < warmup < 1 else warmup)


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


class WarmUp(LRScheduler):
    """Raises learning rates linearly, and leaves them to another scheduler when they have their full value.

    Over how many steps is known when training starts: a share of a run takes the number of its batches, and the
    data must not be set up before Lightning has restored how far a resumed run had come. A resumed run has the
    number of steps, as all of its state, from its checkpoint.

    Args:
        optimizer: Its groups' learning rates are the ones after warm-up.
        then: The other scheduler, of the same optimizer; None for a constant rate.

    Attributes:
        steps: Optimizer steps over which rates rise, from 1 / (steps + 1) of their value; None before :meth:`begin`.
    """

    def __init__(self, optimizer: Optimizer, then: LRScheduler | None = None) -> None:
        self.then = then
        self.steps: int | None = None
        self._full = [float(group["lr"]) for group in optimizer.param_groups]
        super().__init__(optimizer)

    def begin(self, steps: int) -> None:
        """Starts the warm-up.

        Args:
            steps: Its length.
        """
        self.steps = steps
        super().__init__(self.optimizer)  # sets the rates of the first step

    def get_lr(self) -> list[Any]:
        """Returns the rates of the step to come, by group."""
        if self.steps is None or self.last_epoch > self.steps:
            return [group["lr"] for group in self.optimizer.param_groups]
        return [rate * ((self.last_epoch + 1) / (self.steps + 1)) for rate in self._full]

    def step(self, epoch: int | None = None) -> None:
        """Sets the rates of the next step.

        Args:
            epoch: Not used; torch's signature.
        """
        if self.then is None or self.steps is None or self.last_epoch < self.steps:
            super().step()
        else:
            self.last_epoch += 1
            self.then.step()
            self._last_lr = self.then.get_last_lr()

    def state_dict(self) -> dict[str, Any]:
        """Returns the state as plain data, with that of the scheduler that follows."""
        then = None if self.then is None else self.then.state_dict()
        return {**super().state_dict(), "then": then}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes a state, also one of torch's own schedulers, which earlier checkpoints hold.

        Args:
            state_dict: Of this class, or of what warmed up in its stead: a ``LinearLR``, a ``SequentialLR`` of it and
                another, or the other alone where there was no warm-up.
        """
        state = dict(state_dict)
        if "then" not in state:
            state = self._of_torch(state)
        then = state.pop("then")
        super().load_state_dict(state)
        if self.then is not None and then is not None:
            self.then.load_state_dict(then)

    def _of_torch(self, state: dict[str, Any]) -> dict[str, Any]:
        if "_milestones" in state:
            linear, then = state["_schedulers"]
            then = {**then, "last_epoch": max(0, then["last_epoch"])}
        else:
            linear, then = ({"total_iters": 0}, state) if self.then is not None else (state, None)
        kept = {name: state[name] for name in ("last_epoch", "_last_lr")}
        return {**kept, "steps": linear["total_iters"], "then": then}


def schedule(optimizer: Optimizer, make_scheduler: LRSchedulerCallable | None, warmup: float) -> dict[str, Any]:
    """Builds the scheduler config that Lightning wants; the callback ``Scheduling`` begins its warm-up.

    Args:
        optimizer: Its groups' learning rates are the ones after warm-up.
        make_scheduler: A scheduler that still wants the optimizer; None for a constant rate.
        warmup: Steps, or below 1 a share of the run.

    Raises:
        LoPAError: If a warm-up is to precede a ``ReduceLROnPlateau``, which is not stepped by count.
    """
    then = None if make_scheduler is None else make_scheduler(optimizer)
    if not isinstance(then, ReduceLROnPlateau):
        return {"scheduler": WarmUp(optimizer, then), "interval": "step"}
    if warmup:
        raise LoPAError("warmup cannot precede ReduceLROnPlateau; set warmup: 0 or choose another lr_scheduler")
    # Lightning would step it after the epoch's checkpoints are saved, and not at all in a run that is resumed there.
    never = {"interval": "epoch", "frequency": sys.maxsize, "reduce_on_plateau": False}
    return {"scheduler": then, "monitor": monitored(then), **never}


def monitored(scheduler: LRScheduler) -> str | None:
    """Returns the name of the metric that a scheduler goes by; None for one that goes by steps."""
    return getattr(scheduler, "monitor", "val/loss") if isinstance(scheduler, ReduceLROnPlateau) else None

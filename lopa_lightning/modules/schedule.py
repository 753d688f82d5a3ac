"""Builds learning rate schedules: a warm-up before a cosine over the run, or any of torch's own."""

from __future__ import annotations

import math
import sys
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LRSchedulerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lopa_lightning.errors import LoPAError


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


def check_cosine(scheduler: LRScheduler, trainer: Trainer) -> None:
    """Refuses a cosine that has no length.

    Args:
        scheduler: From :func:`schedule`.
        trainer: Of the run.

    Raises:
        LoPAError: If it is over a run without an end.
    """
    is_cosine = isinstance(getattr(scheduler, "then", None), CosineDecay)
    if is_cosine and trainer.max_epochs == -1 and trainer.max_steps == -1:
        raise LoPAError("lr_scheduler: CosineDecay is over a run that has no end; give max_epochs or max_steps")


def steps_of_run(trainer: Trainer) -> int:
    """Returns the optimizer steps of a run from its start, whether or not it is resumed.

    Args:
        trainer: Whose training has started: Lightning would set up its data, and before it has restored how far a
            resumed run had come that run would start its epoch again.

    Raises:
        LoPAError: If that is not known.
    """
    steps = trainer.estimated_stepping_batches
    if not 0 < steps < math.inf:  # Lightning says -1 of a loader without a length
        raise LoPAError("the length of the run, which warmup or lr_scheduler need, is not known: give max_steps")
    return int(steps)


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


class CosineDecay(LRScheduler):
    """Lowers learning rates by half a cosine (Loshchilov & Hutter 2017), from the end of the warm-up to the run's end.

    Step k, from 0, of the n that follow the warm-up has s + (1 - s) * 0.5 * (1 + cos(pi * k / n)) of its group's rate,
    where s is ``min_lr_rate``. A resumed run has n, as all of the state, from its checkpoint.

    Args:
        optimizer: Its groups' learning rates are the ones before.
        min_lr_rate: Share of the rates that is left at the end; named as transformers names it.

    Attributes:
        steps: n; 0 before :meth:`WarmUp.begin`.

    Raises:
        LoPAError: If that is no share.
    """

    short_name = "cosine"

    def __init__(self, optimizer: Optimizer, min_lr_rate: float = 0.0) -> None:
        if not 0 <= min_lr_rate <= 1:
            raise LoPAError(f"lr_scheduler: min_lr_rate must be from 0 to 1, got {min_lr_rate}")
        self.min_lr_rate = min_lr_rate
        self.steps = 0
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        """Returns the rates of the step to come, by group."""
        done = min(1.0, self.last_epoch / self.steps) if self.steps else 0.0
        share = self.min_lr_rate + (1 - self.min_lr_rate) * 0.5 * (1 + math.cos(math.pi * done))
        return [rate * share for rate in self.base_lrs]


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

    def begin(self, steps: int, of: int = 0) -> None:
        """Starts the warm-up.

        Args:
            steps: Its length.
            of: The run's, for a :class:`CosineDecay` that follows.
        """
        self.steps = steps
        if isinstance(self.then, CosineDecay):
            self.then.steps = max(1, of - steps)
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
        LoPAError: If a warm-up is to precede a ``ReduceLROnPlateau``, which is not stepped by count; or if the
            scheduler gives groups of unlike rates one.
    """
    rates = {str(group["name"]): group["lr"] for group in optimizer.param_groups}
    then = None if make_scheduler is None else make_scheduler(optimizer)
    peaks = {group.get("max_lr") for group in optimizer.param_groups}
    if len(peaks) == 1 and None not in peaks and len({*rates.values()}) > 1:
        raise LoPAError(
            f"{type(then).__name__} sets the rates of all groups to max_lr {peaks.pop()}, not to learning_rates: give "
            f"max_lr a list with a rate for each of {', '.join(rates)}, or learning_rates that are alike"
        )
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

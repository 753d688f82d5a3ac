"""Compares the state that a checkpoint holds of a run with what this run would itself write, before it is restored."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from math import isfinite
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lopa_lightning.errors import LoPAError, one_line, shown
from lopa_lightning.modules.schedule import WarmUp, schedule, with_rates
from lopa_lightning.plain import built

if TYPE_CHECKING:
    from lopa_lightning.modules.base import LoPALightningModule


def check_state(saved: dict[str, Any], module: LoPALightningModule, stage: str, has_schedule: bool = True) -> None:
    """Refuses state that this run could not have written; in place, leaves of a scheduler's what the scheduler knows.

    Args:
        saved: The checkpoint.
        module: With its Trainer; it need not have weights.
        stage: ``fit``, ``validate``, ``test`` or ``predict``.
        has_schedule: Whether the checkpoint's run had a schedule of learning rates.

    Raises:
        LoPAError: If it does not fit, or torch refuses it.
    """
    try:
        _check_progress(saved, module.trainer, stage)
        # Other strategies have an optimizer state of their own form; a module's own optimizers have no twin here.
        is_ours = type(module).configure_optimizers.__module__ == "lopa_lightning.modules.base"
        if stage == "fit" and is_ours and module.trainer.strategy.lightning_restore_optimizer:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # said of the run's own
                _check_optimization(saved, module, has_schedule)
    except Exception as error:  # torch raises whatever a foreign state makes it stumble over
        message = str(error) if isinstance(error, LoPAError) else one_line(error)
        raise LoPAError(f"the checkpoint cannot be resumed: {message}") from error


def _check_progress(saved: Mapping[str, Any], trainer: Any, stage: str) -> None:
    is_fit = stage == "fit"
    if is_fit:
        fitted(saved, {"epoch": 0, "global_step": 0, "loops": {}}, "state")
    loop = {**getattr(trainer, f"{stage}_loop").state_dict(), "state_dict": {}}
    found = fitted(saved.get("loops", {}), {f"{stage}_loop": loop}, "loops", is_fit)
    loaders = found.get(f"{stage}_loop", {}).get("state_dict", {}).get("combined_loader", [])
    for state in built(loaders, list[dict[str, Any]], "combined_loader"):
        fitted(state, {"batches": 0} if state.get("batches") is not None else {}, "combined_loader")
    for callback in trainer.callbacks:
        state = saved.get("callbacks", {}).get(callback.state_key)
        if state is not None and type(callback).__module__.partition(".")[0] in ("lopa_lightning", "lightning"):
            fitted(state, callback.state_dict(), f"callbacks.{type(callback).__name__}", False)


def _check_optimization(saved: dict[str, Any], module: LoPALightningModule, has_schedule: bool) -> None:
    """Tries the state on an optimizer and a scheduler of tiny parameters, one for each trained parameter."""
    groups = (module.net or module.meta_net()).parameter_groups()
    # Of dimensions that differ, which tell the state that has a parameter's shape from other state.
    tiny = {
        name: [nn.Parameter(torch.zeros(tuple(range(2, 2 + p.ndim)), dtype=p.dtype)) for p in parameters]
        for name, parameters in groups.items()
    }
    optimizer = module.make_optimizer(with_rates(tiny, module.learning_rates))
    fresh = [{"state": {}, "param_groups": optimizer.state_dict()["param_groups"]}]
    scheduler = schedule(optimizer, module.make_lr_scheduler, module.warmup)["scheduler"]
    (state,) = fitted(saved.get("optimizer_states"), fresh, "optimizer_states")
    own = _stepped(optimizer, state["param_groups"])
    if saved["global_step"]:
        ids = [index for group in state["param_groups"] for index in group["params"]]
        of_all = [p for parameters in groups.values() for p in parameters]
        entries = {ids[index]: _shaped(entry, of_all[index]) for index, entry in own.items()}
        fitted(state["state"], entries, "optimizer_states.0.state")
    if saved.get("lr_schedulers") or has_schedule:
        (state,) = fitted(saved.get("lr_schedulers"), [{}], "lr_schedulers")
        saved["lr_schedulers"] = [_known(state, scheduler)]


def _stepped(optimizer: Optimizer, groups: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The state by parameter after a step with a checkpoint's settings."""
    optimizer.load_state_dict({"state": {}, "param_groups": groups})
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step(lambda: 0.0)
    state: dict[int, dict[str, Any]] = optimizer.state_dict()["state"]
    return state


def _shaped(entry: Mapping[str, Any], parameter: Tensor) -> dict[str, Any]:
    """A tiny parameter's state with the shapes of a whole one's."""
    tiny = tuple(range(2, 2 + parameter.ndim))
    is_whole = {name: isinstance(value, Tensor) and value.ndim and value.shape == tiny for name, value in entry.items()}
    return {
        name: torch.empty(parameter.shape, dtype=value.dtype, device="meta") if is_whole[name] else value
        for name, value in entry.items()
    }


def _known(state: dict[str, Any], scheduler: LRScheduler) -> Any:
    """What a scheduler knows of a state; it would make any other entry an attribute."""
    fresh = copy.deepcopy(scheduler.state_dict())
    if "then" in state or not isinstance(scheduler, WarmUp):  # else of torch's own, which is read by another way
        fitted(state, fresh, "lr_schedulers.0")
    scheduler.load_state_dict(copy.deepcopy(state))
    return fitted(scheduler.state_dict(), fresh, "lr_schedulers.0")


def fitted(saved: Any, fresh: Any, name: str, is_strict: bool = True) -> Any:
    """Returns of a saved state what a fresh one has too.

    Args:
        saved: Nested data and tensors, of a checkpoint.
        fresh: The same of this run. An empty mapping is for any content. Of a tensor on the meta device the shape
            counts, of another the number of its dimensions.
        name: Of the state, for messages.
        is_strict: Whether entries may be missing that are no flags, which releases of torch add, and whether numbers
            must be finite, and not negative where the fresh ones are not.

    Raises:
        LoPAError: If it is not built alike.

    Example:
        >>> fitted({"lr": 0.1, "get_lr": "x"}, {"lr": 0.3, "fused": None}, "group")
        {'lr': 0.1}
        >>> fitted({"lr": -0.1}, {"lr": 0.3}, "group")
        Traceback (most recent call last):
        ...
        lopa_lightning.errors.LoPAError: group.lr is -0.1, where this run has 0.3
    """
    if fresh == {} and isinstance(saved, Mapping):
        return saved
    if isinstance(fresh, Mapping) and isinstance(saved, Mapping) and saved:
        needed = [key for key, value in fresh.items() if isinstance(key, str) and not isinstance(value, bool | None)]
        if is_strict and (lacking := [key for key in needed if key not in saved]):
            raise LoPAError(f"{name} lacks {', '.join(lacking)}")
        return {key: fitted(saved[key], fresh[key], f"{name}.{key}", is_strict) for key in fresh if key in saved}
    if isinstance(fresh, list | tuple) and isinstance(saved, list | tuple) and len(fresh) == len(saved):
        return [fitted(one, fresh[index], f"{name}.{index}", is_strict) for index, one in enumerate(saved)]
    if not _is_like(saved, fresh, is_strict):
        got, here = (f"a tensor {tuple(x.shape)}" if isinstance(x, Tensor) and x.ndim else x for x in (saved, fresh))
        raise LoPAError(f"{name} is {shown(got, str)}, where this run has {shown(here, str)}")
    return saved


def _is_like(saved: Any, fresh: Any, is_strict: bool) -> bool:
    if isinstance(fresh, Tensor) and fresh.ndim:
        if not isinstance(saved, Tensor) or saved.ndim != fresh.ndim or (fresh.is_meta and saved.shape != fresh.shape):
            return False
        return bool(saved.to(fresh.dtype).isfinite().all())
    was, now = (each.item() if isinstance(each, Tensor) and not each.ndim else each for each in (saved, fresh))
    if (was is None or now is None) and not is_strict:
        return True
    if now is None or isinstance(now, bool):
        return was is None or isinstance(was, bool) or (now is None and isinstance(was, int | float))
    if not isinstance(now, int | float):
        return type(was) is type(now) and not isinstance(now, Mapping | list | tuple)
    if not isinstance(was, int | float) or isinstance(was, bool):
        return False
    return not (is_strict and isfinite(now)) or (isfinite(was) and (was >= 0 or now < 0))

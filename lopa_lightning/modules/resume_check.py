"""Compares the state that a checkpoint holds of a run with what this run would itself write, before it is restored."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from itertools import chain
from math import isfinite
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lopa_lightning import checkpoint as ckpt
from lopa_lightning.errors import LoPAError, one_line, shown
from lopa_lightning.modules.dry_run import dry_run_of
from lopa_lightning.modules.schedule import WarmUp
from lopa_lightning.plain import built, defaults, find_class, with_arguments, with_defaults

if TYPE_CHECKING:
    from lopa_lightning.modules.base import LoPALightningModule

_BUILT: dict[str, type] = {"optimizer": Optimizer, "lr_scheduler": LRScheduler}
_BY_GROUP = "optimizers."
_LOSSES = ("loss_over", "instance_loss")


def check_resume(saved: dict[str, Any], module: LoPALightningModule, stage: str) -> None:
    """Checks what Lightning restores, and warns of what of a training run is not continued as it was configured.

    Args:
        saved: The checkpoint.
        module: The module that is to go on, with its Trainer.
        stage: ``fit``, ``validate``, ``test`` or ``predict``.

    Raises:
        LoPAError: See :func:`check_restored`.
    """
    check_restored(saved, module, stage)
    if stage != "fit":
        return
    if lines := ckpt.differences(_settings(saved[ckpt.HYPERPARAMETERS]), _settings(module.hparams)):
        rank_zero_warn(f"a resumed run keeps the checkpoint's optimizer settings: {ckpt.joined(lines)}")
    both = _whole(saved[ckpt.HYPERPARAMETERS]), _whole(module.hparams)
    was, now = ({key: each.get(key) for key in _LOSSES} for each in both)
    if lines := ckpt.differences(was, now):
        rank_zero_warn(f"the resumed run is trained by another loss from here on: {ckpt.joined(lines)}")
    loop, accumulated = saved["loops"]["fit_loop"], module.trainer.accumulate_grad_batches
    progress = loop["epoch_loop.batch_progress"]
    if progress.get("is_last_batch", True):
        return
    done = progress["current"]["processed"]
    if not loop.get("state_dict", {}).get("combined_loader"):
        rank_zero_warn(
            f"the checkpoint was saved within an epoch, after {done} batches: the rest of "
            "that epoch is drawn from its start again. Resume from the end of an epoch (last.ckpt) to continue exactly."
        )
    if done % accumulated:
        rank_zero_warn(
            f"the checkpoint was saved after {done} batches of an epoch, and a step accumulates {accumulated}: the "
            f"first step has {accumulated - done % accumulated}"
        )


def check_restored(saved: dict[str, Any], module: LoPALightningModule, stage: str) -> None:
    """Refuses state that this run could not have written.

    It changes the checkpoint in place: of a scheduler's state it keeps what the scheduler knows.

    Args:
        saved: The checkpoint.
        module: The module that is to go on, with its Trainer; it need not have weights.
        stage: ``fit``, ``validate``, ``test`` or ``predict``.

    Raises:
        LoPAError: If the checkpoint holds the state of another optimizer or scheduler, or one that no run writes, or
            torch refuses it.
    """
    if stage == "fit":
        if "loops" not in saved:
            raise LoPAError("a bundle holds no state of training; go on from the checkpoint that it was exported from")
        old, new = _settings(saved[ckpt.HYPERPARAMETERS]), _settings(module.hparams)
        for key in [each for each in {**old, **new} if each in _BUILT or each.startswith(_BY_GROUP)]:
            was, now = ((settings.get(key) or {}).get("class_path") for settings in (old, new))
            if was != now:
                raise LoPAError(f"the checkpoint holds the state of {key} {was}, this run has {now}; start a new run")
    # Some strategies have an optimizer state of their own form; a module's own optimizers are not known here.
    is_ours = type(module).configure_optimizers.__module__ == "lopa_lightning.modules.base"
    try:
        _check_progress(saved, module.trainer, stage)
        if stage == "fit" and is_ours and module.trainer.strategy.lightning_restore_optimizer:
            _check_optimization(saved, module)
    except Exception as error:  # torch raises whatever a foreign state makes it stumble over
        raise LoPAError(f"the checkpoint cannot be resumed: {one_line(error)}") from error


def _whole(hparams: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns hyperparameters with the defaults of their class, where it is known."""
    with contextlib.suppress(LoPAError):
        return {**defaults(find_class(hparams.get("_class_path"), LightningModule)), **hparams}
    return hparams


def _settings(hparams: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of training with their defaults; classes by bare name, wherever they are imported from."""
    hparams = _whole(hparams)
    found = {key: hparams.get(key) for key in ("learning_rates", "warmup")}
    by_group = hparams.get("optimizers")
    by_group = {f"{_BY_GROUP}{name}": spec for name, spec in by_group.items()} if isinstance(by_group, Mapping) else {}
    for key, given in {**{key: hparams.get(key) for key in _BUILT}, **by_group}.items():
        spec = with_arguments(given, with_defaults, _BUILT.get(key, Optimizer))
        named = isinstance(spec, Mapping) and "class_path" in spec
        found[key] = {**spec, "class_path": str(spec["class_path"]).rpartition(".")[2]} if named else None
    return found


def _check_progress(saved: Mapping[str, Any], trainer: Any, stage: str) -> None:
    loop = {**getattr(trainer, f"{stage}_loop").state_dict(), "state_dict": {}}
    fresh = {"epoch": 0, "global_step": 0, "loops": {f"{stage}_loop": loop}}
    fitted(saved, fresh, "state", is_strict=stage == "fit")
    if stage == "fit":
        loaders = saved["loops"]["fit_loop"]["state_dict"].get("combined_loader", [])
        for each in built(loaders, list[dict[str, Any]], "combined_loader"):
            fitted(each.get("batches") or 0, 0, "combined_loader.batches")
    states = saved.get("callbacks", {})
    for callback in [each for each in trainer.callbacks if each.state_key in states]:
        state, keeps_files = states[callback.state_key], isinstance(callback, ModelCheckpoint)
        # A user's own may have a state that is built in another way every time.
        if keeps_files or type(callback).__module__.startswith(("lopa_lightning.", "lightning.")):
            fitted(state, callback.state_dict(), f"callbacks.{type(callback).__name__}", is_strict=False)
        if keeps_files and trainer.ckpt_path and not _names_own(state, callback, trainer.ckpt_path):
            states[callback.state_key] = callback.state_dict()


def _names_own(state: Mapping[str, Any], callback: ModelCheckpoint, resumed: Any) -> bool:
    """Returns whether a state names only checkpoints beside the resumed one, under names that the callback gives.

    Lightning removes them for better ones, and whose they are is the file's word alone.
    """
    best = state.get("best_k_models") or {}
    named = [*best, *(state.get(f"{kind}_path") for kind in ("best_model", "kth_best_model", "last_model"))]
    given = (callback.filename or "{epoch}-{step}", callback.CHECKPOINT_NAME_LAST)
    pattern = "|".join(".*".join(map(re.escape, re.split(r"\{.*?\}", each))) for each in given)
    pattern = rf"({pattern})(-v\d+)?{re.escape(callback.FILE_EXTENSION)}"
    folder = os.path.realpath(os.path.dirname(resumed))
    return all(isinstance(score, Tensor | float) for score in best.values()) and all(
        os.path.realpath(os.path.dirname(str(path))) == folder and re.fullmatch(pattern, os.path.basename(str(path)))
        for path in named
        if path
    )


def _check_optimization(saved: dict[str, Any], module: LoPALightningModule) -> None:
    """Tries the state on the optimizer and the scheduler of a dry run."""
    trained = [p for group in (module.net or module.shapes).parameter_groups().values() for p in group]
    tried = dry_run_of(module)
    optimizer, scheduler = tried.optimizer, tried.scheduler
    fresh: Any = [{"state": {}, "param_groups": tried.settings}]
    (state,) = fitted(saved.get("optimizer_states"), fresh, "optimizer_states")
    optimizer.load_state_dict({"state": {}, "param_groups": state["param_groups"]})
    pairs = [*zip(chain(*tried.parameters.values()), trained, strict=True)]
    optimizer.step(lambda: 0.0)
    ids = [index for group in state["param_groups"] for index in group["params"]]
    entries = {
        ids[index]: {
            key: torch.empty_like(pairs[index][1], dtype=value.dtype, device="meta")
            if getattr(value, "shape", None) == pairs[index][0].shape
            else value
            for key, value in entry.items()
        }
        for index, entry in optimizer.state_dict()["state"].items()
    }
    if saved["global_step"]:
        fitted(state["state"], entries, "optimizer_states.0.state")
    settings = _settings(saved[ckpt.HYPERPARAMETERS])
    if saved.get("lr_schedulers") or settings["warmup"] or settings["lr_scheduler"]:
        (state,) = fitted(saved.get("lr_schedulers"), [{}], "lr_schedulers")
        fresh = scheduler.state_dict()
        if "then" in state or not isinstance(scheduler, WarmUp):  # else torch's own, which WarmUp translates
            fitted(state, fresh, "lr_schedulers.0")
        scheduler.load_state_dict(state)
        # Anything else would become an attribute, a method's name as well.
        saved["lr_schedulers"] = [fitted(scheduler.state_dict(), fresh, "lr_schedulers.0")]


def fitted(saved: Any, fresh: Any, name: str, is_strict: bool = True) -> Any:
    """Returns the part of a saved state that a fresh one has too.

    Args:
        saved: Nested data and tensors, of a checkpoint.
        fresh: The same of this run. An empty mapping or list is for any content. Of a tensor on the meta device the
            shape counts, of another the number of its dimensions.
        name: Of the state, for messages.
        is_strict: Whether entries may be missing that are no flags, which releases of torch add, and whether numbers
            must be finite, and not negative where the fresh ones are not.

    Raises:
        LoPAError: If it is not built alike.

    Example:
        >>> fitted({"history": [0.5]}, {"history": []}, "callback")
        {'history': [0.5]}
        >>> fitted({"lr": 0.1, "get_lr": "x"}, {"lr": 0.3, "fused": None}, "group")
        {'lr': 0.1}
        >>> fitted({"lr": -0.1}, {"lr": 0.3}, "group")
        Traceback (most recent call last):
        ...
        lopa_lightning.errors.LoPAError: group.lr is -0.1, where this run has 0.3
    """
    if (fresh == {} and isinstance(saved, Mapping)) or (fresh == [] and isinstance(saved, list)):
        return saved
    if isinstance(fresh, Mapping) and isinstance(saved, Mapping) and saved:
        needed = [key for key, value in fresh.items() if isinstance(key, str) and not isinstance(value, bool | None)]
        if is_strict and (lacking := [key for key in needed if key not in saved]):
            raise LoPAError(f"{name} lacks {', '.join(lacking)}")
        return {key: fitted(saved[key], fresh[key], f"{name}.{key}", is_strict) for key in fresh if key in saved}
    if isinstance(fresh, list | tuple) and isinstance(saved, list | tuple) and len(fresh) == len(saved):
        return [fitted(one, fresh[index], f"{name}.{index}", is_strict) for index, one in enumerate(saved)]
    if not _is_like(saved, fresh, is_strict):
        got, here = (
            f"a tensor {tuple(x.shape)}" if isinstance(x, Tensor) and x.ndim else shown(x) for x in (saved, fresh)
        )
        raise LoPAError(
            f"{name} is {got}, where this run has {shown(list(fresh)) if isinstance(fresh, Mapping) else here}"
        )
    return saved


def _is_like(saved: Any, fresh: Any, is_strict: bool) -> bool:
    if isinstance(fresh, Tensor) and (fresh.ndim or fresh.is_meta):
        if not isinstance(saved, Tensor) or saved.ndim != fresh.ndim or (fresh.is_meta and saved.shape != fresh.shape):
            return False
        return bool(saved.to(fresh.dtype).isfinite().all())
    was, now = (each.item() if isinstance(each, Tensor) and not each.ndim else each for each in (saved, fresh))
    if now is None or isinstance(now, bool):
        return not is_strict or isinstance(was, int | float | None)
    if isinstance(now, int | float) and isinstance(was, int | float):
        return not is_strict or not isfinite(now) or (isfinite(was) and (was >= 0 or now < 0))
    return (was is None and not is_strict) or type(was) is type(now) is str

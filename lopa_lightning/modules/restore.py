"""Modules from checkpoints: rebuilt from one alone, or continued in training."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning.pytorch.cli import instantiate_module
from lightning.pytorch.utilities import rank_zero_warn

from lopa_lightning import checkpoint as ckpt
from lopa_lightning.errors import LoPAError

if TYPE_CHECKING:
    from lopa_lightning.modules.base import LoPALightningModule

_HYPERPARAMETERS = "hyper_parameters"
_OF_TRAINING = ("optimizer", "lr_scheduler", "learning_rates", "warmup")


def rebuild(
    cls: type[LoPALightningModule], path: Any, map_location: Any, overrides: Mapping[str, Any]
) -> LoPALightningModule:
    """Rebuilds a module from a checkpoint; the frozen models are loaded by the names in it.

    Args:
        cls: The class asked for; the checkpoint's own may be a subclass.
        path: The ``.ckpt`` file.
        map_location: See ``torch.load``.
        overrides: Hyperparameters to use in place of the checkpoint's.

    Raises:
        LoPAError: If the checkpoint does not fit.
    """
    saved = ckpt.read(path, map_location)
    hparams = saved.get(_HYPERPARAMETERS, {})
    made_by = _class_of(hparams.get("_class_path", ""), cls)
    if not issubclass(made_by, cls):
        raise LoPAError(f"{path} was made by {made_by.__qualname__}, which is no {cls.__qualname__}")
    accepted = _accepted(made_by, hparams)
    if unknown := sorted(set(overrides) - accepted):
        raise LoPAError(f"{made_by.__qualname__} takes no {', '.join(unknown)}; it takes {', '.join(sorted(accepted))}")
    arguments = {key: value for key, value in {**hparams, **ckpt.plain(overrides)}.items() if key in accepted}
    module: LoPALightningModule = instantiate_module(made_by, {"_class_path": ckpt.class_path(made_by), **arguments})
    module.restore(hparams)
    module.configure_model()
    module.on_load_checkpoint(saved)
    module.load_state_dict(saved["state_dict"])
    return module


def check_resume(saved: Mapping[str, Any], hparams: Mapping[str, Any]) -> None:
    """Says what of a training run is not continued as it was, or not as it is now configured.

    Args:
        saved: The checkpoint.
        hparams: Of the module that is to go on.

    Raises:
        LoPAError: If the checkpoint holds another optimizer's state.
    """
    before = saved.get(_HYPERPARAMETERS, {})
    old, new = ({key: _by_class_name(values.get(key)) for key in _OF_TRAINING} for values in (before, hparams))
    classes = [settings["optimizer"]["class_path"] for settings in (old, new) if settings["optimizer"]]
    if len(set(classes)) > 1:
        raise LoPAError(f"the checkpoint holds the state of {classes[0]}, this run has {classes[1]}; start a new run")
    if lines := ckpt.differences(old, new):
        rank_zero_warn("a resumed run keeps the checkpoint's optimizer settings:\n  " + "\n  ".join(lines))
    loop = saved.get("loops", {}).get("fit_loop", {})
    progress, has_place = loop.get("epoch_loop.batch_progress", {}), loop.get("state_dict", {}).get("combined_loader")
    if progress and not progress.get("is_last_batch", True) and not has_place:
        rank_zero_warn(
            f"the checkpoint was saved within an epoch, after {progress['current']['completed']} batches: the rest of "
            "that epoch is drawn from its start again. Resume from the end of an epoch (last.ckpt) to continue exactly."
        )


def _by_class_name(settings: Any) -> Any:
    """Settings with the class's bare name: ``torch.optim.AdamW`` is ``torch.optim.adamw.AdamW``."""
    if not isinstance(settings, Mapping) or "class_path" not in settings:
        return settings
    return {**settings, "class_path": settings["class_path"].rpartition(".")[2]}


def _accepted(cls: type[LoPALightningModule], hparams: Mapping[str, Any]) -> set[str]:
    """The saved hyperparameters that are arguments of the class itself, not ones that it sets for its base."""
    parameters = inspect.signature(cls).parameters.values()
    named = {parameter.name for parameter in parameters}
    takes_all = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    return {key for key in hparams if not key.startswith("_") and (takes_all or key in named)}


def _class_of(class_path: str, asked: type[LoPALightningModule]) -> type[LoPALightningModule]:
    """The class that made a checkpoint, looked up among what is imported: a file must not choose what to import."""
    from lopa_lightning.modules.base import LoPALightningModule

    module, _, name = class_path.rpartition(".")
    found = getattr(sys.modules.get(module), name, None)
    if isinstance(found, type) and issubclass(found, LoPALightningModule):
        return found
    if asked.__qualname__ == name:  # saved by a script of its own, loaded from a module
        return asked
    raise LoPAError(f"the checkpoint's class {class_path!r} is not a LoPALightningModule that is imported here")

"""Modules from checkpoints: rebuilt from one alone, or continued in training."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lopa_lightning import checkpoint as ckpt
from lopa_lightning.errors import LoPAError, shown
from lopa_lightning.modules.resume_state import check_state
from lopa_lightning.plain import arguments, built, defaults, find_class, with_arguments, with_defaults

if TYPE_CHECKING:
    from lopa_lightning.modules.base import LoPALightningModule

_BUILT: dict[str, type] = {"optimizer": Optimizer, "lr_scheduler": LRScheduler}
_ADAPTERS = ("adapter", "instance_encoder.adapter")
_ANY_SIZE = 4096
"""Sizes up to this one are harmless, whatever was trained."""


def rebuild(
    cls: type[LoPALightningModule],
    path: Any,
    map_location: Any,
    trust_remote_code: bool,
    overrides: Mapping[str, Any],
) -> LoPALightningModule:
    """Rebuilds a module from a checkpoint; the frozen models are loaded by the names in it.

    Args:
        cls: The class asked for; the checkpoint's own may be a subclass.
        path: The ``.ckpt`` file.
        map_location: See ``torch.load``.
        trust_remote_code: Whether models may run code of their own, where the checkpoint says that they do.
        overrides: Hyperparameters to use in place of the checkpoint's.

    Raises:
        LoPAError: If the checkpoint does not fit.
    """
    return rebuilt(cls, ckpt.read(path, map_location), shown(str(path)), trust_remote_code, overrides)


def rebuilt(
    cls: type[LoPALightningModule],
    saved: dict[str, Any],
    name: str,
    trust_remote_code: bool,
    overrides: Mapping[str, Any],
) -> LoPALightningModule:
    """Rebuilds a module from what was read of a checkpoint.

    Args:
        cls: The class asked for; the checkpoint's own may be a subclass.
        saved: The checkpoint.
        name: What it is called in messages.
        trust_remote_code: Whether models may run code of their own, where the checkpoint says that they do.
        overrides: Hyperparameters to use in place of the checkpoint's.

    Raises:
        LoPAError: If the checkpoint does not fit.
    """
    try:
        module = _unloaded(cls, saved, trust_remote_code, overrides)
    except LoPAError as error:
        message = "".join(each if each.isprintable() else repr(each)[1:-1] for each in str(error))
        raise LoPAError(f"{name}: {message}") from error
    except Exception as error:  # whatever a class makes of arguments that it was never saved with
        raise LoPAError(f"{name}: no module can be built from it: {shown(error)}") from error
    models = {"backbone": module.backbone_spec.name, "instance_encoder": module.instance_spec.name}
    if named := [f"{key} {name!r}" for key, name in models.items() if key not in overrides]:
        rank_zero_info(f"Loading the models that {name} names: {', '.join(named)}")
    module.configure_model()
    module.on_load_checkpoint(saved)
    module.load_state_dict(saved["state_dict"])
    return module.eval()


def _unloaded(
    asked: type[LoPALightningModule], saved: Mapping[str, Any], trust_remote_code: bool, overrides: Mapping[str, Any]
) -> LoPALightningModule:
    """The module of a checkpoint that fits to what the file says beside, before any model is read."""
    module = constructed(asked, saved, trust_remote_code, overrides)
    ckpt.check_identity(saved[ckpt.IDENTITY_KEY], module.known_identity(), weights=False)
    check_trained(saved, module)
    return module


def constructed(
    asked: type[LoPALightningModule],
    saved: Mapping[str, Any],
    trust_remote_code: bool = False,
    overrides: Mapping[str, Any] = {},
) -> LoPALightningModule:
    """Builds the module of a checkpoint, for which no file of a model is opened.

    Args:
        asked: The class asked for; the checkpoint's own may be a subclass.
        saved: The checkpoint.
        trust_remote_code: Whether models may run code of their own, where the checkpoint says that they do.
        overrides: Hyperparameters to use in place of the checkpoint's.

    Raises:
        LoPAError: If a class that it names is not imported, or a hyperparameter is not what it must be.
    """
    hparams = saved[ckpt.HYPERPARAMETERS]
    made_by = _class_of(hparams.get("_class_path"), asked)
    known = arguments(made_by)
    if unknown := sorted(set(overrides) - set(known)):
        raise LoPAError(f"{made_by.__qualname__} takes no {', '.join(unknown)}; it takes {', '.join(sorted(known))}")
    # A class may set hyperparameters of its base itself; these are saved too.
    given = {key: value for key, value in hparams.items() if key in known and key not in overrides}
    if not trust_remote_code:
        _check_no_code(given)
    _check_sizes(given, sum(tensor.numel() for tensor in saved["state_dict"].values()))
    module = made_by(**{key: built(value, known[key].hint, key) for key, value in {**given, **overrides}.items()})
    module.restore(hparams)
    return module


def check_trained(saved: Mapping[str, Any], module: LoPALightningModule) -> None:
    """Refuses a checkpoint whose trained tensors are not a module's, which need not have weights."""
    trained = {f"net.{name}": each for name, each in module.meta_net().named_parameters() if each.requires_grad}
    ckpt.check_tensors(saved["state_dict"], trained)


def _check_no_code(given: dict[str, Any]) -> None:
    """Refuses hyperparameters by which transformers or PEFT would import or fetch code, or search by any pattern.

    In place, nothing is compiled: that is for training alone.
    """
    given |= {key: {**spec, "compile": False} for key, spec in given.items() if "compile" in _mapping(spec)}
    for key, spec in {**given, **_adapters(given)}.items():
        if not isinstance(spec, Mapping):
            continue
        kernel = spec.get("attn_implementation")  # may be a repository on the hub
        wanted = [name for name in ("trust_remote_code", "megatron_core", "megatron_config") if spec.get(name)]
        if kernel is not None and not str(kernel).isidentifier():
            wanted.append(f"attn_implementation {shown(kernel)}")
        # PEFT searches names of modules by regular expressions, of which some do not end; plain names are none.
        if key in _ADAPTERS and re.search(r"[^\w\s.,:'{}\[\]-]|[\w.]\{", str(dict(spec))):
            wanted.append("a search by a pattern")
        if wanted:
            raise LoPAError(
                f"its {key} asks for code from outside ({', '.join(wanted)}); if you trust that, say so again: "
                "load_from_checkpoint(..., trust_remote_code=True)"
            )


def _check_sizes(given: Mapping[str, Any], trained: int) -> None:
    """Refuses sizes that the trained weights contradict, before anything of such a size is built."""
    settings = {"prompt_encoder": _mapping(given.get("prompt_encoder")).get("init_args"), **_adapters(given)}
    for key, values in settings.items():
        for name, value in _mapping(values).items():
            if isinstance(value, int) and abs(value) > max(trained, _ANY_SIZE):
                raise LoPAError(f"its {key} has {shown(name)} {value}, and {trained} trained values")


def _adapters(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of adapters, by name."""
    return dict(zip(_ADAPTERS, (given.get("adapter"), _mapping(given.get("instance_encoder")).get("adapter"))))


def _mapping(value: Any) -> Mapping[str, Any]:
    """A file's value if it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def check_resume(saved: dict[str, Any], module: LoPALightningModule, stage: str) -> None:
    """Checks what Lightning restores, and says what of a training run is not continued as it was configured.

    Args:
        saved: The checkpoint.
        module: Which is to go on.
        stage: ``fit``, ``validate``, ``test`` or ``predict``.

    Raises:
        LoPAError: If the checkpoint holds the state of another optimizer or scheduler, or one that no run writes.
    """
    old, new = check_restored(saved, module, stage)
    if stage != "fit":
        return
    if lines := ckpt.differences(old, new):
        rank_zero_warn(f"a resumed run keeps the checkpoint's optimizer settings: {ckpt.joined(lines)}")
    loop, accumulated = saved["loops"]["fit_loop"], module.trainer.accumulate_grad_batches
    progress, has_place = loop["epoch_loop.batch_progress"], loop.get("state_dict", {}).get("combined_loader")
    if progress.get("is_last_batch", True):
        return
    done = progress["current"]["processed"]
    if not has_place:
        rank_zero_warn(
            f"the checkpoint was saved within an epoch, after {done} batches: the rest of "
            "that epoch is drawn from its start again. Resume from the end of an epoch (last.ckpt) to continue exactly."
        )
    if done % accumulated:
        rank_zero_warn(
            f"the checkpoint was saved after {done} batches of an epoch, and a step accumulates {accumulated}: the "
            f"first step has {accumulated - done % accumulated}"
        )


def check_restored(
    saved: dict[str, Any], module: LoPALightningModule, stage: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Checks what Lightning is about to restore for a stage.

    Args:
        saved: The checkpoint; see :func:`~lopa_lightning.modules.resume_state.check_state`.
        module: Which is to go on; it need not have weights.
        stage: ``fit``, ``validate``, ``test`` or ``predict``.

    Returns:
        The settings of training, as they were saved and as they are now.

    Raises:
        LoPAError: If the checkpoint holds the state of another optimizer or scheduler, or one that no run writes.
    """
    if stage == "fit" and "loops" not in saved:
        raise LoPAError("a bundle holds no state of training; go on from the checkpoint that it was exported from")
    old, new = _of_training(saved[ckpt.HYPERPARAMETERS]), _of_training(module.hparams)
    for key in _BUILT if stage == "fit" else ():
        was, now = ((settings[key] or {}).get("class_path") for settings in (old, new))
        if was != now:
            raise LoPAError(f"the checkpoint holds the state of {key} {was}, this run has {now}; start a new run")
    check_state(saved, module, stage, bool(old["warmup"] or old["lr_scheduler"]))
    return old, new


def _of_training(hparams: Mapping[str, Any]) -> dict[str, Any]:
    """The hyperparameters of training with their defaults; classes by bare name, wherever they are imported from."""
    from lopa_lightning.modules.base import LoPALightningModule

    with contextlib.suppress(LoPAError):
        hparams = {**defaults(find_class(hparams.get("_class_path"), LoPALightningModule)), **hparams}
    found = {key: hparams.get(key) for key in ("learning_rates", "warmup")}
    for key, base in _BUILT.items():
        spec = with_arguments(hparams.get(key), with_defaults, base)
        named = isinstance(spec, Mapping) and "class_path" in spec
        found[key] = {**spec, "class_path": str(spec["class_path"]).rpartition(".")[2]} if named else None
    return found


def _class_of(name: Any, asked: type[LoPALightningModule]) -> type[LoPALightningModule]:
    """The class that made a checkpoint, looked up among what is imported: a file must not choose what to import."""
    from lopa_lightning.modules.base import LoPALightningModule

    try:
        found = cast("type[LoPALightningModule]", find_class(name, LoPALightningModule))
    except LoPAError:
        if asked.__qualname__ == str(name).rpartition(".")[2]:  # saved by a script of its own, loaded from a module
            return asked
        raise
    if not issubclass(found, asked):
        raise LoPAError(f"it was made by {found.__qualname__}, which is no {asked.__qualname__}")
    return found

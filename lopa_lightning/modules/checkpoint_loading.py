"""Rebuilds modules from checkpoints alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from lightning.pytorch.utilities import rank_zero_info

from lopa_lightning import checkpoint as ckpt
from lopa_lightning.errors import LoPAError, shown
from lopa_lightning.plain import arguments, built, find_class

if TYPE_CHECKING:
    from lopa_lightning.modules.base import LoPALightningModule

_ANY_SIZE = 4096
"""Sizes up to this one are harmless, whatever was trained."""


def rebuilt(
    cls: type[LoPALightningModule],
    saved: dict[str, Any],
    name: str,
    trust_remote_code: bool = False,
    overrides: Mapping[str, Any] = {},
) -> LoPALightningModule:
    """Rebuilds a module from a checkpoint; the frozen models are loaded by the names in it.

    Args:
        cls: The class asked for; the checkpoint's own may be a subclass.
        saved: What was read of the checkpoint.
        name: Its name, for messages.
        trust_remote_code: Whether models may run code of their own, where the checkpoint says that they do.
        overrides: Hyperparameters to use in place of the checkpoint's.

    Raises:
        LoPAError: If the checkpoint does not fit.
    """
    module = checked(cls, saved, name, trust_remote_code, overrides)
    models = {"backbone": module.backbone_spec.name, "instance_encoder": module.instance_spec.name}
    if named := [f"{key} {name!r}" for key, name in models.items() if key not in overrides]:
        rank_zero_info(f"Loading the models that {name} names: {', '.join(named)}")
    module.configure_model()
    module.on_load_checkpoint(saved)
    module.load_state_dict(saved["state_dict"])
    return module.eval()


def checked(
    cls: type[LoPALightningModule],
    saved: Mapping[str, Any],
    name: str,
    trust_remote_code: bool = False,
    overrides: Mapping[str, Any] = {},
) -> LoPALightningModule:
    """Builds the module of a checkpoint without weights, and refuses one that does not fit; see :func:`rebuilt`."""
    try:
        module = constructed(cls, saved, trust_remote_code, overrides)
        ckpt.check_identity(saved[ckpt.IDENTITY_KEY], module.known_identity(), weights=False)
        check_trained(saved, module)
    except LoPAError as error:
        message = "".join(each if each.isprintable() else repr(each)[1:-1] for each in str(error))
        raise LoPAError(f"{name}: {message}") from error
    except Exception as error:  # whatever a class makes of arguments that it was never saved with
        raise LoPAError(f"{name}: no module can be built from it: {shown(error)}") from error
    return module


def constructed(
    asked: type[LoPALightningModule],
    saved: Mapping[str, Any],
    trust_remote_code: bool = False,
    overrides: Mapping[str, Any] = {},
) -> LoPALightningModule:
    """Builds the module of a checkpoint; no file of a model is opened.

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
    trained = {f"net.{name}": each for name, each in module.shapes.named_parameters() if each.requires_grad}
    ckpt.check_tensors(saved["state_dict"], trained)


def _check_no_code(given: dict[str, Any]) -> None:
    """Refuses hyperparameters by which transformers or PEFT would import or fetch code, or search by any pattern.

    In place, nothing is compiled: that is for training alone.
    """
    given |= {key: {**spec, "compile": False} for key, spec in given.items() if "compile" in _mapping(spec)}
    for key, spec in {**given, **_adapters(given)}.items():
        spec = _mapping(spec)
        kernel = spec.get("attn_implementation")  # may be a repository on the hub
        wanted = [name for name in ("trust_remote_code", "megatron_core", "megatron_config") if spec.get(name)]
        if kernel is not None and not str(kernel).isidentifier():
            wanted.append(f"attn_implementation {shown(kernel)}")
        # PEFT searches names of modules by regular expressions, of which some do not end; plain names are none.
        if key.endswith("adapter") and re.search(r"[^\w\s.,:'{}\[\]-]|[\w.]\{", str(dict(spec))):
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


def _adapters(given: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Returns the settings of adapters, by name."""
    own, encoders = given.get("adapter"), _mapping(given.get("instance_encoder")).get("adapter")
    return {"adapter": _mapping(own), "instance_encoder.adapter": _mapping(encoders)}


def _mapping(value: Any) -> Mapping[str, Any]:
    """Returns a file's value if it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def _class_of(name: Any, asked: type[LoPALightningModule]) -> type[LoPALightningModule]:
    """Finds the class that made a checkpoint among what is imported: a file must not choose what to import."""
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

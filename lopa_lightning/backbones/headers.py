"""What files of weights say of themselves: which tensor lies where, and whether they can be a model's."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.utils import cached_file

from lopa_lightning.errors import LoPAError, one_line

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_LEGACY = {"weight": "gamma", "bias": "beta"}  # of BERT's layer norms, as they were first saved
_NUMBER = re.compile(r"\d+")


def weight_files(location: str, options: Mapping[str, Any]) -> dict[str, Path]:
    """Returns which file has which tensor.

    Args:
        location: Hub id or folder.
        options: Of ``from_pretrained``: revision and the like; ``local_files_only`` to download nothing.

    Returns:
        Tensor name to safetensors file; empty if the weights are saved otherwise.

    Raises:
        LoPAError: If an index is damaged, or names a file that is not there.
    """
    index = _file(location, _INDEX, options)
    if index is None:
        single = _file(location, _SINGLE, options)
        return {} if single is None else dict.fromkeys(shapes_in(single), single)
    try:
        names: dict[str, str] = json.loads(index.read_text())["weight_map"]
        files = {name: _file(location, name, options) for name in sorted(set(names.values()))}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoPAError(f"{str(index)!r} is no index of weights: {one_line(error)}") from error
    if gone := [name for name, path in files.items() if path is None]:
        raise LoPAError(f"{str(index)!r} names {', '.join(gone[:3])}{' ...' if len(gone) > 3 else ''}, not found there")
    return {tensor: path for tensor, name in names.items() if (path := files[name]) is not None}


def shapes_in(path: Path) -> dict[str, list[int]]:
    """Returns the shape of each tensor in a safetensors file, of which it reads the header alone.

    Raises:
        LoPAError: If the file is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except (SafetensorError, OSError) as error:
        raise LoPAError(f"the weights in {str(path)!r} are damaged: {one_line(error)}") from error


def check_files(name: str, model: PreTrainedModel, location: str, options: Mapping[str, Any]) -> None:
    """Refuses weights that cannot be a model's, by what is known without reading or downloading one.

    What transformers renames, converts or quantises is left to it.

    Args:
        name: What the user calls the model.
        model: As its config describes it, on the ``meta`` device.
        location: Hub id or folder.
        options: See :func:`weight_files`.

    Raises:
        LoPAError: If a file is damaged or not there, or tensors are missing, of other shapes, or of more layers.
    """
    files = weight_files(location, {**options, "local_files_only": True})
    if conversions(model) or getattr(model.config, "quantization_config", None):
        return
    folder = Path(location)
    if not files and folder.is_dir() and not any(path.is_file() for path in folder.glob("*model*.*")):
        raise LoPAError(f"no model weights in {name!r}: neither {_SINGLE} nor pytorch_model.bin")
    if not files:
        body = {id(parameter) for parameter in model.base_model.parameters()}
        head = [key for key, parameter in model.named_parameters() if id(parameter) not in body]
        if head and model.config.architectures == [type(model.base_model).__name__]:  # tied to nothing, and not saved
            raise missing_weights(name, model, head)
        return
    shapes = {key: shape for path in set(files.values()) for key, shape in shapes_in(path).items()}
    if lost := sorted(set(files) - set(shapes)):
        raise LoPAError(f"the weights of {name!r} lack {lost[0]}, which their index names")
    sources, missing = sources_of(model, files)
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    if missing := [key for key in missing if not any(pattern.search(key) for pattern in ignored)]:
        raise missing_weights(name, model, missing)
    for key, parameter in model.named_parameters():
        if key in sources and list(parameter.shape) != shapes[sources[key]]:
            raise unfit_weights(name, sources[key], shapes[sources[key]], parameter.shape)
    check_layers(name, model, set(files) - set(sources.values()), set(sources.values()))


def check_layers(name: str, model: PreTrainedModel, unused: set[str], used: set[str]) -> None:
    """Refuses a model that has fewer layers than were saved.

    Args:
        name: What the user calls the model.
        model: The model.
        unused: Saved tensors that it has no use for, such as those of a head that is left out.
        used: The others.

    Raises:
        LoPAError: If an unused tensor is called like a used one, but for its number.
    """
    known = {_NUMBER.sub("#", key) for key in used}
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    for key in sorted(unused):
        if _NUMBER.sub("#", key) in known and not any(pattern.search(key) for pattern in ignored):
            raise LoPAError(f"the weights of {name!r} have {key}, and its config no layer of that number")


def missing_weights(name: str, model: PreTrainedModel, missing: list[str]) -> LoPAError:
    """Returns the error for weights that were not saved, which transformers would fill with random numbers."""
    of_body = f"{model.base_model_prefix}."
    is_head = model.base_model is not model and not any(key.startswith(of_body) for key in missing)
    return LoPAError(
        f"{name!r} was saved as {' or '.join(model.config.architectures or ['an unnamed architecture'])} and has no "
        f"weights for {', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''} of {type(model).__name__}"
        + ("; without a language model head, use objective: head" if is_head else "")
    )


def unfit_weights(name: str, tensor: str, saved: Any, wanted: Any) -> LoPAError:
    """Returns the error for a tensor whose shape is not the config's."""
    return LoPAError(
        f"the weights of {name!r} do not fit its config: {tensor} is {tuple(saved)}, by the config {tuple(wanted)}"
    )


def conversions(model: PreTrainedModel) -> list[Any]:
    """Returns what transformers does to saved tensors of this kind of model, renaming included."""
    try:
        from transformers import conversion_mapping
    except ImportError:  # an older one, which converts nothing
        return []
    known: Any = conversion_mapping
    kinds = model.config.model_type, type(model).__name__, type(model.base_model).__name__
    return [change for kind in kinds for change in known.get_checkpoint_conversion_mapping(kind) or []]


def sources_of(model: PreTrainedModel, files: Mapping[str, Path]) -> tuple[dict[str, str], list[str]]:
    """Returns the saved tensor of each parameter and buffer, and the parameters that have none.

    Args:
        model: On any device.
        files: Which file has which tensor.
    """
    names: dict[int, list[str]] = {}  # of each tensor; of tied ones any may have been saved
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    prefix = f"{model.base_model_prefix}."
    sources: dict[str, str] = {}
    missing: list[str] = []
    for own in names.values():
        spellings = [spelling for name in own for spelling in _spellings(name, prefix)]
        if saved := next((spelling for spelling in spellings if spelling in files), None):
            sources |= dict.fromkeys(own, saved)
        else:
            missing.append(own[0])
    for name, _ in model.named_buffers():
        if saved := next((spelling for spelling in _spellings(name, prefix) if spelling in files), None):
            sources[name] = saved
    return sources, sorted(missing)


def _spellings(name: str, prefix: str) -> list[str]:
    """What a tensor may be called in a file: with or without the head's model around it, and as it once was."""
    names = [name, name.removeprefix(prefix), prefix + name]
    stem, _, last = name.rpartition(".")
    if last in _LEGACY:
        names += [f"{head}{stem.removeprefix(prefix)}.{_LEGACY[last]}" for head in ("", prefix)]
    return names


def _file(location: str, name: str, options: Mapping[str, Any]) -> Path | None:
    found = cached_file(
        location,
        name,
        revision=options.get("revision"),
        local_files_only=options.get("local_files_only", False),
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    return None if found is None else Path(found)

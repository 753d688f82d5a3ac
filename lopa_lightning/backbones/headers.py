"""Reads the headers of files of weights: which tensor is in which file, and whether all can be a model's."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.utils import cached_file

from lopa_lightning.backbones.transformers_internals import conversions, without_ignored
from lopa_lightning.errors import LoPAError, one_line

_INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
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
    names = indexed(location, options)
    if not names:
        single = weight_file(location, SINGLE, options)
        return {} if single is None else dict.fromkeys(shapes_in(single), single)
    files = {name: weight_file(location, name, options) for name in sorted(set(names.values()))}
    if gone := [name for name, path in files.items() if path is None]:
        what = f"the index of weights in {location!r}"
        raise LoPAError(f"{what} names {', '.join(gone[:3])}{' ...' if len(gone) > 3 else ''}, not found there")
    return {tensor: path for tensor, name in names.items() if (path := files[name]) is not None}


def indexed(location: str, options: Mapping[str, Any]) -> dict[str, str]:
    """Returns the name of the file that has a tensor, by an index of weights; nothing where there is no index.

    Args:
        location: Hub id or folder.
        options: See :func:`weight_files`.

    Raises:
        LoPAError: If the index is damaged.
    """
    index = weight_file(location, _INDEX, options)
    if index is None:
        return {}
    try:
        return {str(key): str(name) for key, name in json.loads(index.read_text())["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoPAError(f"{str(index)!r} is no index of weights: {one_line(error)}") from error


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
        raise LoPAError(f"no model weights in {name!r}: neither {SINGLE} nor pytorch_model.bin")
    if not files:
        body = {id(parameter) for parameter in model.base_model.parameters()}
        head = [key for key, parameter in model.named_parameters() if id(parameter) not in body]
        if head and model.config.architectures == [type(model.base_model).__name__]:  # tied to nothing, and not saved
            check_weights(name, model, head)
        return
    shapes = {key: shape for path in set(files.values()) for key, shape in shapes_in(path).items()}
    if lost := sorted(set(files) - set(shapes)):
        raise LoPAError(f"the weights of {name!r} lack {lost[0]}, which their index names")
    sources, missing = sources_of(model, files)
    used, shaped = set(sources.values()), [(key, p.shape) for key, p in model.named_parameters() if key in sources]
    unfit = [(sources[key], shapes[sources[key]], own) for key, own in shaped if shapes[sources[key]] != list(own)]
    check_weights(name, model, missing, unfit, set(files) - used, used)


def check_weights(
    name: str,
    model: PreTrainedModel,
    missing: Iterable[str],
    unfit: Sequence[tuple[str, Any, Any]] = (),
    unused: Iterable[str] = (),
    used: Iterable[str] = (),
) -> None:
    """Refuses saved tensors that are not all of a model's, by what transformers would fill, resize or leave out.

    Args:
        name: What the user calls the model.
        model: The model.
        missing: Tensors that were not saved, which transformers would fill with random numbers.
        unfit: Saved tensors of another shape: name, saved shape, shape by the config.
        unused: Saved tensors that the model has no use for, such as those of a head that is left out.
        used: The other saved tensors.

    Raises:
        LoPAError: If one is missing or unfit, or an unused one is called like a used one but for its number.
    """
    prefix, (missing, unused) = model.base_model_prefix, without_ignored(model, missing, unused)
    if missing:
        is_head = model.base_model is not model and not any(key.startswith(f"{prefix}.") for key in missing)
        saved_as = " or ".join(model.config.architectures or ["an unnamed architecture"])
        raise LoPAError(
            f"{name!r} was saved as {saved_as} and has no weights for {', '.join(missing[:3])}"
            f"{' ...' if len(missing) > 3 else ''} of {type(model).__name__}"
            + ("; without a language model head, use objective: head" if is_head else "")
        )
    for tensor, saved, wanted in unfit:
        shapes = f"{tensor} is {tuple(saved)}, by the config {tuple(wanted)}"
        raise LoPAError(f"the weights of {name!r} do not fit its config: {shapes}")
    known = {_NUMBER.sub("#", key) for key in used}
    for key in unused:
        if _NUMBER.sub("#", key) in known:
            raise LoPAError(f"the weights of {name!r} have {key}, and its config no layer of that number")


def sources_of(model: PreTrainedModel, files: Mapping[str, object]) -> tuple[dict[str, str], list[str]]:
    """Returns the saved tensor of each parameter and buffer, and the parameters that have none.

    Args:
        model: On any device.
        files: Which file has which tensor.
    """

    def saved(names: Iterable[str]) -> str | None:
        return next((key for name in names for key in _spellings(name, prefix) if key in files), None)

    prefix, tied = f"{model.base_model_prefix}.", dict[int, list[str]]()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tied.setdefault(id(parameter), []).append(name)  # of tied ones any may have been saved
    groups = [*tied.values(), *([name] for name, _ in model.named_buffers())]
    sources = {name: key for names in groups if (key := saved(names)) is not None for name in names}
    return sources, sorted(names[0] for names in tied.values() if names[0] not in sources)


def _spellings(name: str, prefix: str) -> list[str]:
    """Returns what a tensor may be called in a file: with or without the head's model around it, and as it once was."""
    names = [name, name.removeprefix(prefix), prefix + name]
    stem, _, last = name.rpartition(".")
    if last in _LEGACY:
        names += [f"{head}{stem.removeprefix(prefix)}.{_LEGACY[last]}" for head in ("", prefix)]
    return names


def weight_file(location: str, name: str, options: Mapping[str, Any]) -> Path | None:
    """Returns a file of a hub id or folder; None if it is not there."""
    where = {key: options[key] for key in ("revision", "local_files_only") if key in options}
    try:
        return Path(str(cached_file(location, name, **where)))
    except OSError:
        return None

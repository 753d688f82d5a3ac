"""Weights read straight to shards: each process reads its rows of each layer, and none ever holds the whole model."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.utils import cached_file

from lopa_lightning.frozen.sharding import row_range, shard_layers

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_LEGACY = {"weight": "gamma", "bias": "beta"}  # of BERT's layer norms, as they were first saved


def weight_files(location: str, options: Mapping[str, Any]) -> dict[str, Path]:
    """Which file has which tensor.

    Args:
        location: Hub id or folder.
        options: Of ``from_pretrained``: revision and the like.

    Returns:
        Tensor name to safetensors file; empty if the weights are saved otherwise.
    """
    index = _file(location, _INDEX, options)
    if index is not None:
        names: dict[str, str] = json.loads(index.read_text())["weight_map"]
        files = {name: _file(location, name, options) for name in sorted(set(names.values()))}
        return {tensor: path for tensor, name in names.items() if (path := files[name]) is not None}
    single = _file(location, _SINGLE, options)
    if single is None:
        return {}
    with safe_open(single, "pt") as file:
        return dict.fromkeys(file.keys(), single)


def read_to_shards(
    make: Callable[[], PreTrainedModel], files: Mapping[str, Path], mesh: DeviceMesh
) -> PreTrainedModel | None:
    """Builds a model whose layers are sharded, and reads each process's part of them.

    Args:
        make: Builds the model.
        files: Which file has which tensor.
        mesh: The processes.

    Returns:
        The model: its layers sharded, what lies around them whole. None if transformers changes
        tensors as it loads this architecture, or files and model do not name the same tensors.
    """
    with hollow(), torch.random.fork_rng(devices=[]):  # start values are drawn as if nothing had been built
        model = make()
    sources = None if _is_converted(model) else _sources(model, files)
    if sources is None:
        return None
    shard_layers(model, mesh)
    on_cpu = mesh.device_type == "cpu"
    device = torch.device("cpu") if on_cpu else torch.device(mesh.device_type, torch.cuda.current_device())
    make_real: Any = model._apply  # Module.to_empty would empty the buffers too
    make_real(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)
    model.tie_weights()
    with contextlib.ExitStack() as stack:
        opened = {path: stack.enter_context(safe_open(path, "pt")) for path in set(files.values())}
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name in sources:
                _read(tensor.detach(), opened[files[sources[name]]], sources[name])
    return model


@contextlib.contextmanager
def hollow() -> Iterator[None]:
    """Models built in this block have parameters on the ``meta`` device; buffers, which no file may have, are real."""
    register = nn.Module.register_parameter

    def register_hollow(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    module_class: Any = nn.Module
    module_class.register_parameter = register_hollow
    try:
        yield
    finally:
        module_class.register_parameter = register


def _file(location: str, name: str, options: Mapping[str, Any]) -> Path | None:
    found = cached_file(
        location,
        name,
        revision=options.get("revision"),
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    return None if found is None else Path(found)


def _is_converted(model: PreTrainedModel) -> bool:
    """Whether transformers does more to saved tensors of this kind than to rename them, or keeps some in float32."""
    if model._keep_in_fp32_modules or getattr(model, "_keep_in_fp32_modules_strict", None):
        return True
    try:
        from transformers import conversion_mapping
    except ImportError:  # an older one, which converts nothing
        return False
    known: Any = conversion_mapping
    changes = known.get_checkpoint_conversion_mapping(model.config.model_type) or []
    return any(isinstance(change, known.WeightConverter) for change in changes)


def _sources(model: PreTrainedModel, files: Mapping[str, Path]) -> dict[str, str] | None:
    """The saved tensor of each parameter and buffer; None if a parameter has none."""
    names: dict[int, list[str]] = {}  # of each tensor; of tied ones any may have been saved
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    prefix = f"{model.base_model_prefix}."
    sources: dict[str, str] = {}
    for own in names.values():
        spellings = [spelling for name in own for spelling in _spellings(name, prefix)]
        saved = next((spelling for spelling in spellings if spelling in files), None)
        if saved is None:
            return None
        sources |= dict.fromkeys(own, saved)
    for name, _ in model.named_buffers():
        if saved := next((spelling for spelling in _spellings(name, prefix) if spelling in files), None):
            sources[name] = saved
    return sources


def _spellings(name: str, prefix: str) -> list[str]:
    """What a tensor may be called in a file: with or without the head's model around it, and as it once was."""
    names = [name, name.removeprefix(prefix), prefix + name]
    stem, _, last = name.rpartition(".")
    if last in _LEGACY:
        names += [f"{head}{stem.removeprefix(prefix)}.{_LEGACY[last]}" for head in ("", prefix)]
    return names


def _read(tensor: Tensor, file: Any, name: str) -> None:
    """Reads a tensor, or this process's rows of it."""
    if tensor.dim() == 0:
        tensor.copy_(file.get_tensor(name))
    elif isinstance(tensor, DTensor):
        first, last = row_range(tensor)
        if last > first:
            tensor.to_local().copy_(file.get_slice(name)[first:last])
    else:
        tensor.copy_(file.get_slice(name)[:])

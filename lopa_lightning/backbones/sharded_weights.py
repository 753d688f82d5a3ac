"""Weights read straight to shards: each process reads its rows of each layer, and none ever holds the whole model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from lopa_lightning.backbones.headers import conversions, sources_of
from lopa_lightning.backbones.sharding import row_range, shard_layers


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
    sources, missing = sources_of(model, files)
    if missing or _is_converted(model):
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


def _is_converted(model: PreTrainedModel) -> bool:
    """Whether transformers does more to saved tensors of this kind than to rename them, or keeps some in float32."""
    if model._keep_in_fp32_modules or getattr(model, "_keep_in_fp32_modules_strict", None):
        return True
    return any(type(change).__name__ == "WeightConverter" for change in conversions(model))

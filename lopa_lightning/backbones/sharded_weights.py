"""Weights read straight to shards: each process reads its rows of each layer, and none ever holds the whole model.

transformers' own sharded loading (``DistributedConfig(fsdp_size=...)``) does not serve: version 5.0 has none, and 5.24
makes of BERT one group, whose embeddings cannot be used before its ``forward``, where soft prompts meet them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from lopa_lightning.backbones.headers import sources_of
from lopa_lightning.backbones.sharding import row_range, shard_layers
from lopa_lightning.backbones.transformers_internals import is_converted


def read_to_shards(model: PreTrainedModel, files: Mapping[str, Path], mesh: DeviceMesh) -> bool:
    """Shards a model's layers, and reads each process's part of them; what lies around them is whole.

    Args:
        model: On the ``meta`` device; changed in place.
        files: Which file has which tensor.
        mesh: The processes.

    Returns:
        False, and the model is as it was, if transformers changes tensors as it loads this architecture, files and
        model do not name the same tensors, or its class is none of transformers', which all initialise their buffers.
    """
    sources, missing = sources_of(model, files)
    if missing or is_converted(model) or not type(model).__module__.startswith("transformers."):
        return False
    buffers = _initial_buffers(model)
    shard_layers(model, mesh)
    on_cpu = mesh.device_type == "cpu"
    model.to_empty(device="cpu" if on_cpu else torch.device(mesh.device_type, torch.cuda.current_device()))
    model.tie_weights()
    with contextlib.ExitStack() as stack:
        opened = {path: stack.enter_context(safe_open(path, "pt")) for path in set(files.values())}
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name in sources:
                _read(tensor.detach(), opened[files[sources[name]]], sources[name])
            else:
                tensor.copy_(buffers[name])
    return True


def _initial_buffers(model: PreTrainedModel) -> dict[str, Tensor]:
    """Returns the buffers with the values that the model's class gives them after every load."""
    for part in model.modules():
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, torch.empty_like(buffer, device="cpu"))
    with torch.random.fork_rng(devices=[]):
        cast(Any, model).initialize_weights()  # of parameters on the meta device it has nothing to initialise
    return dict(model.named_buffers())


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

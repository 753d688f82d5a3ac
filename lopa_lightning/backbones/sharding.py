"""Models split over processes by FSDP2: each layer a group of its own, all that lies around the layers one more.

Weights are read straight to shards: each process reads its rows of each layer, and none ever holds the whole model.
transformers' own sharded loading (``DistributedConfig(fsdp_size=...)``) does not serve: 5.22 cannot be told what the
groups are, and 5.24 makes the whole model one more, whose embeddings and head cannot be used outside of its
``forward``, where soft prompts meet them. torch's ``HuggingFaceStorageReader`` takes a tensor from any file of a
folder, also from one of other weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from lopa_lightning.backbones.headers import sources_of
from lopa_lightning.backbones.transformer_layers import transformer_layers
from lopa_lightning.backbones.transformers_internals import is_converted
from lopa_lightning.errors import LoPAError


def data_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """Returns the processes that see different data, among all of a strategy's.

    Args:
        mesh: With the dimensions of Lightning's ``ModelParallelStrategy``, or one alone.

    Raises:
        LoPAError: If the mesh asks for tensor parallelism.
    """
    names = mesh.mesh_dim_names or ()
    if "tensor_parallel" in names and (size := mesh["tensor_parallel"].size()) > 1:
        raise LoPAError(
            f"tensor_parallel_size must be 1, got {size}: a frozen backbone is sharded, its matrices are not split; "
            "use configs/trainer/fsdp.yaml"
        )
    return mesh["data_parallel"] if "data_parallel" in names else mesh


def shard_layers(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Splits the weights of every layer over the processes, in place; what is split already stays as it is.

    Args:
        model: On the ``meta`` device or on a real one.
        mesh: The processes.
    """
    for layer in transformer_layers(model):
        if not isinstance(layer, FSDPModule):
            fully_shard(layer, mesh=mesh)


def shard(net: nn.Module, models: Iterable[PreTrainedModel], mesh: DeviceMesh) -> None:
    """Splits all weights of a net over the processes, in place.

    What is trained outside of the layers belongs to the group of ``net`` itself: in no group, its gradients would never
    be averaged.

    Args:
        net: Its ``forward`` is the whole way from a batch to outputs, and its ``run`` runs anything else.
        models: The models in it whose layers are to be groups of their own.
        mesh: The processes.

    Raises:
        LoPAError: If what is trained is not all of one dtype.
    """
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in net.parameters() if p.requires_grad})
    if len(dtypes) > 1:
        raise LoPAError(
            f"sharded, all that is trained must have one dtype, got {' and '.join(dtypes)}; "
            "load the model that is trained with dtype: float32"
        )
    for model in models:
        shard_layers(model, mesh)
    fully_shard(net, mesh=mesh)
    register_fsdp_forward_method(net, "run")
    assert all(isinstance(parameter, DTensor) for parameter in net.parameters())


def is_sharded(net: nn.Module) -> bool:
    """Returns whether processes wait for each other in every layer of a net."""
    return isinstance(net, FSDPModule)


def check_equal(net: nn.Module, count: int) -> None:
    """Checks that processes which share a backbone have as many texts each to complete.

    Args:
        net: The model, on every process.
        count: Of this process.

    Raises:
        LoPAError: If not.
    """
    if not is_sharded(net):
        return
    counts: list[int] = [0] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(counts, count)
    if len(set(counts)) > 1:
        raise LoPAError(f"processes that share a backbone must complete as many texts each, got {counts}")


def placed_like(value: Tensor, parameter: Tensor) -> Tensor:
    """Returns a whole tensor as a parameter holds it: this process's part where it is sharded.

    Args:
        value: The same on every process.
        parameter: Of the same shape.
    """
    if not isinstance(parameter, DTensor) or isinstance(value, DTensor):
        return value
    value = value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def whole(tensor: Tensor) -> Tensor:
    """Returns a tensor as it is, gathered from all processes where it is sharded; every one must ask for it.

    Args:
        tensor: Sharded or not.
    """
    gathered: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return gathered


@contextmanager
def gathered(net: nn.Module) -> Iterator[None]:
    """Keeps whole, in its block, what lies outside of the layers; every process must enter it.

    Args:
        net: Sharded or not.
    """
    root = net if isinstance(net, FSDPModule) else None
    if root is not None:
        root.unshard()
    try:
        yield
    finally:
        if root is not None:
            root.reshard()


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
    with ExitStack() as stack:
        opened = {path: stack.enter_context(safe_open(path, "pt")) for path in set(files.values())}
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if (source := sources.get(name)) is None:
                tensor.copy_(buffers[name])
                continue
            saved, kept = opened[files[source]].get_tensor(source), tensor.detach()  # mapped, and not read yet
            if isinstance(kept, DTensor):  # by FSDP2, of a chunk of the rows; the last processes may have none
                parts, rank, kept = saved.chunk(mesh.size()), mesh.get_local_rank(), kept.to_local()
                saved = parts[rank] if rank < len(parts) else saved[:0]
            kept.copy_(saved)
    return True


def _initial_buffers(model: PreTrainedModel) -> dict[str, Tensor]:
    """Returns the buffers with the values that the model's class gives them after every load."""
    for part in model.modules():
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, torch.empty_like(buffer, device="cpu"))
    with torch.random.fork_rng(devices=[]):
        cast(Any, model).initialize_weights()  # of parameters on the meta device it has nothing to initialise
    return dict(model.named_buffers())

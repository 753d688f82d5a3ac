"""The layers that a transformer is a stack of, and what can be done with each of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from lopa_lightning.errors import LoPAError


def transformer_layers(model: PreTrainedModel) -> list[nn.Module]:
    """A model's transformer layers, found by the classes that it says must not be split.

    Args:
        model: With or without a head.

    Raises:
        LoPAError: If it names none.
    """
    parts: list[Any] = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    names = {name for part in parts for name in part._no_split_modules or ()}
    # Of a list: embeddings are not to be split either, but their weight may be tied to the head's.
    found = [
        child
        for parent in model.modules()
        if isinstance(parent, nn.ModuleList)
        for child in parent
        if type(child).__name__.removeprefix("FSDP") in names
    ]
    if not found:
        raise LoPAError(
            f"{type(model).__name__} does not say which layers it is made of (_no_split_modules), so they "
            "cannot be sharded or computed a second time one by one"
        )
    inner = {id(part) for layer in found for part in layer.modules() if part is not layer}
    return [layer for layer in found if id(layer) not in inner]


def compile_for_training(layers: Iterable[nn.Module]) -> None:
    """Lets torch compile layers at the first training step: one program for all that are alike, and for all lengths.

    Without gradients they run as they are: with a cache each layer would be a program of its own.

    Args:
        layers: Changed in place.
    """
    for layer in layers:
        compiled = torch.compile(layer.forward, dynamic=True)
        layer.forward = functools.partial(_compiled, compiled, layer.forward)


def _compiled(compiled: Callable[..., Any], forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return (compiled if torch.is_grad_enabled() else forward)(*args, **kwargs)


def recompute(layers: Iterable[nn.Module]) -> None:
    """Lets layers keep their input alone, and compute a second time what the backward pass needs.

    transformers' own gradient checkpointing does nothing in eval mode, which frozen layers are in.

    Args:
        layers: Changed in place.
    """
    for layer in layers:
        layer.forward = functools.partial(_checkpointed, layer.forward)


def _checkpointed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)

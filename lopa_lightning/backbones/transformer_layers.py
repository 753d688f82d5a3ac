"""The layers that a transformer is a stack of, and what can be done with each of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from lopa_lightning.backbones.transformers_internals import layer_class_names
from lopa_lightning.errors import LoPAError


def transformer_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Returns a model's transformer layers, found by the classes that it says must not be split.

    Args:
        model: With or without a head.

    Raises:
        LoPAError: If it names none.
    """
    names = layer_class_names(model)
    # Of a list: embeddings are not to be split either, but their weight may be tied to the head's.
    lists = [part for part in model.modules() if isinstance(part, nn.ModuleList)]
    found = [child for part in lists for child in part if type(child).__name__.removeprefix("FSDP") in names]
    if not found:
        raise LoPAError(
            f"{type(model).__name__} does not say which layers it is made of (_no_split_modules), so they "
            "cannot be sharded or computed a second time one by one"
        )
    inner = {id(part) for layer in found for part in layer.modules() if part is not layer}
    return [layer for layer in found if id(layer) not in inner]


def compile_for_training(layers: Iterable[nn.Module]) -> None:
    """Lets torch compile layers at the first training step: one program for all that are alike, and for all lengths.

    Without gradients they run as they are: with a cache each layer would be a program of its own. So
    ``nn.Module.compile``, which compiles every call, is of no use here.

    Args:
        layers: Changed in place.
    """
    _replace_with_gradients(layers, functools.partial(torch.compile, dynamic=True))


def recompute(layers: Iterable[nn.Module]) -> None:
    """Lets layers keep their input alone, and compute a second time what the backward pass needs.

    transformers' own gradient checkpointing does nothing in eval mode, which frozen layers are in.

    Args:
        layers: Changed in place.
    """
    _replace_with_gradients(layers, lambda forward: functools.partial(checkpoint, forward, use_reentrant=False))


def _replace_with_gradients(layers: Iterable[nn.Module], change: Callable[[Any], Callable[..., Any]]) -> None:
    """Changes the ``forward`` of each layer where gradients are taken.

    It is replaced on the layer itself, not on its class. A module around the layer would change the names of weights
    and hide attributes that models read of their layers; a hook cannot run ``forward`` in another way.
    """
    for layer in layers:
        layer.forward = functools.partial(_run, change(layer.forward), layer.forward)


def _run(with_gradients: Callable[..., Any], without: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls one of two functions."""
    return (with_gradients if torch.is_grad_enabled() else without)(*args, **kwargs)

"""Where virtual tokens go among the tokens of an image: between CLS and registers, and the patches.

Visual Prompt Tuning (Jia et al., ECCV 2022, arXiv 2203.12119). Hooks put them in, so that no model is rewritten:
what lies before and after them is what the layer before returned, to the bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def virtual_tokens(layers: Sequence[nn.Module], prompt: Tensor, num_patches: int) -> Iterator[None]:
    """Lets layers read virtual tokens while the block runs.

    The first layer's are inserted before the patches, which are the last tokens. Where later layers have their own,
    these take the place of what the layer before returned for the virtual tokens: VPT-deep.

    Args:
        layers: All that have virtual tokens of their own, in their order: the first layer, or all of them.
        prompt: ``[B, m, k·d]`` or ``[1, m, k·d]``, for k layers.
        num_patches: Number of an image's patches.
    """
    m = prompt.shape[1]
    with contextlib.ExitStack() as stack:
        for number, (layer, own) in enumerate(zip(layers, prompt.chunk(len(layers), dim=-1), strict=True)):
            hook = _TokenHook(own, num_patches, replaced=m if number else 0)
            stack.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


class _TokenHook:
    """Puts virtual tokens before the patches of what a layer is about to read.

    Args:
        prompt: ``[B, m, d]`` or ``[1, m, d]``.
        num_patches: Number of patches.
        replaced: Number of tokens before the patches that they take the place of.
    """

    def __init__(self, prompt: Tensor, num_patches: int, replaced: int) -> None:
        self.prompt, self.num_patches, self.replaced = prompt, num_patches, replaced

    def __call__(self, layer: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        hidden, *rest = args
        first = hidden.shape[1] - self.num_patches
        own = self.prompt.to(hidden.dtype).expand(len(hidden), -1, -1)
        return (torch.cat([hidden[:, : first - self.replaced], own, hidden[:, first:]], dim=1), *rest), kwargs


def pad_position_biases(layers: Sequence[nn.Module], num_patches: int) -> None:
    """Lets each layer's own bias of relative positions (BEiT's) be 0 for virtual tokens, which have no position.

    The hooks stay: a layer that is computed a second time in the backward pass asks for its bias once more. Without
    virtual tokens they change nothing.

    Args:
        layers: Of a model.
        num_patches: Number of an image's patches.
    """
    for bias in (part for layer in layers for part in _biases(layer)):
        # The layer says how many tokens it reads.
        bias.register_forward_hook(
            lambda _, args, kwargs, table: _padded(table, kwargs["dim_size"] - table.shape[-1], num_patches),
            with_kwargs=True,
        )


@contextlib.contextmanager
def padded_shared_bias(model: nn.Module, layers: Sequence[nn.Module], m: int, num_patches: int) -> Iterator[None]:
    """Lets a bias of relative positions that all layers share be 0 for m virtual tokens, while the block runs.

    Args:
        model: Without a head.
        layers: Of the model; theirs are left alone.
        m: Number of virtual tokens.
        num_patches: Number of an image's patches.
    """
    own = {id(bias) for layer in layers for bias in _biases(layer)}
    shared = [bias for bias in _biases(model) if id(bias) not in own]
    with contextlib.ExitStack() as stack:
        for bias in shared:
            hook = bias.register_forward_hook(lambda _, args, table: _padded(table, m, num_patches))
            stack.callback(hook.remove)
        yield


def _biases(part: nn.Module) -> list[nn.Module]:
    """Returns the modules that make biases of relative positions."""
    return [module for module in part.modules() if type(module).__name__.endswith("RelativePositionBias")]


def _padded(table: Tensor, m: int, num_patches: int) -> Tensor:
    """Returns a bias ``[..., S, S]`` with rows and columns of 0 before the patches', ``[..., m + S, m + S]``."""
    if m == 0:
        return table
    size = table.shape[-1]
    position = torch.arange(size, device=table.device)
    position = position + m * (position >= size - num_patches)
    padded = table.new_zeros(*table.shape[:-2], m + size, m + size)
    padded[..., position.unsqueeze(1), position] = table
    return padded

"""Reads the attention between virtual tokens and patches while an image model runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from torch import Tensor

from lopa_lightning.backbones.transformers_internals import attention_implementation
from lopa_lightning.backbones.vision import VisionBackbone


class PatchAttention(NamedTuple):
    """Attention in a layer between m virtual tokens and N patches, on average over heads.

    Attributes:
        to_patches: Weight of each patch for each virtual token, ``[B, m, N]``. The rest of a virtual token's weight, up
            to 1, is that of other tokens.
        to_virtual: Weight of all virtual tokens together for each patch, ``[B, N]``.
    """

    to_patches: Tensor
    to_virtual: Tensor


@contextmanager
def patch_attention(backbone: VisionBackbone, m: int) -> Iterator[dict[int, PatchAttention]]:
    """Fills a dictionary with each layer's attention, by the layer's number, when the backbone runs in the block.

    Only ``eager`` attention has weights to read, so it is the model's within the block; after it the model has its own
    again.

    Args:
        backbone: Whatever its attention implementation is.
        m: Number of virtual tokens.

    Yields:
        Empty, and still so in the end if the model gives no attention weights.
    """
    found: dict[int, PatchAttention] = {}
    model: Any = backbone.body
    with ExitStack() as stack:
        for number, layer in enumerate(backbone.layers()):
            hook = _Reader(found, number, m, backbone.num_patches)
            for part in layer.modules():
                stack.callback(part.register_forward_hook(hook).remove)
        stack.callback(model.set_attn_implementation, attention_implementation(model))
        model.set_attn_implementation("eager")
        yield found


class _Reader:
    """Reads a layer's attention weights from the output of the module that makes them.

    A later pass overwrites what an earlier one left: before the backbone's, the same model may have encoded instances.
    """

    def __init__(self, found: dict[int, PatchAttention], number: int, m: int, num_patches: int) -> None:
        self.found, self.number, self.m, self.num_patches = found, number, m, num_patches

    def __call__(self, module: Any, args: Any, output: Any) -> None:
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if not isinstance(weights, Tensor) or weights.dim() != 4 or weights.shape[-1] != weights.shape[-2]:
            return
        weights, first = weights.float().mean(1), weights.shape[-1] - self.num_patches
        virtual = slice(first - self.m, first)
        self.found[self.number] = PatchAttention(weights[:, virtual, first:], weights[:, first:, virtual].sum(-1))

"""A frozen image model: pixels in, hidden states of CLS, virtual tokens and patches out."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lopa_lightning.backbones.base import Backbone, Batch, States
from lopa_lightning.backbones.image_injection import pad_position_biases, padded_shared_bias, virtual_tokens
from lopa_lightning.backbones.image_processing import ImageProcessing
from lopa_lightning.errors import LoPAError, one_of
from lopa_lightning.prompts.base import UniformTokens

_CLS = {"cls_token", "class_embedding"}


@dataclass(frozen=True)
class ImageStates(States):
    """Hidden states ``[B, n + m + N, h]`` of n tokens of the model (CLS first, registers), m virtual ones, N patches.

    ``content_mask`` is 1 at CLS and the patches, ``positions`` are the patches'.

    Attributes:
        virtual_mask: 1 at the virtual tokens, ``[B, L]``.
    """

    virtual_mask: Tensor

    @property
    def patch_mask(self) -> Tensor:
        """1 at the patches, ``[B, L]``."""
        return self.spread(torch.ones_like(self.positions))


class VisionBackbone(Backbone):
    """A vision transformer, which reads images.

    Virtual tokens stand after CLS, distillation and register tokens, before the patches, and have no position. With
    placement ``before`` the first layer reads them (VPT-shallow; CLIP's first layer comes after ``pre_layrnorm``).
    With ``every_layer`` each layer reads m of its own, which replace what the layer before returned at their positions
    (VPT-deep): a virtual token is then L·d numbers, layer by layer.

    The hidden states are those after the model's final norm. CLIP norms CLS alone by itself; here it is applied to all.

    Args:
        model: One of the architectures of :mod:`~lopa_lightning.backbones.image_spec`, without a head.
        processing: How pixels are scaled and normalised, and the size of images.
        placement: ``before`` the patches or in ``every_layer``.
        **settings: As of :class:`~lopa_lightning.backbones.base.Backbone`. With the model's dropout its stochastic
            depth and random rescaling of positions are active too.

    Raises:
        LoPAError: If ``placement`` is not one of the two, or not every layer can be found.
    """

    input_keys = ("pixels",)

    def __init__(
        self, model: PreTrainedModel, processing: ImageProcessing, placement: str = "before", **settings: Any
    ) -> None:
        one_of("placement of images", placement, ("before", "every_layer"))
        super().__init__(model, placement=placement, **settings)
        self.processing = processing
        self._layers, expected = tuple(self.layers()), self.body.config.num_hidden_layers
        if len(self._layers) != expected:
            raise LoPAError(f"{type(model).__name__} has {expected} layers, and {len(self._layers)} were found")
        self.num_patches: int = num_patches(self.body, processing)
        """Number N of an image's patches."""
        self.has_cls: bool = has_cls(self.body)
        """Whether the model has a CLS token."""
        pad_position_biases(self._layers, self.num_patches)

    @property
    def body(self) -> PreTrainedModel:
        """The model: it has no head."""
        return self.model  # DINOv3's ``base_model`` is without its embeddings

    @property
    def prompt_layers(self) -> int:
        """Number L of layers that a virtual token is made for: 1, or all."""
        return int(self.body.config.num_hidden_layers) if self.placement == "every_layer" else 1

    @property
    def prompt_dim(self) -> int:
        """Width of a virtual token: the hidden states', times the layers that have their own."""
        return self.prompt_layers * self.hidden_dim

    @property
    def takes_offset(self) -> bool:
        """False: there is no text."""
        return False

    def count_tokens(self, batch: Batch) -> int:
        """Returns the number of patches of a batch."""
        return len(batch["pixels"]) * self.num_patches

    def vocabulary(self) -> UniformTokens:
        """Returns what VPT's initial values depend on."""
        height, width = patch_size(self.body)
        return UniformTokens(3 * height * width, self.hidden_dim)

    def forward(self, prompt: Tensor, batch: Batch, offset: Tensor | None = None) -> ImageStates:
        """Runs the backbone on an image and virtual tokens.

        Args:
            prompt: Soft prompts Z ``[B, m, d]`` (``[B, m, L·d]`` in every layer), or ``[1, m, ...]`` for all.
            batch: ``pixels [B, 3, H, W]``, resized and cropped, from 0 to 255.
            offset: None: there is no text.
        """
        m, reading = prompt.shape[1], self._layers[: self.prompt_layers]
        with contextlib.ExitStack() as stack:
            if m:
                stack.enter_context(virtual_tokens(reading, prompt, self.num_patches))
                stack.enter_context(padded_shared_bias(self.body, self._layers, m, self.num_patches))
            hidden = last_hidden_states(self.body, batch["pixels"], self.processing)
        return image_states(hidden, m, self.num_patches, self.has_cls)


def last_hidden_states(model: PreTrainedModel, pixels: Tensor, processing: ImageProcessing) -> Tensor:
    """Returns a model's hidden states after its final norm, ``[B, L, h]``.

    Args:
        model: Without a head.
        pixels: ``[B, 3, H, W]``, from 0 to 255.
        processing: The model's.
    """
    dtype = next(model.get_input_embeddings().parameters()).dtype  # of what cuts it into patches
    hidden: Tensor = model(pixel_values=normalised(pixels, processing, dtype)).last_hidden_state
    if model.config.model_type == "clip_vision_model":  # whose pooler applies the norm, to CLS alone
        norm: Any = next(part for name, part in model.named_modules() if name.endswith("post_layernorm"))
        return norm(hidden)  # type: ignore[no-any-return]
    return hidden


def normalised(pixels: Tensor, processing: ImageProcessing, dtype: torch.dtype) -> Tensor:
    """Scales and normalises images, in float32 at least.

    Args:
        pixels: ``[B, 3, H, W]``, from 0 to 255.
        processing: Of the model that is to read them.
        dtype: Of the result.
    """
    wide = torch.promote_types(dtype, torch.float32)

    def by_channel(values: Sequence[float]) -> Tensor:  # made where the pixels are: a copy to a GPU would wait for it
        return torch.stack([torch.full((1, 1), value, dtype=wide, device=pixels.device) for value in values])

    mean, std = by_channel(processing.mean), by_channel(processing.std)
    return ((pixels.to(wide) * processing.scale - mean) / std).to(dtype)


def image_states(hidden: Tensor, m: int, num_patches: int, has_cls: bool) -> ImageStates:
    """Says which of an image's hidden states are what.

    Args:
        hidden: ``[B, n + m + N, h]``.
        m: Number of virtual tokens.
        num_patches: Number N of patches.
        has_cls: Whether the first one is CLS.
    """
    size, length = hidden.shape[:2]
    position = torch.arange(length, device=hidden.device)
    first = length - num_patches
    content = (position >= first) | ((position == 0) & has_cls)
    virtual = (position >= first - m) & (position < first)
    content, virtual = (mask.long().expand(size, -1) for mask in (content, virtual))
    return ImageStates(hidden, content, position[first:].expand(size, -1), virtual)


def patch_size(model: PreTrainedModel) -> tuple[int, int]:
    """Returns height and width of a model's patches, in pixels."""
    size: Any = model.config.patch_size
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def num_patches(model: PreTrainedModel, processing: ImageProcessing) -> int:
    """Returns how many whole patches an image has."""
    (height, width), (down, right) = processing.size, patch_size(model)
    return (height // down) * (width // right)


def has_cls(model: PreTrainedModel) -> bool:
    """Returns whether a model has a CLS token; its other tokens without a patch come after it."""
    return any(name.rpartition(".")[2] in _CLS for name, _ in model.named_parameters())

"""Images as a kind of input: their backbones, and what a data module must know to make batches for them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lopa_lightning.backbones.base import Backbone, Batch, InputKind, InputSpec
from lopa_lightning.backbones.image_processing import ImageProcessing, load_processing
from lopa_lightning.backbones.pretrained import PretrainedSpec, checked_shapes, load_config
from lopa_lightning.backbones.vision import VisionBackbone, has_cls, image_states, last_hidden_states, num_patches
from lopa_lightning.errors import LoPAError, one_line

if TYPE_CHECKING:
    from lopa_lightning.instances.encoder import InstanceEncoderSpec
    from lopa_lightning.instances.vectors import VectorCache

__all__ = ["ARCHITECTURES", "ImageKind", "ImageProcessing", "ImageSpec", "load_processing"]

ARCHITECTURES = (
    "beit",
    "clip_vision_model",
    "deit",
    "dinov2",
    "dinov2_with_registers",
    "dinov3_vit",
    "siglip_vision_model",
    "vit",
)
"""Kinds of models, by ``model_type``: one stack of layers that attend to all tokens, the patches last."""


@dataclass(frozen=True, kw_only=True)
class ImageSpec(InputSpec):
    """Image processing of the frozen models.

    A batch has ``pixels [B, 3, H, W]`` in uint8, resized and cropped: they are scaled and normalised where the model
    is, since they are a quarter of the bytes.

    Attributes:
        processing: The backbone's.
        instance_processing: Of an instance encoder that is another model with another processing, which reads
            ``instance_pixels [B, 3, H, W]``; None where it reads ``pixels``, or ``instance_pixels`` of the backbone's
            processing where a batch has them, such as another view.
    """

    processing: ImageProcessing
    instance_processing: ImageProcessing | None = None


@dataclass(frozen=True)
class ImageKind(InputKind):
    """Images, read as pixels.

    Attributes:
        instance: The instance encoder; None for the backbone.
    """

    instance: InstanceEncoderSpec | None = None

    @functools.cached_property
    def processing(self) -> ImageProcessing:
        """What the backbone's image processor does."""
        return load_processing(self.spec)

    @functools.cached_property
    def encoder_processing(self) -> ImageProcessing:
        """What the instance encoder's does; the backbone's files are not read for one of its own."""
        if self.instance is None or self.instance.is_backbone:
            return self.processing
        return load_processing(self.instance.pretrained())

    @property
    def instance_processing(self) -> ImageProcessing | None:
        """What the instance encoder's does, where that is something else."""
        return None if self.encoder_processing == self.processing else self.encoder_processing

    def check(self) -> None:
        """Raises a LoPAError if there is no head to answer, or the architecture is none that reads virtual tokens."""
        if self.objective != "head":
            raise LoPAError(f"images need objective: head, got {self.objective!r}")
        check_architecture(self.spec)

    def check_instance(self, backbone: Backbone, encoder: InstanceEncoderSpec) -> None:
        """Raises a LoPAError if an encoder is to pool a token that says nothing of the whole image, or to cut it."""
        if encoder.max_length is not None:
            raise LoPAError("instance_encoder.max_length is of texts, and the model reads images; leave it out")
        own = None if encoder.is_backbone else checked_shapes(encoder.pretrained(), "encoder")
        allowed = ("cls", "mean", "max") if has_cls(backbone.body if own is None else own) else ("mean", "max")
        if encoder.pooling not in allowed:
            lacks = "" if "cls" in allowed else f", and {encoder.name!r} has no CLS token"
            raise LoPAError(
                f"instance_encoder.pooling of images must be {', '.join(allowed)}{lacks}; got {encoder.pooling!r}"
            )

    def backbone(self, model: PreTrainedModel, **settings: Any) -> VisionBackbone:
        """Builds the backbone, see :class:`~lopa_lightning.backbones.vision.VisionBackbone`."""
        return VisionBackbone(model, self.processing, **settings)

    def input_spec(
        self,
        backbone: Backbone,
        num_virtual_tokens: int,
        encoder: InstanceEncoderSpec | None,
        vectors: VectorCache | None,
    ) -> ImageSpec:
        """Returns the image processing of the frozen models.

        Raises:
            LoPAError: If a model does not read images of the size that its image processor makes, or the instance
                encoder is none for images.
        """
        prompt = torch.empty(1, num_virtual_tokens, backbone.prompt_dim, device="meta")
        _check_size(self.spec, self.processing, lambda pixels: backbone(prompt, {"pixels": pixels}).hidden)
        other = None
        if encoder is not None and not encoder.is_backbone:
            source, other = encoder.pretrained(), self.instance_processing
            check_architecture(source)
            model = checked_shapes(source, "encoder")
            _check_size(
                source, other or self.processing, lambda pixels: self.instance_states(model, {"pixels": pixels})[0]
            )
        return ImageSpec(
            virtual_tokens=num_virtual_tokens,
            instance_vectors=vectors,
            processing=self.processing,
            instance_processing=other,
        )

    def blank_batch(self, examples: int, tokens: int) -> dict[str, Tensor]:
        """Returns black images; all have as many tokens."""
        return {"pixels": torch.zeros(examples, 3, *self.processing.size, dtype=torch.uint8)}

    def blank_instances(self, examples: int, tokens: int) -> dict[str, Tensor]:
        """Returns black images of an instance encoder with another processing."""
        if (own := self.instance_processing) is None:
            return {}
        return {"instance_pixels": torch.zeros(examples, 3, *own.size, dtype=torch.uint8)}

    def instance_states(self, model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor]:
        """Runs an instance encoder's model on ``instance_pixels``, or on ``pixels`` where there are none.

        CLS and patches count. No virtual token is there, also if the model is the backbone's.
        """
        processing = self.encoder_processing
        pixels = batch["instance_pixels"] if "instance_pixels" in batch else batch["pixels"]
        hidden = last_hidden_states(model, pixels, processing)
        return hidden, image_states(hidden, 0, num_patches(model, processing), has_cls(model)).content_mask


def check_architecture(spec: PretrainedSpec) -> None:
    """Raises a LoPAError if a model is none that reads virtual tokens among the patches of images."""
    if (kind := load_config(spec).model_type) not in ARCHITECTURES:
        raise LoPAError(
            f"{spec.name!r} is of kind {kind!r}, in which virtual tokens have no place among an image's patches; "
            f"allowed are {', '.join(ARCHITECTURES)}"
        )


def _check_size(spec: PretrainedSpec, processing: ImageProcessing, run: Callable[[Tensor], Tensor]) -> None:
    """Raises a LoPAError if a model on the meta device does not read the images that its image processor makes."""
    try:
        run(torch.empty(1, 3, *processing.size, dtype=torch.uint8, device="meta"))
    except (RuntimeError, ValueError, IndexError) as error:
        height, width = processing.size
        raise LoPAError(
            f"{spec.name!r} does not read the images of {height} x {width} pixels that its image processor makes: "
            f"{one_line(error)}"
        ) from error

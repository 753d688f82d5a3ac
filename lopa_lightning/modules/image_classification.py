"""Classifies images, or predicts a number for each, by a trained head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal, get_args

from torch import Tensor

from lopa_lightning import checkpoint as ckpt
from lopa_lightning.backbones.base import Backbone, Objective, States
from lopa_lightning.backbones.image_spec import ImageKind, ImageProcessing, ImageSpec
from lopa_lightning.backbones.pretrained import PretrainedSpec
from lopa_lightning.backbones.vision import ImageStates, VisionBackbone
from lopa_lightning.data.image import ImageClassificationDataModule
from lopa_lightning.errors import LoPAError, at_least
from lopa_lightning.instances.encoder import pool
from lopa_lightning.modules.classification import ClassificationModule
from lopa_lightning.modules.predict import image_batches, image_sources, records
from lopa_lightning.modules.readouts import HeadReadout
from lopa_lightning.modules.start import answering
from lopa_lightning.plain import built, plain
from lopa_lightning.task import Task

ImagePooling = Literal["cls", "patches", "prompts", "all"]


class ImageReadout(HeadReadout):
    """Applies a trained linear layer to CLS, or to the mean of patches, virtual tokens or both."""

    def pooled(self, states: States) -> Tensor:
        """Returns the vector that the layer reads, ``[B, h]``."""
        assert isinstance(states, ImageStates)
        if self.pooling == "cls":
            return pool(states.hidden, states.content_mask, "cls")
        masks = {"patches": states.patch_mask, "prompts": states.virtual_mask}
        return pool(states.hidden, masks.get(self.pooling, states.patch_mask + states.virtual_mask), "mean")


class ImageClassificationModule(ClassificationModule):
    """Assigns a label (or, for regression, a number) to every image.

    Args:
        objective: ``head``: a trained linear layer.
        head_pooling: What the head reads, after the model's final norm: ``cls``, the mean of the ``patches``, of the
            virtual tokens (``prompts``), or of ``all`` of both.
        task: Labels and metrics; None to take the data module's.
        processing: What is done to an image to validate, test and predict; None to take the data module's view, or with
            other data what the model's own image processor does.
        **kwargs: See :class:`~lopa_lightning.modules.base.LoPALightningModule`.

    Raises:
        LoPAError: If ``objective`` or ``head_pooling`` is none of these.
    """

    short_name = "image_classification"

    head_poolings: ClassVar[tuple[str, ...]] = get_args(ImagePooling)

    def __init__(
        self,
        objective: Objective = "head",
        head_pooling: ImagePooling = "cls",
        task: Task | None = None,
        processing: ImageProcessing | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(objective=objective, head_pooling=head_pooling, task=task, **kwargs)  # type: ignore[arg-type]
        self.processing = processing

    def input_kind(self, backbone: PretrainedSpec) -> ImageKind:
        """Says that images are read."""
        return ImageKind(backbone, self.objective, self.instance_spec)

    def restore(self, hparams: Mapping[str, Any]) -> None:
        """Takes the task and the view that the data module brought to the saved module."""
        super().restore(hparams)
        if self.processing is None:
            self.processing = built(hparams.get("processing"), ImageProcessing | None, "processing")
            self.hparams["processing"] = plain(self.processing)

    def setup(self, stage: str) -> None:
        """Takes the view of the data module, before weights are loaded.

        Raises:
            LoPAError: If it is not the view that the module was trained with, or see the base class.
        """
        data, spec = self.data, self.input_spec
        if isinstance(data, ImageClassificationDataModule):
            data.connect(spec)
            seen = data.processing
        else:
            seen = self.evaluated
        if self.processing is None:
            self.processing, self.hparams["processing"] = seen, plain(seen)
        if lines := ckpt.differences(plain(self.processing), plain(seen), between=("the model", "the data")):
            raise LoPAError(f"the data's view of images is not the model's: {ckpt.joined(lines)}")
        super().setup(stage)

    @property
    def _kind(self) -> ImageKind:
        kind = self.builder.kind
        assert isinstance(kind, ImageKind)
        return kind

    @property
    def evaluated(self) -> ImageProcessing:
        """Returns what is done to an image to validate, test and predict; scale and size are the model's."""
        own, given = self._kind.processing, self.processing
        return own if given is None else replace(own, resize=given.resize, crop=given.crop)

    def predict(self, images: Any, batch_size: int = 32) -> list[dict[str, Any]]:
        """Predicts for images, which are processed as in validation.

        Args:
            images: A file's name or content, a PIL image or an array in uint8, ``[H, W]`` or ``[H, W, 3]``; or a list.
            batch_size: Images at a time.

        Returns:
            A record for each image, in their order: ``label`` (or ``labels``) and ``probabilities`` by name, or
            ``value``.

        Raises:
            LoPAError: If an image is broken or is none, or nothing was trained or loaded.
        """
        at_least(1, batch_size=batch_size)
        sources = image_sources(images)
        with answering(self, "predict", set()):
            return records(self, self.image_batches(sources, batch_size), len(sources), batch_size)

    def image_batches(self, sources: list[Any], batch_size: int) -> Iterator[dict[str, Tensor]]:
        """Yields the batches of images, read as to validate.

        Args:
            sources: See :func:`~lopa_lightning.modules.predict.image_sources`.
            batch_size: Images at a time.

        Raises:
            LoPAError: If an image is broken; the message names it.
        """
        spec, processing = self.input_spec, {"pixels": self.evaluated}
        assert isinstance(spec, ImageSpec)
        if spec.instance_processing is not None:
            processing["instance_pixels"] = spec.instance_processing
        return image_batches(sources, processing, batch_size, self.device)

    def task_identity(self) -> dict[str, Any]:
        """Returns labels, what reads them, and what is done to pixels: the model's files say it, and may change."""
        kind = self._kind
        other = kind.instance_processing if self.builder.skeleton.prompt_encoder.uses_instance else None
        instance = {} if other is None else {"instance_processing": plain(other)}
        return {**super().task_identity(), "view": plain(self.evaluated), **instance}

    def configure_readout(self, backbone: Backbone) -> ImageReadout:
        """Builds the trained head.

        Raises:
            LoPAError: If there is no token of those that it is to read.
        """
        assert isinstance(backbone, VisionBackbone)
        if self.head_pooling == "cls" and not backbone.has_cls:
            raise LoPAError(f"{type(backbone.body).__name__} has no CLS token; use head_pooling: patches")
        if self.head_pooling == "prompts" and not self.builder.skeleton.prompt_encoder.num_virtual_tokens:
            raise LoPAError("head_pooling: prompts needs virtual tokens; use head_pooling: cls or patches")
        return ImageReadout(backbone.hidden_dim, self.required_task().num_outputs, self.head_pooling)

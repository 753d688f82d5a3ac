"""Classification and regression of images, by a trained head."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, get_args

from torch import Tensor

from lopa_lightning.backbones.base import Backbone, Objective, States
from lopa_lightning.backbones.image_spec import ImageKind
from lopa_lightning.backbones.pretrained import PretrainedSpec
from lopa_lightning.backbones.vision import ImageStates, VisionBackbone
from lopa_lightning.errors import LoPAError
from lopa_lightning.instances.encoder import pool
from lopa_lightning.modules.classification import ClassificationModule
from lopa_lightning.modules.prompted_model import HeadReadout
from lopa_lightning.plain import plain
from lopa_lightning.task import Task

ImagePooling = Literal["cls", "patches", "prompts", "all"]


class ImageReadout(HeadReadout):
    """A trained linear layer on CLS, or on the mean of patches, virtual tokens or both."""

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
        **kwargs: Any,
    ) -> None:
        super().__init__(objective=objective, head_pooling=head_pooling, task=task, **kwargs)  # type: ignore[arg-type]

    def input_kind(self, backbone: PretrainedSpec) -> ImageKind:
        """Says that images are read."""
        return ImageKind(backbone, self.objective, self.instance_spec)

    def task_identity(self) -> dict[str, Any]:
        """Labels, what reads them, and what is done to pixels: the model's files say it, and may change."""
        kind = self.builder.kind
        assert isinstance(kind, ImageKind)
        other = kind.instance_processing if self.builder.skeleton.prompt_encoder.uses_instance else None
        instance = {} if other is None else {"instance_processing": plain(other)}
        return {**super().task_identity(), "processing": plain(kind.processing), **instance}

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

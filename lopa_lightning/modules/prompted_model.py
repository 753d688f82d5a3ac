"""Computes outputs of a batch in one torch module, with a read-out at its end."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from lopa_lightning.backbones.base import Backbone, Batch
from lopa_lightning.instances.encoder import InstanceEncoder, controlled
from lopa_lightning.modules.readouts import Readout
from lopa_lightning.prompts.base import PromptEncoder

Result = TypeVar("Result")


class Outputs(NamedTuple):
    """Holds what a model computes of a batch.

    Attributes:
        outputs: The read-out's, ``[B, ...]``.
        instance: Instance vectors that made the soft prompts, ``[B, e]``; None without an instance encoder.
        of_instance: In training, what is read from each example's own vector, ``[B, ...]``; None if nothing is.
    """

    outputs: Tensor
    instance: Tensor | None
    of_instance: Tensor | None


class PromptedModel(nn.Module):
    """Joins prompt encoder and read-out, instance encoder, and backbone.

    What is trained is registered first: optimizer states keyed over all parameters and those keyed
    over the trained ones alone then number the trained ones alike.

    Args:
        prompt_encoder: Makes the soft prompts.
        readout: Reads the answer.
        instance_encoder: Makes instance vectors; None if the prompt encoder reads none.
        backbone: The frozen model.
        instance_readout: Reads an answer from instance vectors in training, for a loss of its own; None for none.
    """

    def __init__(
        self,
        prompt_encoder: PromptEncoder,
        readout: Readout,
        instance_encoder: InstanceEncoder | None,
        backbone: Backbone,
        instance_readout: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.prompt_encoder = prompt_encoder
        self.readout = readout
        self.instance_readout = instance_readout
        self.instance_encoder = instance_encoder
        self.backbone = backbone

    def encode_instance(self, batch: Batch) -> Tensor | None:
        """Returns each example's own instance vector, ``[B, e]``, from the batch or computed."""
        if self.instance_encoder is None:
            return None
        vectors = batch["instance"] if "instance" in batch else self.instance_encoder(batch)
        # A backbone in bfloat16 goes with a prompt encoder in float32.
        return vectors.to(next(self.prompt_encoder.parameters()).dtype)

    def forward(self, batch: Batch) -> Outputs:
        """Computes outputs.

        Args:
            batch: What the backbone reads, and ``instance [B, e]`` or what the instance encoder reads.
        """
        own = self.encode_instance(batch)
        prompt, instance = self._prompted(own)
        prompt = self.prompt_encoder.for_batch(prompt, len(batch[self.backbone.input_keys[0]]))
        offset = self.prompt_encoder.token_offset()
        read = batch if offset is None else {**batch, "given_mask": self.readout.given_mask(batch)}
        states = self.backbone(prompt, read, offset)
        of_instance = self.instance_readout(own) if self.instance_readout is not None and self.training else None
        return Outputs(self.readout(states, self.backbone, batch), instance, of_instance)

    def run(self, function: Callable[[], Result]) -> Result:
        """Calls a function that uses parts of this model by themselves, such as one that generates.

        Where weights are sharded, what lies around the layers is whole meanwhile, as in ``forward``.

        Args:
            function: Calls layers as often as on every other process.
        """
        return function()

    def soft_prompt(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Returns soft prompts ``[B, m, d]`` (or ``[1, m, d]`` for all), and the instance vectors that made them."""
        return self._prompted(self.encode_instance(batch))

    def _prompted(self, own: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Returns soft prompts, and the vectors that made them: each example's own, or a control's."""
        if own is not None and self.instance_encoder is not None:
            own = controlled(own, self.instance_encoder.spec.control)
        return self.prompt_encoder(own), own

    def pretrained_models(self) -> list[PreTrainedModel]:
        """Returns the pretrained models in it, each once."""
        own = None if self.instance_encoder is None else self.instance_encoder.own_model
        return [self.backbone.model, *([] if own is None else [own])]

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Returns trained parameters by group: the prompt encoder's, and those of the other parts."""
        groups = dict(self.prompt_encoder.parameter_groups())
        rest = {
            "head": self.readout,
            "instance_readout": self.instance_readout,
            "instance_encoder": self.instance_encoder,
            "backbone": self.backbone,
        }
        for name, part in rest.items():
            trained = [p for p in part.parameters() if p.requires_grad] if part is not None else []
            if trained:
                groups[name] = trained
        return groups

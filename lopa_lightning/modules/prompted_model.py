"""Computes outputs of a batch in one torch module, with the read-outs at its end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lopa_lightning.backbones.base import Backbone, Batch, LanguageModel, States
from lopa_lightning.instances.encoder import InstanceEncoder, Pooling, controlled, pool
from lopa_lightning.prompts.base import PromptEncoder
from lopa_lightning.task import IGNORED

Result = TypeVar("Result")


class Readout(nn.Module, ABC):
    """Reads an answer from the backbone's hidden states. Its parameters, if any, are trained."""

    @abstractmethod
    def forward(self, states: States, backbone: Backbone, batch: Batch) -> Tensor:
        """Computes outputs from hidden states.

        Args:
            states: What the backbone computed.
            backbone: The backbone, for its language model head.
            batch: What was read, for read-outs that need to know where the answer lies.

        Returns:
            Outputs, ``[B, ...]``.
        """


class LabelWordReadout(Readout):
    """Reads the label words' logits at one position.

    Args:
        word_ids: Token id of each label's word.
        mask_id: Read at this token (a masked LM's); None to read at the text's last token (a causal LM's).
        over_vocabulary: Whether to return log-probabilities among the whole vocabulary, in place of logits.
            Otherwise no other token's logit is computed.
    """

    word_ids: Tensor

    def __init__(self, word_ids: list[int], mask_id: int | None, over_vocabulary: bool = False) -> None:
        super().__init__()
        self.over_vocabulary = over_vocabulary
        self.register_buffer("word_ids", torch.tensor(word_ids), persistent=False)
        self.mask_id = mask_id

    def forward(self, states: States, backbone: Backbone, batch: Batch) -> Tensor:
        """Returns logits or log-probabilities, ``[B, labels]``."""
        assert isinstance(backbone, LanguageModel)
        at = states.content_mask if self.mask_id is None else states.spread(batch["input_ids"] == self.mask_id)
        read = backbone.label_log_probabilities if self.over_vocabulary else backbone.label_logits
        return read(pool(states.hidden, at, "last"), self.word_ids)


class HeadReadout(Readout):
    """Applies a trained linear layer to the pooled hidden states of the input's own tokens.

    Args:
        hidden_dim: Width h of the hidden states.
        num_outputs: Classes, or 1 for regression.
        pooling: How hidden states become one vector.
    """

    def __init__(self, hidden_dim: int, num_outputs: int, pooling: str = "mean") -> None:
        super().__init__()
        self.pooling = pooling
        self.linear = nn.Linear(hidden_dim, num_outputs)
        nn.init.normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def forward(self, states: States, backbone: Backbone, batch: Batch) -> Tensor:
        """Returns outputs ``[B, num_outputs]``."""
        outputs: Tensor = self.linear(self.pooled(states).to(self.linear.weight.dtype))
        return outputs

    def pooled(self, states: States) -> Tensor:
        """Returns the vector that the layer reads, ``[B, h]``."""
        return pool(states.hidden, states.content_mask, cast(Pooling, self.pooling))


class CompletionReadout(Readout):
    """Reads how well each labelled token was predicted. No other position's logits are computed."""

    def forward(self, states: States, backbone: Backbone, batch: Batch) -> Tensor:
        """Returns each text's sum of losses, number of labels, and how many were the likeliest token: ``[B, 3]``.

        The last is 0 where gradients are taken, and it is not asked. ``labels [B, T]`` stand at the tokens
        themselves, :data:`IGNORED` at all that is not to be predicted.
        """
        assert isinstance(backbone, LanguageModel)
        # A token is predicted at the position before it; the first has none.
        rows, tokens = ((batch["labels"] != IGNORED) & (states.positions > 0)).nonzero(as_tuple=True)
        before = states.positions[rows, tokens] - 1
        losses, hits = backbone.token_losses(states.hidden[rows, before], batch["labels"][rows, tokens])
        hits = torch.zeros_like(losses) if hits is None else hits.to(losses.dtype)
        counted = torch.stack([losses, torch.ones_like(losses), hits], dim=1)
        return counted.new_zeros(len(batch["labels"]), 3).index_add(0, rows, counted)


class PromptedModel(nn.Module):
    """Joins prompt encoder and read-out, instance encoder, and backbone.

    What is trained is registered first: optimizer states keyed over all parameters and those keyed
    over the trained ones alone then number the trained ones alike.

    Args:
        prompt_encoder: Makes the soft prompts.
        readout: Reads the answer.
        instance_encoder: Makes instance vectors; None if the prompt encoder reads none.
        backbone: The frozen model.
    """

    def __init__(
        self,
        prompt_encoder: PromptEncoder,
        readout: Readout,
        instance_encoder: InstanceEncoder | None,
        backbone: Backbone,
    ) -> None:
        super().__init__()
        self.prompt_encoder = prompt_encoder
        self.readout = readout
        self.instance_encoder = instance_encoder
        self.backbone = backbone

    def encode_instance(self, batch: Batch) -> Tensor | None:
        """Returns instance vectors ``[B, e]``: the batch's own or computed ones, or a control's in their place."""
        if self.instance_encoder is None:
            return None
        vectors = batch["instance"] if "instance" in batch else self.instance_encoder(batch)
        return controlled(vectors, self.instance_encoder.spec.control)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Computes outputs.

        Args:
            batch: What the backbone reads, and ``instance [B, e]`` or what the instance encoder reads.

        Returns:
            The read-out's outputs, and the instance vectors (None without an instance encoder).
        """
        prompt, instance = self.soft_prompt(batch)
        prompt = self.prompt_encoder.for_batch(prompt, len(batch[self.backbone.input_keys[0]]))
        states = self.backbone(prompt, batch, self.prompt_encoder.token_offset())
        return self.readout(states, self.backbone, batch), instance

    def run(self, function: Callable[[], Result]) -> Result:
        """Calls a function that uses parts of this model by themselves, such as one that generates.

        Where weights are sharded, what lies around the layers is whole meanwhile, as in ``forward``.

        Args:
            function: Calls layers as often as on every other process.
        """
        return function()

    def soft_prompt(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Returns soft prompts ``[B, m, d]`` (or ``[1, m, d]`` for all), and the instance vectors that made them."""
        instance = self.encode_instance(batch)
        if instance is not None:  # a backbone in bfloat16 goes with a prompt encoder in float32
            instance = instance.to(next(self.prompt_encoder.parameters()).dtype)
        return self.prompt_encoder(instance), instance

    def pretrained_models(self) -> list[PreTrainedModel]:
        """Returns the pretrained models in it, each once."""
        own = None if self.instance_encoder is None else self.instance_encoder.own_model
        return [self.backbone.model, *([] if own is None else [own])]

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Returns trained parameters by group: the prompt encoder's, ``head``, ``instance_encoder``, ``backbone``."""
        groups = dict(self.prompt_encoder.parameter_groups())
        rest = {"head": self.readout, "instance_encoder": self.instance_encoder, "backbone": self.backbone}
        for name, part in rest.items():
            trained = [p for p in part.parameters() if p.requires_grad] if part is not None else []
            if trained:
                groups[name] = trained
        return groups

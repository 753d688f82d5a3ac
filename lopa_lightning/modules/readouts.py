"""Reads answers from a backbone's hidden states: label words, a trained head, or losses of completions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import cast

import torch
from torch import Tensor, nn

from lopa_lightning.backbones.base import Backbone, Batch, LanguageModel, States
from lopa_lightning.backbones.text import TextBackbone
from lopa_lightning.errors import LoPAError
from lopa_lightning.instances.encoder import Pooling, pool
from lopa_lightning.task import IGNORED


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

    def given_mask(self, batch: Batch) -> Tensor:
        """Returns where the input's own tokens stand, and none that is to be predicted, ``[B, T]``."""
        return batch["attention_mask"]


class LabelWordReadout(Readout):
    """Reads the label words' logits at one position.

    Args:
        word_ids: Token id of each label's word.
        mask_id: Read at this token (a masked LM's); None to read at the last token (a causal LM's), of the text
            or of virtual tokens after it.
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


def linear_head(width: int, num_outputs: int) -> nn.Linear:
    """Builds a linear layer with small initial values, so that all answers are as likely at first.

    Args:
        width: Of what it reads.
        num_outputs: Classes, or 1 for regression.
    """
    linear = nn.Linear(width, num_outputs)
    nn.init.normal_(linear.weight, std=0.02)
    nn.init.zeros_(linear.bias)
    return linear


@torch.no_grad()
def set_to_words(linear: nn.Linear, backbone: TextBackbone, word_ids: list[int]) -> None:
    """Sets a linear layer to the rows and biases of label words in a language model's own head.

    Args:
        linear: Reads vectors as wide as the model's hidden states.
        backbone: With a head, whose logits are linear in the hidden states.
        word_ids: Token id of each label's word.
    """
    weight = backbone.embedding_weight
    unit = torch.eye(linear.in_features + 1, linear.in_features, dtype=weight.dtype, device=weight.device)
    *rows, bias = backbone.label_logits(unit, torch.tensor(word_ids, device=weight.device)).float()
    linear.bias.copy_(bias)
    linear.weight.copy_(torch.stack(rows, dim=1) - bias.unsqueeze(1))


class HeadReadout(Readout):
    """Applies a trained linear layer to the pooled hidden states that ``content_mask`` names.

    Args:
        hidden_dim: Width h of the hidden states.
        num_outputs: Classes, or 1 for regression.
        pooling: How hidden states become one vector.
    """

    def __init__(self, hidden_dim: int, num_outputs: int, pooling: str = "mean") -> None:
        super().__init__()
        self.pooling = pooling
        self.linear = linear_head(hidden_dim, num_outputs)

    def forward(self, states: States, backbone: Backbone, batch: Batch) -> Tensor:
        """Returns outputs ``[B, num_outputs]``."""
        outputs: Tensor = self.linear(self.pooled(states).to(self.linear.weight.dtype))
        return outputs

    def pooled(self, states: States) -> Tensor:
        """Returns the vector that the layer reads, ``[B, h]``."""
        return pool(states.hidden, states.content_mask, cast(Pooling, self.pooling))


class WordReadout(HeadReadout):
    """Applies a trained linear layer to the hidden state of each of the input's own tokens."""

    def pooled(self, states: States) -> Tensor:
        """Returns the vectors that the layer reads, ``[B, T, h]``, so that outputs are ``[B, T, num_outputs]``."""
        return states.aligned()


class CompletionReadout(Readout):
    """Reads how well each labelled token was predicted. No other position's logits are computed."""

    def given_mask(self, batch: Batch) -> Tensor:
        """Leaves out what is to be predicted: nothing is added to what a model generates, either."""
        return batch["attention_mask"] * (batch["labels"] == IGNORED)

    def forward(self, states: States, backbone: Backbone, batch: Batch) -> Tensor:
        """Returns each text's sum of losses, number of labels, and how many were the likeliest token: ``[B, 3]``.

        The last is 0 where gradients are taken, and it is not asked. ``labels [B, T]`` stand at the tokens
        themselves, :data:`IGNORED` at all that is not to be predicted.

        Raises:
            LoPAError: If virtual tokens stand after a prompt, and the batch does not say where its completion begins.
        """
        if backbone.placement == "after" and "prompt_position" not in batch:
            raise LoPAError(
                "with placement 'after' a batch must have prompt_position, how many tokens of each text stand before "
                f"its completion; it has {', '.join(batch)}"
            )
        assert isinstance(backbone, LanguageModel)
        # A token is predicted at the position before it; the first has none.
        rows, tokens = ((batch["labels"] != IGNORED) & (states.positions > 0)).nonzero(as_tuple=True)
        before = states.positions[rows, tokens] - 1
        losses, hits = backbone.token_losses(states.hidden[rows, before], batch["labels"][rows, tokens])
        hits = torch.zeros_like(losses) if hits is None else hits.to(losses.dtype)
        counted = torch.stack([losses, torch.ones_like(losses), hits], dim=1)
        return counted.new_zeros(len(batch["labels"]), 3).index_add(0, rows, counted)

"""The frozen backbone: embeddings in, hidden states out, and the language model head where one is asked for."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

from lopa_lightning.errors import LoPAError
from lopa_lightning.frozen.injection import Placement, insert, position_ids, prompt_layout
from lopa_lightning.frozen.loading import accepted_inputs, first_position, has_token_types, hidden_size


@dataclass(frozen=True)
class PromptedStates:
    """What the backbone computed for ``[Z; embed(x)]``.

    Attributes:
        hidden: Last hidden states ``[B, m + T, h]``.
        text_mask: 1 at the text's own tokens, 0 at virtual tokens and padding, ``[B, m + T]``.
        input_ids: The text's token ids in place, -1 at virtual tokens, ``[B, m + T]``.
    """

    hidden: Tensor
    text_mask: Tensor
    input_ids: Tensor


class Backbone(nn.Module):
    """A pretrained transformer that is never changed, only shown soft prompts.

    Args:
        model: Encoder, masked LM or causal LM from transformers.
        dropout: Whether the model's own dropout is active in training. It is off otherwise, always.
        placement: Where virtual tokens go, see :mod:`~lopa_lightning.frozen.injection`.

    Raises:
        LoPAError: If the architecture cannot be fed embeddings, or takes no attention mask.
    """

    def __init__(self, model: PreTrainedModel, dropout: bool = False, placement: Placement = "before") -> None:
        super().__init__()
        self.model = model
        self.dropout = dropout
        self.placement = placement
        self._accepts = accepted_inputs(self.body)
        if missing := {"inputs_embeds", "attention_mask"} - self._accepts:
            names = " and no ".join(sorted(missing))
            raise LoPAError(f"{type(model).__name__} takes no {names}, so it cannot be given soft prompts")
        self._has_token_types = has_token_types(self.body)
        # In a list, so that torch does not register the head's weights a second time.
        self._head = [] if self.body is model else [_LabelWordHead(model)]

    @property
    def body(self) -> PreTrainedModel:
        """The model without its language model head."""
        return cast(PreTrainedModel, self.model.base_model)

    @property
    def embedding_dim(self) -> int:
        """Width d of the input embeddings."""
        return int(self.embedding_weight.shape[1])

    @property
    def embedding_weight(self) -> Tensor:
        """The weight of the model's embedding layer, ``[V, d]``."""
        return cast(Tensor, self.model.get_input_embeddings().weight).detach()

    @property
    def hidden_dim(self) -> int:
        """Width h of the hidden states."""
        return hidden_size(self.model.config)

    @property
    def max_positions(self) -> int | None:
        """How many tokens, virtual ones included, the model has positions for; None if that is not limited."""
        limit = getattr(self.model.config, "max_position_embeddings", None)
        # DeBERTa and others say -1 for relative positions without a limit.
        return None if limit is None or limit <= 0 else int(limit) - first_position(self.body)

    def train(self, mode: bool = True) -> Backbone:
        """Stays in eval mode, unless the backbone's dropout was asked for."""
        super().train(mode and self.dropout)
        return self

    def embedding_table(self) -> Tensor:
        """The vectors that token ids stand for at the model's input, ``[V, d]``.

        No copy, unless the model's embedding layer does more than look up (Gemma's scales).
        """
        layer, weight = self.model.get_input_embeddings(), self.embedding_weight
        if type(layer) is nn.Embedding:
            return weight
        with torch.no_grad():
            return cast(Tensor, layer(torch.arange(len(weight), device=weight.device)))

    def forward(
        self,
        prompt: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
    ) -> PromptedStates:
        """Runs the backbone on ``[Z; embed(x)]``.

        Args:
            prompt: Soft prompts Z ``[B, m, d]``, or ``[1, m, d]`` for all.
            input_ids: Token ids of the text, ``[B, T]``; padded on either side.
            attention_mask: 1 at the text's tokens, ``[B, T]``.
            token_type_ids: Segment of each token, ``[B, T]``; virtual tokens belong to the first.

        Raises:
            LoPAError: If m + T is more than the backbone has positions for.
        """
        batch, m = len(input_ids), prompt.shape[1]
        if self.max_positions is not None and m + input_ids.shape[1] > self.max_positions:
            raise LoPAError(
                f"{m} virtual tokens and {input_ids.shape[1]} tokens of text are more than the "
                f"{self.max_positions} positions of the backbone; truncate the text"
            )
        layout = prompt_layout(attention_mask, m, self.placement)
        embedded = self.model.get_input_embeddings()(input_ids)
        text_mask = insert(layout, 0, attention_mask)
        mask = insert(layout, 1, attention_mask)
        inputs = {
            "inputs_embeds": insert(layout, prompt.to(embedded.dtype).expand(batch, -1, -1), embedded),
            "attention_mask": mask,
        }
        if "position_ids" in self._accepts:
            inputs["position_ids"] = position_ids(mask, first_position(self.body))
        if token_type_ids is not None and self._has_token_types:
            inputs["token_type_ids"] = insert(layout, 0, token_type_ids)
        # No key-value cache: nothing is generated here, and it would hold every layer's keys and values.
        options = {"use_cache": False} if "use_cache" in self._accepts else {}
        hidden = self.body(**inputs, **options).last_hidden_state
        return PromptedStates(hidden, text_mask, insert(layout, -1, input_ids))

    def label_logits(self, hidden: Tensor, token_ids: Tensor) -> Tensor:
        """The language model's logits of a few tokens, without those of the rest of the vocabulary.

        Args:
            hidden: Hidden states ``[B, h]``.
            token_ids: The tokens, ``[n]``.

        Returns:
            ``[B, n]``.

        Raises:
            LoPAError: If the backbone was loaded without a language model head.
        """
        if not self._head:
            raise LoPAError(f"{type(self.model).__name__} has no language model head")
        logits: Tensor = self._head[0](hidden, token_ids)
        return logits


class _LabelWordHead:
    """A language model's own head, as the model's class defines it, on chosen hidden states and tokens.

    It runs the model's ``forward`` on a copy that shares every weight, in which two parts are
    replaced: the layers by the hidden states at hand, the projection to the vocabulary by its rows
    for the wanted tokens. Transforms before the projection, scales and caps after it stay the model's.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        projection = cast(Any, model).get_output_embeddings()
        self.rows = _ProjectionRows(projection)
        self.model = _with_replaced(model, {id(model.base_model): _GivenStates(), id(projection): self.rows})

    def __call__(self, hidden: Tensor, token_ids: Tensor) -> Tensor:
        self.rows.token_ids = token_ids
        logits: Tensor = self.model(inputs_embeds=hidden.unsqueeze(1)).logits
        return logits.squeeze(1)


class _GivenStates(nn.Module):
    """Stands in for the layers: what comes in as embeddings goes out as hidden states."""

    @property
    def decoder(self) -> _GivenStates:
        """OPT's language model calls its layers by this name."""
        return self

    def forward(
        self, input_ids: None = None, *, inputs_embeds: Tensor, **_: object
    ) -> BaseModelOutputWithPoolingAndCrossAttentions:
        return BaseModelOutputWithPoolingAndCrossAttentions(last_hidden_state=inputs_embeds)


class _ProjectionRows(nn.Module):
    """Stands in for the projection to the vocabulary: only its rows for ``token_ids``.

    The rows are read at every call, not copied once: the weights may be moved or sharded meanwhile.
    """

    def __init__(self, projection: nn.Module) -> None:
        super().__init__()
        self._projection = [projection]
        self.token_ids = torch.tensor([])

    @property
    def weight(self) -> Tensor:
        """The projection's: Mamba's language model asks for its dtype."""
        return cast(Tensor, self._projection[0].weight)

    def forward(self, hidden: Tensor) -> Tensor:
        projection, ids = cast(Any, self._projection[0]), self.token_ids
        bias = projection.bias[ids] if getattr(projection, "bias", None) is not None else None
        return F.linear(hidden, self.weight[ids], bias)


def _with_replaced(module: nn.Module, replacements: dict[int, nn.Module]) -> nn.Module:
    """A copy of ``module`` with some submodules (by ``id``) exchanged, sharing all the others and every weight."""
    if id(module) in replacements:
        return replacements[id(module)]
    parts = {name: child and _with_replaced(child, replacements) for name, child in module._modules.items()}
    if all(parts[name] is child for name, child in module._modules.items()):
        return module
    twin = copy.copy(module)
    twin.__dict__["_modules"] = parts
    return twin

"""A language model's own head, as its class defines it, on hidden states that are at hand."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

_CHUNK_BYTES = 2**26


class LabelWordHead:
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
        """From hidden states ``[B, h]`` to the logits of ``token_ids [n]``, ``[B, n]``."""
        self.rows.token_ids = token_ids
        logits: Tensor = self.model(inputs_embeds=hidden.unsqueeze(1)).logits
        return logits.squeeze(1)


class VocabularyHead:
    """A language model's own head on chosen hidden states, all of the vocabulary.

    Args:
        model: With a language model head.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.projection = cast(Any, model).get_output_embeddings()
        self.model = _with_replaced(model, {id(model.base_model): _GivenStates()})

    def __call__(self, hidden: Tensor) -> Tensor:
        """From hidden states ``[N, h]`` to logits ``[N, V]``."""
        logits: Tensor = self.model(inputs_embeds=hidden.unsqueeze(0)).logits
        return logits.squeeze(0)

    @property
    def is_trained(self) -> bool:
        """Whether a weight of the head is trained, as in full fine-tuning."""
        return any(parameter.requires_grad for parameter in self.model.parameters())


def chunked_cross_entropy(
    head: VocabularyHead, hidden: Tensor, targets: Tensor, chunk: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """Cross entropy over the vocabulary; never more than a chunk's logits are in memory.

    A frozen head's gradient is taken while a chunk's logits are there, and kept as ``[N, h]``: one
    projection forward and one back, as without chunks. With a trained head, chunks are computed again.

    Args:
        head: Makes logits ``[n, V]`` of hidden states ``[n, h]``.
        hidden: ``[N, h]``.
        targets: Token ids ``[N]``.
        chunk: Rows at a time; by default as many as keep a chunk's logits at 64 MB.

    Returns:
        Losses in float32, and whether the target had the largest logit, each ``[N]``; None for the latter where
        gradients are taken: it costs a pass over all logits, and is of no use to a loss.
    """
    step = chunk or max(1, _CHUNK_BYTES // (4 * len(head.projection.weight)))
    parts = list(zip(torch.split(hidden, step), torch.split(targets, step)))
    if not torch.is_grad_enabled():
        results = []
        for states, wanted in parts:
            logits = head(states).float()
            results.append((_cross_entropy(logits, wanted), logits.argmax(-1) == wanted))
        losses, hits = (torch.cat(values) for values in zip(*results))
        return losses, hits
    if head.is_trained:
        return torch.cat([checkpoint(_losses, head, *part, use_reentrant=False) for part in parts]), None
    frozen_losses: Tensor = _FrozenHeadLoss.apply(hidden, head, parts)  # type: ignore[no-untyped-call]
    return frozen_losses, None


def _losses(head: VocabularyHead, hidden: Tensor, targets: Tensor) -> Tensor:
    return _cross_entropy(head(hidden).float(), targets)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets, reduction="none")


class _FrozenHeadLoss(torch.autograd.Function):
    """Losses of places that do not depend on each other: the gradient of each is kept, and scaled in the backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: VocabularyHead, parts: list[tuple[Tensor, Tensor]]) -> Tensor:
        losses: list[Tensor] = []
        gradients: list[Tensor] = []
        for states, targets in parts:
            with torch.set_grad_enabled(hidden.requires_grad):
                states = states.detach().requires_grad_(hidden.requires_grad)
                loss = _losses(head, states, targets)
                if hidden.requires_grad:
                    gradients += torch.autograd.grad(loss.sum(), states)
            losses.append(loss.detach())
        if gradients:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, of_losses: Tensor) -> tuple[Tensor, None, None]:
        (of_hidden,) = ctx.saved_tensors
        return of_hidden * of_losses.unsqueeze(-1).to(of_hidden.dtype), None, None


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

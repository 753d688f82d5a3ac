"""A language model's own head, as its class defines it, on hidden states that are at hand."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

from lopa_lightning.backbones.pretrained import hidden_size
from lopa_lightning.errors import LoPAError, one_line

_CHUNK_BYTES = 2**26


class VocabularyHead:
    """Runs a language model's own head on chosen hidden states, for all of the vocabulary.

    It runs the model's ``forward`` on a copy that shares every weight, in which the layers are replaced by the hidden
    states at hand. Transforms before the projection to the vocabulary, scales and caps after it stay the model's.

    Args:
        model: With a language model head.

    Raises:
        LoPAError: If its head reads more than hidden states.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.projection = cast(Any, model).get_output_embeddings()
        self.model = _with_replaced(model, {id(model.base_model): _GivenStates()})
        # A quantised layer takes no other weights in its place; its model was tried before it was quantised.
        is_quantised = getattr(model.config, "quantization_config", None) is not None
        self._selects = is_quantised or self._is_selective(hidden_size(model.config))

    def __call__(self, hidden: Tensor, token_ids: Tensor | None = None) -> Tensor:
        """Computes logits.

        Args:
            hidden: Hidden states ``[N, h]``.
            token_ids: The tokens that are wanted, ``[n]``: of the projection to the vocabulary only their rows are
                computed. None for all.

        Returns:
            ``[N, V]`` or ``[N, n]``.
        """
        if token_ids is None or not self._selects:
            logits = self._run(hidden, {})
            return logits if token_ids is None else logits[:, token_ids]
        # Read at every call, not copied once: the weights may be moved or sharded meanwhile.
        weights = dict(self.model.named_parameters())
        return self._run(hidden, {name: weights[name][token_ids] for name in self._rows()})

    def _run(self, hidden: Tensor, weights: dict[str, Tensor]) -> Tensor:
        logits: Tensor = functional_call(self.model, weights, kwargs={"inputs_embeds": hidden.unsqueeze(0)}).logits
        return logits.squeeze(0)

    def _rows(self) -> list[str]:
        """Names of what has a row for each token in the projection to the vocabulary."""
        size = len(self.projection.weight)
        whole = {id(parameter) for parameter in self.projection.parameters() if len(parameter) == size}
        return [name for name, parameter in self.model.named_parameters() if id(parameter) in whole]

    def _is_selective(self, width: int) -> bool:
        """Whether some rows of the projection give the logits of their tokens; tried on the ``meta`` device."""
        every = [*self.model.named_parameters(), *self.model.named_buffers()]
        weights = {name: torch.empty(each.shape, dtype=each.dtype, device="meta") for name, each in every}
        hidden = torch.empty(2, width, dtype=self.projection.weight.dtype, device="meta")
        with torch.no_grad():
            try:
                self._run(hidden, weights)
            except Exception as error:  # whatever a head makes of what it does not find
                what = f"the language model head of {type(self.model).__name__} reads more than hidden states"
                raise LoPAError(f"{what}: {one_line(error)}; use another backbone, or objective: head") from error
            try:
                return self._run(hidden, weights | {name: weights[name][:3] for name in self._rows()}).shape == (2, 3)
            except Exception:  # as of a bias that is no part of the projection
                return False

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
    if torch.is_grad_enabled() and head.is_trained:
        return torch.cat([checkpoint(_losses, head, *part, use_reentrant=False) for part in parts]), None
    if torch.is_grad_enabled() and hidden.requires_grad:
        return _frozen_losses(head, parts), None
    results = []
    for states, wanted in parts:
        logits = head(states).float()
        results.append((F.cross_entropy(logits, wanted, reduction="none"), logits.argmax(-1) == wanted))
    losses, hits = (torch.cat(values) for values in zip(*results))
    return losses, hits


def _losses(head: VocabularyHead, hidden: Tensor, targets: Tensor) -> Tensor:
    """Returns the cross entropy of each target in float32."""
    return F.cross_entropy(head(hidden).float(), targets, reduction="none")


def _frozen_losses(head: VocabularyHead, parts: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Returns losses of which each chunk's gradient is taken while its logits are there."""
    losses = []
    for states, targets in parts:
        own = states.detach().requires_grad_()
        loss = _losses(head, own, targets)
        (gradient,) = torch.autograd.grad(loss.sum(), own)
        # What is added is 0, and its gradient is the loss's: no position's loss depends on another's states.
        losses.append(loss.detach() + ((states - states.detach()) * gradient).sum(-1).to(loss.dtype))
    return torch.cat(losses)


class _GivenStates(nn.Module):
    """Stands in for the layers: returns the embeddings it is given as hidden states."""

    @property
    def decoder(self) -> _GivenStates:
        """OPT's language model calls its layers by this name."""
        return self

    def forward(self, *_: object, inputs_embeds: Tensor, **__: object) -> _States:
        return _States(last_hidden_state=inputs_embeds)


class _States(BaseModelOutputWithPoolingAndCrossAttentions):
    """Hidden states, and None for what else a head passes on, such as a router's logits."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


def _with_replaced(module: nn.Module, replacements: dict[int, nn.Module]) -> nn.Module:
    """Returns a copy of ``module`` with other submodules in place of some (by ``id``); it shares all the rest."""
    if id(module) in replacements:
        return replacements[id(module)]
    parts = {name: child and _with_replaced(child, replacements) for name, child in module._modules.items()}
    if all(parts[name] is child for name, child in module._modules.items()):
        return module
    twin = copy.copy(module)
    twin.__dict__["_modules"] = parts
    return twin

"""The frozen instance encoder: a text's tokens in, one vector out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from lopa_lightning.errors import LoPAError
from lopa_lightning.frozen.loading import Dtype, PretrainedSpec

Pooling = Literal["cls", "mean", "last", "max"]

BACKBONE = "backbone"


@dataclass(frozen=True)
class InstanceEncoderSpec:
    """Which model reads an instance, and how its hidden states become one vector.

    Args:
        name: ``backbone`` for the backbone itself (one copy in memory), else like
            :class:`~lopa_lightning.frozen.loading.PretrainedSpec`'s.
        pooling: ``cls``: the first token's hidden state; ``last``: the last token's; ``mean`` and
            ``max``: over the text's tokens.
        normalize: Whether vectors are scaled to length 1.
        trainable: Whether the encoder is trained (and saved) as well, as the paper's released NLU code does.
        max_length: Tokens of the text that it reads at most; None for as many as it has positions.
        revision: Branch, tag or commit on the hub.
        dtype: Number format of the weights.
        attn_implementation: See :class:`~lopa_lightning.frozen.loading.PretrainedSpec`.
        trust_remote_code: Whether Python code that comes with the model may run.

    Raises:
        LoPAError: If ``pooling`` is unknown, or the backbone is asked to be trained.
    """

    name: str = BACKBONE
    pooling: Pooling = "mean"
    normalize: bool = False
    trainable: bool = False
    max_length: int | None = None
    revision: str | None = None
    dtype: Dtype = "auto"
    attn_implementation: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        _check_pooling(self.pooling)
        if self.is_backbone and self.trainable:
            raise LoPAError("instance_encoder.trainable needs an encoder of its own: the backbone stays frozen")

    @property
    def is_backbone(self) -> bool:
        """Whether the backbone itself is the encoder."""
        return self.name == BACKBONE

    def pretrained(self) -> PretrainedSpec:
        """How to load the encoder's own model."""
        return PretrainedSpec(self.name, self.revision, self.dtype, self.attn_implementation, self.trust_remote_code)


def pool(hidden: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """Makes one vector of a sequence of hidden states.

    Args:
        hidden: Hidden states ``[B, L, h]``.
        mask: 1 at the tokens that count, ``[B, L]``; every row has at least one.
        pooling: ``cls`` (the first that counts), ``last``, ``mean`` or ``max``.

    Returns:
        ``[B, h]``.

    Raises:
        LoPAError: If ``pooling`` is unknown.

    Example:
        >>> hidden, mask = torch.tensor([[[9.0], [1.0], [3.0]]]), torch.tensor([[0, 1, 1]])
        >>> [pool(hidden, mask, p).item() for p in ("cls", "mean", "last", "max")]
        [1.0, 2.0, 3.0, 3.0]
    """
    _check_pooling(pooling)
    if pooling == "mean":
        weight = mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weight).sum(1) / weight.sum(1)
    if pooling == "max":
        return hidden.masked_fill(mask.unsqueeze(-1) == 0, float("-inf")).amax(1)
    first = mask.argmax(1) if pooling == "cls" else mask.shape[1] - 1 - mask.flip(1).argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), first]


class InstanceEncoder(nn.Module):
    """Turns the tokens of instances into vectors.

    Args:
        model: A model without a head. If it is shared with the backbone, it is not registered here
            a second time.
        spec: Pooling and normalisation.
        shared: Whether ``model`` belongs to the backbone.
    """

    def __init__(self, model: PreTrainedModel, spec: InstanceEncoderSpec, shared: bool = False) -> None:
        super().__init__()
        self.spec = spec
        if shared:
            self._shared = [model]  # in a list, so that torch does not register the backbone's weights twice
        else:
            self.model = model.requires_grad_(spec.trainable)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Encodes instances.

        Args:
            input_ids: ``[B, S]``, by the encoder's own tokenizer.
            attention_mask: ``[B, S]``.

        Returns:
            Float32 vectors ``[B, e]``, without gradient unless the encoder is trained.
        """
        model = self._shared[0] if hasattr(self, "_shared") else self.model
        with torch.set_grad_enabled(self.spec.trainable and torch.is_grad_enabled()):
            hidden = model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            vector = pool(hidden, attention_mask, self.spec.pooling).float()
            return F.normalize(vector, dim=-1) if self.spec.normalize else vector

    def train(self, mode: bool = True) -> InstanceEncoder:
        """Keeps a frozen encoder in eval mode: an instance's vector never changes."""
        super().train(mode and self.spec.trainable)
        return self


def _check_pooling(pooling: str) -> None:
    if pooling not in get_args(Pooling):
        raise LoPAError(f"pooling must be one of {', '.join(get_args(Pooling))}, got {pooling!r}")

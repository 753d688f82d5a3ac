"""The instance encoder, frozen, adapted or trained: an instance in, one vector out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from lopa_lightning.backbones.adapters import adapt, adapter_layers
from lopa_lightning.backbones.base import Batch, InputKind
from lopa_lightning.backbones.pretrained import Dtype, PretrainedSpec, in_eval_mode
from lopa_lightning.errors import LoPAError, one_of

Pooling = Literal["cls", "mean", "last", "max"]

Control = Literal["shuffled", "constant"]

BACKBONE = "backbone"


@dataclass(frozen=True)
class InstanceEncoderSpec:
    """Which model reads an instance, and how its hidden states become one vector.

    Args:
        name: ``backbone`` for the backbone itself, one copy in memory (two where one of both is trained);
            else like :class:`~lopa_lightning.backbones.pretrained.PretrainedSpec`'s.
        pooling: ``cls``: the first token's hidden state; ``last``: the last token's; ``mean`` and
            ``max``: over the text's tokens.
        normalize: Whether vectors are scaled to a root mean square of 1. Encoders differ twentyfold in scale, and
            prompt encoders are initialised for about 1; the paper's released code takes them as they come.
        trainable: Whether the encoder is trained (and saved) as well, as the paper's released NLU code does.
        cache: Whether a frozen encoder's vectors are made once on a machine and kept beside the data sets' cache;
            the encoder is then not in memory while prompts are trained. False to encode every batch again.
        dropout: Whether a frozen encoder's own dropout is active in training, as in the paper's released code; every
            batch is then encoded. A trainable encoder's always is.
        adapter: A PEFT adapter in the encoder, as in ``adapter_config.json``, such as ``{peft_type: LORA, r: 8}``. It
            is trained, and of the encoder it alone is saved; the backbone is left as it is.
        control: For experiments that ask whether the instance matters, in training and evaluation alike: each example
            is given the vector of the one before it in its batch (``shuffled``), or all get one (``constant``), to
            make its soft prompt of; ``instance_loss`` reads its own all the same.
        max_length: Tokens of the text that it reads at most; None for as many as it has positions.
        revision: Branch, tag or commit on the hub.
        dtype: Dtype of the weights; ``auto`` takes the one they were saved in.
        attn_implementation: See :class:`~lopa_lightning.backbones.pretrained.PretrainedSpec`.
        trust_remote_code: Whether Python code that comes with the model may run.

    Raises:
        LoPAError: If ``pooling`` or ``dtype`` is unknown, ``max_length`` below 1, all of the encoder is to be trained
            beside its adapter, the backbone is the encoder and is to have a dropout of its own, ``control`` is unknown,
            or all examples get one vector and the encoder is to be trained.
    """

    name: str = BACKBONE
    pooling: Pooling = "mean"
    normalize: bool = True
    trainable: bool = False
    max_length: int | None = None
    revision: str | None = None
    dtype: Dtype = "auto"
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    cache: bool = True
    dropout: bool = False
    adapter: dict[str, Any] | None = None
    control: Control | None = None

    def __post_init__(self) -> None:
        one_of("pooling", self.pooling, get_args(Pooling))
        one_of("dtype", self.dtype, get_args(Dtype))
        if self.max_length is not None and self.max_length < 1:
            raise LoPAError(f"instance_encoder.max_length must be at least 1, got {self.max_length}")
        if self.adapter is not None and self.trainable:
            raise LoPAError("give instance_encoder.adapter or instance_encoder.trainable, not both")
        if self.dropout and self.is_backbone and not self.is_trained:
            raise LoPAError("instance_encoder.dropout needs a model of its own, not name: backbone")
        if self.control is not None:
            one_of("instance_encoder.control", self.control, get_args(Control))
        if self.control == "constant" and self.is_trained:
            raise LoPAError(
                "instance_encoder.control: constant gives a trained or adapted encoder nothing to learn from"
            )

    @property
    def is_trained(self) -> bool:
        """Whether anything in the encoder is trained: all of it, or its adapter."""
        return self.trainable or self.adapter is not None

    @property
    def is_varying(self) -> bool:
        """Whether an instance's vector changes in training."""
        return self.is_trained or self.dropout

    @property
    def is_backbone(self) -> bool:
        """Whether the backbone itself is the encoder."""
        return self.name == BACKBONE

    def pretrained(self) -> PretrainedSpec:
        """Returns how to load the encoder's own model."""
        return PretrainedSpec(self.name, self.revision, self.dtype, self.attn_implementation, self.trust_remote_code)


def pool(hidden: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """Makes one vector of a sequence of hidden states.

    Args:
        hidden: Hidden states ``[B, L, h]``.
        mask: 1 at the tokens that count, ``[B, L]``; every row has at least one.
        pooling: ``cls`` (the first that counts), ``last``, ``mean`` or ``max``.

    Returns:
        ``[B, h]``; a mean is in float32 at least.

    Raises:
        LoPAError: If ``pooling`` is unknown.

    Example:
        >>> hidden, mask = torch.tensor([[[9.0], [1.0], [3.0]]]), torch.tensor([[0, 1, 1]])
        >>> [pool(hidden, mask, p).item() for p in ("cls", "mean", "last", "max")]
        [1.0, 2.0, 3.0, 3.0]
    """
    one_of("pooling", pooling, get_args(Pooling))
    if pooling == "mean":
        # Summed in float32: bfloat16 cannot hold 257.
        weight = mask.unsqueeze(-1).to(hidden.dtype)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        return (hidden * weight).sum(1, dtype=wide) / mask.sum(1, keepdim=True)
    if pooling == "max":
        return hidden.masked_fill(mask.unsqueeze(-1) == 0, float("-inf")).amax(1)
    first = mask.argmax(1) if pooling == "cls" else mask.shape[1] - 1 - mask.flip(1).argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), first]


def controlled(vectors: Tensor, control: Control | None) -> Tensor:
    """Replaces instance vectors by those of a control.

    Args:
        vectors: ``[B, e]``.
        control: ``shuffled``: each row gets the one before it, the first the last one's, so that no example of a batch
            of two or more keeps its own; a batch of one gets zeros. ``constant``: all get ones, whose root mean square
            is that of normalised vectors. None: as they are.

    Example:
        >>> controlled(torch.tensor([[1.0], [2.0], [3.0]]), "shuffled").flatten().tolist()
        [3.0, 1.0, 2.0]
    """
    if control == "constant":
        return torch.ones_like(vectors)
    if control == "shuffled":
        return vectors.roll(1, 0) if len(vectors) > 1 else vectors * 0.0
    return vectors


class InstanceEncoder(nn.Module):
    """Turns instances into vectors.

    Args:
        model: A model without a head, or what loads one once it is needed.
        spec: Pooling and normalisation; with an adapter, ``model`` is given it.
        kind: Of input that it reads.
        shared: Whether ``model`` belongs to the backbone. It is then not registered here a second time; nor is
            one that is loaded later, which comes and goes.
    """

    def __init__(
        self,
        model: PreTrainedModel | Callable[[], PreTrainedModel],
        spec: InstanceEncoderSpec,
        kind: InputKind,
        shared: bool = False,
    ) -> None:
        super().__init__()
        self._kind = kind
        self.spec = spec
        self.shared = shared
        self._load: Callable[[], PreTrainedModel] | None = None
        self.is_checked = False
        """Whether it was looked at what padding does to a vector; to be set where there are no values to compare."""
        # In a list, so that torch does not register it.
        self._unregistered: list[PreTrainedModel] = []
        if not isinstance(model, PreTrainedModel):
            self._load = model
        elif shared:
            self._unregistered.append(model)
        else:
            self.model = model.requires_grad_(spec.trainable)
            if spec.adapter is not None:
                adapt(self.model, spec.adapter, "instance_encoder.adapter")
        self._adapted = adapter_layers(self.model) if spec.adapter is not None else []

    @property
    def own_model(self) -> PreTrainedModel | None:
        """The model that is registered here; None if there is none."""
        return None if self.shared or self._load is not None else self.model

    def loaded(self) -> PreTrainedModel:
        """Returns the model, loaded if it is not there."""
        if self._load is not None and not self._unregistered:
            # As if nothing happened: what is drawn next, and what may later be part of a graph.
            with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
                self._unregistered.append(self._load())
        return self._unregistered[0] if self._unregistered else self.model

    def release(self) -> None:
        """Gives back the memory of a model that can be loaded again."""
        if self._load is not None:
            self._unregistered.clear()

    def forward(self, batch: Batch) -> Tensor:
        """Encodes instances.

        Args:
            batch: With what the encoder reads: of texts ``instance_input_ids``, ``instance_attention_mask`` and perhaps
                ``instance_token_type_ids``, each ``[B, S]``, by the encoder's own tokenizer.

        Returns:
            Float32 vectors ``[B, e]``, without gradient unless the encoder is trained.
        """
        model = self.loaded()
        if self._load is not None:  # the others are where their owner put them
            with torch.inference_mode(False):
                cast(nn.Module, model).to(next(iter(batch.values())).device)
        if not self.is_checked:
            self.is_checked = True
            with torch.no_grad(), in_eval_mode(model):
                self._kind.check_instances(self)
        return self.vectors(batch)

    def vectors(self, batch: Batch) -> Tensor:
        """Encodes instances with a model that is on its device; see :meth:`forward`."""
        model = self.loaded()
        # A backbone may be in training mode while it serves as a frozen encoder.
        is_still = model.training and not self.spec.is_varying
        with (
            in_eval_mode(model) if is_still else contextlib.nullcontext(),
            torch.set_grad_enabled(self.spec.is_trained and torch.is_grad_enabled()),
        ):
            vector = pool(*self._kind.instance_states(model, batch), self.spec.pooling).float()
            return F.rms_norm(vector, vector.shape[-1:]) if self.spec.normalize else vector

    def train(self, mode: bool = True) -> InstanceEncoder:
        """Keeps a frozen encoder in eval mode, unless its dropout was asked for; an adapter's dropout is its own."""
        super().train(mode and (self.spec.trainable or self.spec.dropout))
        for layer in self._adapted:
            layer.train(mode)
        return self

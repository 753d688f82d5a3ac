"""Several texts in one row, each of which sees itself alone: padding is not computed.

All that a transformer does token by token then runs on the tokens that are there, as ``[1, N, ...]``. Attention alone
must know which text a token is of: it is given a :class:`Packing` with the other options that transformers hands
on to a model's attention function.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lopa_lightning.errors import LoPAError

ATTENTION = "sdpa_packed"
"""What the attention of a model that is given packed rows is called. Of others it is ``sdpa``."""


@dataclass(frozen=True)
class Rectangle:
    """Places of tokens in a padded batch, ``[B, L]``.

    Attributes:
        shape: ``(B, L)``.
        places: Place of each token in the flattened batch, ``[N]``.
        tokens: For each place the token there, any at padding, ``[B * L]``.
        padding: The places without a token, ``[B * L - N]``.
    """

    shape: tuple[int, int]
    places: Tensor
    tokens: Tensor
    padding: Tensor

    @classmethod
    def of(cls, mask: Tensor) -> Rectangle:
        """That of a mask which is not 0 at tokens, ``[B, L]``."""
        flat = mask.flatten().bool()
        tokens = (flat.cumsum(0) - 1).clamp(min=0)
        return cls((mask.shape[0], mask.shape[1]), flat.nonzero().squeeze(1), tokens, (~flat).nonzero().squeeze(1))

    def pack(self, padded: Tensor) -> Tensor:
        """From ``[B, L, ...]`` to ``[1, N, ...]``."""
        return _moved(padded.flatten(0, 1), self, pack=True).unsqueeze(0)

    def unpack(self, packed: Tensor) -> Tensor:
        """From ``[1, N, ...]`` to ``[B, L, ...]``, with zeros at padding."""
        padded = _moved(packed.squeeze(0), self, pack=False)
        return padded.view(*self.shape, *padded.shape[1:])

    def _move(self, flat: Tensor, pack: bool) -> Tensor:
        if pack:
            return flat.index_select(0, self.places)
        return flat.index_select(0, self.tokens).index_fill_(0, self.padding, 0)


class _Move(torch.autograd.Function):
    """Packs or unpacks; the backward pass of either is the other, where torch's would add up what has one term."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, rectangle: Rectangle, pack: bool) -> Tensor:
        ctx.rectangle, ctx.pack = rectangle, pack
        return rectangle._move(flat, pack)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.rectangle._move(gradient, not ctx.pack), None, None


def _moved(flat: Tensor, rectangle: Rectangle, pack: bool) -> Tensor:
    moved: Tensor = _Move.apply(flat, rectangle, pack)  # type: ignore[no-untyped-call]
    return moved


@dataclass(frozen=True)
class Packing:
    """Which token of a row is of which text.

    Attributes:
        batch: Where tokens lie in the batch that they come from, padded on either side.
        aligned: Where they lie with each text from the first place on, as long as the longest.
        mask: Of the aligned ones, ``[B, L]``.
        starts: Where each text starts in the row and, last, its end, ``[B + 1]``.
        shortest: Tokens of the shortest text.
        seen: The attention modules that looked at this.
    """

    batch: Rectangle
    aligned: Rectangle
    mask: Tensor
    starts: Tensor
    shortest: int
    seen: list[nn.Module] = field(default_factory=list)

    @classmethod
    def of(cls, mask: Tensor) -> Packing:
        """That of a batch with at least a token in each row.

        Args:
            mask: Not 0 at tokens, ``[B, L]``; those of a row are contiguous.
        """
        lengths = mask.bool().sum(1)
        shortest, longest = torch.stack(lengths.aminmax()).tolist()
        aligned = torch.arange(longest, device=mask.device) < lengths[:, None]
        return cls(Rectangle.of(mask), Rectangle.of(aligned), aligned, F.pad(lengths.cumsum(0), (1, 0)), shortest)

    def positions(self, first: int) -> Tensor:
        """Positions of the row's tokens, counted within each text, ``[1, N]``.

        Args:
            first: Position of a text's first token.
        """
        places = torch.arange(first, first + self.mask.shape[1], device=self.mask.device)
        return self.aligned.pack(places.expand(self.mask.shape))


def take_packed(model: PreTrainedModel) -> None:
    """Lets the attention of a model take packed rows.

    Args:
        model: Changed in place.

    Raises:
        LoPAError: If its attention is not torch's ``sdpa``.
    """
    found = model.config._attn_implementation
    if found not in ("sdpa", ATTENTION):
        raise LoPAError(
            f"pack needs attn_implementation: sdpa, and that of {type(model).__name__} is {found!r} (flash attention "
            "leaves padding out by itself); use another, or pack: false"
        )
    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    model.set_attn_implementation(ATTENTION)


def packed_input(packing: Packing) -> dict[str, Any]:
    """What a model that takes packed rows is given with one, beside embeddings and positions."""
    # A mask of four dimensions is passed on as it is. Without one, transformers would make that of [N, N].
    return {"attention_mask": packing.mask[:1, None, None], "packing": packing}


def check_seen(packing: Packing, model: PreTrainedModel) -> None:
    """Raises a LoPAError unless the attention of each of a model's layers looked at the packing in a forward pass."""
    layers = model.config.num_hidden_layers
    if len(packing.seen) != layers:
        raise LoPAError(
            f"{type(model).__name__} hands what texts are in a row on to {len(packing.seen)} of its {layers} layers' "
            "attention, so texts would see each other; use pack: false"
        )


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packing: Packing | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention by torch, of every text of a packed row by itself.

    Args:
        module: Of the model.
        query: ``[B, H, L, d_h]``.
        key: ``[B, H_kv, L, d_h]``.
        value: As ``key``.
        attention_mask: Of rows that are not packed.
        packing: Of packed rows; B is then 1.
        **options: Others that transformers' attention functions are given.

    Returns:
        ``[B, L, H, d_h]``, and no weights.

    Raises:
        LoPAError: If the attention of packed rows is of another kind than torch's.
    """
    if packing is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    packing.seen.append(module)
    is_causal = _sees_no_later_token(module, options.pop("is_causal", None))
    _check_plain(module, packing, options)
    query, key, value = (states.transpose(1, 2) for states in (query, key, value))
    if _has_kernels(query):
        return _variable_length(module, query, key, value, packing, is_causal, options), None
    query, key, value = (packing.aligned.unpack(states).transpose(1, 2) for states in (query, key, value))
    # A causal text's padding comes after all that is read, and needs no mask.
    mask = None if is_causal else packing.mask[:, None, None]
    output, _ = sdpa_attention_forward(module, query, key, value, mask, is_causal=is_causal, **options)
    return packing.aligned.pack(output), None


def _has_kernels(states: Tensor) -> bool:
    """Whether torch has kernels for texts of several lengths where these are; a CPU has none for causal ones."""
    return states.is_cuda


def _variable_length(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    is_causal: bool,
    options: dict[str, Any],
) -> Tensor:
    """By torch's kernels for texts of several lengths, in and out ``[1, N, H, d_h]``."""
    groups = getattr(module, "num_key_value_groups", 1)
    heads = (query.transpose(1, 2), repeat_kv(key.transpose(1, 2), groups), repeat_kv(value.transpose(1, 2), groups))
    nested = [
        torch.nested.nested_tensor_from_jagged(
            states[0].transpose(0, 1).contiguous(),
            packing.starts,
            min_seqlen=packing.shortest,
            max_seqlen=packing.mask.shape[1],
        ).transpose(1, 2)
        for states in heads
    ]
    output: Tensor = F.scaled_dot_product_attention(
        nested[0],
        nested[1],
        nested[2],
        dropout_p=options.get("dropout", 0.0),
        is_causal=is_causal,
        scale=options.get("scaling"),
    )
    rows: Tensor = output.transpose(1, 2).values()
    return rows.unsqueeze(0)


def _sees_no_later_token(module: nn.Module, told: bool | None) -> bool:
    """Whether attention is causal, as the call or else the module says; a LoPAError if neither does."""
    says: bool | None = getattr(module, "is_causal", None) if told is None else told
    if says is None:
        raise LoPAError(
            f"{type(module).__name__} does not say whether a token sees those after it (is_causal); use pack: false"
        )
    return says


def _check_plain(module: nn.Module, packing: Packing, options: dict[str, Any]) -> None:
    """Raises a LoPAError if attention is more than a softmax of queries and keys, over all of a text."""
    window = options.get("sliding_window")
    more = [name for name in ("softcap", "s_aux", "position_bias") if options.get(name) is not None]
    if window is not None and window < packing.mask.shape[1]:
        more.append(f"sliding_window of {window}")
    if more:
        name = type(module).__name__
        raise LoPAError(f"{name} has a {', '.join(more)}, which packed rows are not computed with; use pack: false")

"""Several texts in one row, each of which sees itself alone: padding is not computed.

All that a transformer does token by token then runs on the tokens that are there, as ``[1, N, ...]``. Attention alone
must know which text a token is of: it is given a :class:`Packing` with the other options that transformers hands
on to a model's attention function.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

from lopa_lightning.errors import LoPAError

_OTHER = "use another backbone, or pack: false"
_NOT_PLAIN = ("softcap", "s_aux", "sinks", "position_bias", "attention_bias", "indices", "block_indices")
"""What transformers' attention functions may be given that changes what they compute."""


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
        mask: Of the same texts, each from the first place on, as long as the longest, ``[B, L]``.
        starts: Where each text starts in the row and, last, its end, ``[B + 1]``.
        shortest: Tokens of the shortest text.
        given: The mask that the model is given with a row, which hides nothing. Of four dimensions it is handed on as
            it is; in place of none, transformers would make one of ``[N, N]``.
        seen: The attention modules that looked at this.
    """

    batch: Rectangle
    mask: Tensor
    starts: Tensor
    shortest: int
    given: Tensor
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
        starts = F.pad(lengths.cumsum(0), (1, 0))
        return cls(Rectangle.of(mask), aligned, starts, shortest, aligned.new_ones(1, 1, 1, 1))

    @functools.cached_property
    def aligned(self) -> Rectangle:
        """Where tokens lie under ``mask``."""
        return Rectangle.of(self.mask)

    def options(self) -> dict[str, Any]:
        """What a model is given with a row, beside embeddings and positions."""
        return {"attention_mask": self.given, "packing": self}

    def check_seen(self, model: PreTrainedModel) -> None:
        """Raises a LoPAError unless a model's attention looked at this once in each layer."""
        layers, seen = model.config.num_hidden_layers, len(self.seen)
        if seen != layers:
            raise LoPAError(
                f"{seen} attentions were told which texts are in a row by the {layers} layers of "
                f"{type(model).__name__}, so not each has one that takes packed rows; {_OTHER}"
            )


def take_packed(model: PreTrainedModel) -> int | None:
    """Lets the attention of models take packed rows.

    Args:
        model: That will be given some.

    Returns:
        The longest text that attention takes packed, its sliding window; None where it is not limited.

    Raises:
        LoPAError: If this one's attention is known not to be torch's, over whole texts.
    """
    config, name = model.config, type(model).__name__
    if not getattr(model, "_supports_sdpa", False):
        raise LoPAError(f"pack needs torch's attention (sdpa), which {name} has not; {_OTHER}")
    if config._attn_implementation != "sdpa":
        raise LoPAError(
            f"pack needs torch's attention (sdpa); that of {name} is {config._attn_implementation!r}; {_OTHER}"
        )
    kinds = set(getattr(config, "layer_types", None) or [])
    if others := sorted(kinds - {"full_attention", "sliding_attention"}):
        raise LoPAError(f"pack needs layers of attention alone; {name} has {', '.join(others)}; {_OTHER}")
    AttentionInterface.register("sdpa", attention)
    slides = not kinds or "sliding_attention" in kinds
    return getattr(config, "sliding_window", None) if slides else None


def check_same(packed: Tensor, padded: Tensor, model: PreTrainedModel) -> None:
    """Raises a LoPAError unless texts are the same packed as padded, but for rounding.

    What mixes tokens outside of attention, or counts positions by itself, shows in nothing else.

    Args:
        packed: Hidden states of texts that were packed, ``[N, h]``.
        padded: Of the same ones padded.
        model: Whose they are.
    """
    kinds = {packed.dtype, *(parameter.dtype for parameter in model.parameters())}
    limit = 0.1 if kinds & {torch.bfloat16, torch.float16} else 1e-3
    difference = float((packed - padded).float().norm() / padded.float().norm())
    if not difference < limit:
        raise LoPAError(
            f"{type(model).__name__} does not compute a text in a row with others as it does alone (hidden states "
            f"differ by {difference:.1%}); {_OTHER}"
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without gradients, dropout or autocast."""
    modes = {module: module.training for module in model.modules()}
    kind = next(model.parameters()).device.type
    for module in modes:
        module.training = False
    try:
        with torch.no_grad(), torch.autocast(kind, enabled=False):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


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
        attention_mask: Of rows that are not packed; of others the packing's ``given``.
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
    _check_plain(module, attention_mask, packing, options)
    is_causal = _sees_no_later_token(module, options.pop("is_causal", None))
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
            f"{type(module).__name__} does not say whether a token sees those after it (is_causal); {_OTHER}"
        )
    return says


def _check_plain(module: nn.Module, mask: Tensor | None, packing: Packing, options: dict[str, Any]) -> None:
    """Raises a LoPAError if attention is more than a softmax of queries and keys, over all of a text."""
    more = [f"has {name}" for name in _NOT_PLAIN if options.get(name) is not None]
    window = options.get("sliding_window")
    if window is not None and window < packing.mask.shape[1]:
        more.append(f"sees {window} of {packing.mask.shape[1]} tokens")
    if mask is None or mask.data_ptr() != packing.given.data_ptr():
        more.append("has a mask of its own")
    if more:
        raise LoPAError(f"{type(module).__name__} {' and '.join(more)}, which packed rows do without; {_OTHER}")

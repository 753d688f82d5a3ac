"""Checks that a text gets the same hidden states alone as padded in a batch, and from embeddings as from token ids."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lopa_lightning.backbones.injection import position_ids
from lopa_lightning.backbones.pretrained import accepted_inputs, first_position, in_eval_mode, is_causal
from lopa_lightning.errors import LoPAError
from lopa_lightning.task import Side

if TYPE_CHECKING:
    from lopa_lightning.backbones.text import TextBackbone

_SHORT, _LONG, _VIRTUAL = 6, 18, 8  # tokens
_WIDEST = 1024  # the window of local attention that a check still looks across, in tokens


def check_padding(backbone: TextBackbone, num_virtual_tokens: int, side: Side, pad_id: int) -> None:
    """Compares the states of a short text alone and padded to a longer one; warns if the model itself mixes padding in.

    Two short forward passes, or three with virtual tokens in every layer; two more where states differ. If they do so
    only because a text is read in two parts, with its padding between them, it is read at once from then on. It is to
    be called on all processes, and with weights.

    Args:
        backbone: The model and where its virtual tokens go.
        num_virtual_tokens: Number m of virtual tokens.
        side: Where padding goes.
        pad_id: Token at padding.

    Raises:
        LoPAError: If padding changes states only because of where virtual tokens are.
    """
    name, allowed, m = type(backbone.body).__name__, tolerance(backbone.body), min(num_virtual_tokens, _VIRTUAL)
    with in_eval_mode(backbone):
        found = _change(backbone, m, side, pad_id)
        if not found <= allowed and backbone.reads_in_parts:
            backbone.reads_in_parts = False
            found = _change(backbone, m, side, pad_id)
        if found <= allowed:
            return
        own = _change(backbone, 0, side, pad_id)
    if own <= allowed:
        raise LoPAError(
            f"placement {backbone.placement!r} cannot be right with padding on the {side}: beside virtual tokens it "
            f"changes the hidden states of {name} by {found:.0%}, without them not at all; use another placement "
            "or another backbone"
        )
    warn_of_mixing(name, side, own)


@torch.no_grad()
def check_embeddings(backbone: TextBackbone) -> None:
    """Refuses a model that changes the embeddings of token ids, or counts their positions otherwise than is known here.

    Two short forward passes, to be called on all processes, and with weights.

    Args:
        backbone: The model.

    Raises:
        LoPAError: If a text's embeddings have other hidden states than its token ids.
    """
    body, weight = backbone.body, backbone.embedding_weight
    pad_id = getattr(body.config, "pad_token_id", None)  # where there is one, RoBERTa counts no position
    ids = torch.tensor([[index for index in range(len(weight)) if index != pad_id][-_SHORT:]], device=weight.device)
    embedded = backbone.model.get_input_embeddings()(ids)
    places = {"position_ids": position_ids(torch.ones_like(ids), first_position(body))}
    counted = places if "position_ids" in accepted_inputs(body) else {}

    def difference(own: Tensor, **given: Tensor) -> float:
        return float((body(**given).last_hidden_state.float() - own).norm() / own.norm())

    with in_eval_mode(backbone):
        own = body(input_ids=ids).last_hidden_state.float()
        change = difference(own, inputs_embeds=embedded, **counted)
        if not change <= tolerance(body):
            if difference(own, inputs_embeds=embedded) <= tolerance(body):
                raise LoPAError(
                    f"{type(body).__name__} counts the positions of tokens otherwise than from {first_position(body)}: "
                    f"states differ by {change:.0%}; use another backbone"
                )
            change = difference(own, inputs_embeds=embedded)
    if not change <= tolerance(body):
        raise LoPAError(
            f"{type(body).__name__} changes the embeddings of token ids and not those that it is given: a soft prompt "
            f"stands beside embeddings that no text has in it: states differ by {change:.0%}; use another backbone"
        )


@torch.no_grad()
def check_causal(backbone: TextBackbone) -> None:
    """Refuses a model in which a token sees a later one, where next tokens are learned: it would see what it is to say.

    Two short forward passes, to be called on all processes, and with weights; none where all of the model's attention
    says that it is causal.

    Args:
        backbone: The model.

    Raises:
        LoPAError: If a text's states change with its last token.
    """
    body, weight = backbone.body, backbone.embedding_weight
    if is_causal(body):
        return
    ids = torch.arange(len(weight), device=weight.device)[-_SHORT:]
    texts = torch.stack([ids, torch.cat([ids[:-1], ids[:1]])])
    with in_eval_mode(backbone):
        one, other = body(inputs_embeds=backbone.model.get_input_embeddings()(texts)).last_hidden_state[:, :-1].float()
    change = float((one - other).norm() / one.norm())
    if not change <= tolerance(body):
        raise LoPAError(
            f"{type(body).__name__} is not causal: a token's states change by {change:.0%} with a later token, which "
            "it is to predict; use a causal language model, or another objective"
        )


def warn_of_mixing(name: str, side: Side, change: float) -> None:
    """Warns that what a model computes for a text depends on the texts that it is batched with.

    Args:
        name: Of the model.
        side: Where padding goes.
        change: How much padding changes states, relative to their size.
    """
    rank_zero_warn(
        f"{name} mixes padding into a text's hidden states: padding on the {side} changes them by {change:.2%}, as in "
        "transformers itself. A text's answer depends on the batch that it is in; batches of one text have no padding"
    )


def tolerance(model: nn.Module) -> float:
    """Returns how much states may differ by rounding, relative to their size.

    Args:
        model: With the dtype, the device and the quantisation that it computes in.
    """
    dtypes = {parameter.dtype for parameter in model.parameters()}
    on_gpu = any(parameter.is_cuda for parameter in model.parameters())
    is_exact = dtypes <= {torch.float32, torch.float64} and not hasattr(model.config, "quantization_config")
    return 1e-3 if is_exact and not (on_gpu and torch.get_float32_matmul_precision() != "highest") else 0.1


@torch.no_grad()
def change_by_padding(
    states: Callable[[Tensor, Tensor], Tensor],
    vocabulary: int,
    side: Side,
    pad_id: int = 0,
    room: int | None = None,
    gap: int = 0,
    device: Any = None,
) -> float:
    """Returns how much padding changes the states of a short text, relative to their size.

    Args:
        states: From ids and mask ``[B, T]`` to the states of the first text's own tokens.
        vocabulary: Number of token ids.
        side: Where padding goes.
        pad_id: Token at padding.
        room: Tokens that a text may have at most; None for no limit.
        gap: Padding beside what there is by default.
        device: Of the ids.
    """
    length = _LONG + gap if room is None else min(_LONG + gap, room)
    if (short := min(_SHORT, length // 2)) < 1:
        return 0.0
    own = slice(length - short, None) if side == "left" else slice(short)
    ids = torch.randint(vocabulary, (2, length), generator=torch.Generator().manual_seed(0)).to(device)
    mask = torch.tensor([[0], [1]]).to(device).repeat(1, length)
    mask[0, own] = 1
    ids = ids.masked_fill(mask == 0, pad_id)
    padded, alone = states(ids, mask).float(), states(ids[:1, own], mask[:1, own]).float()
    return float((padded - alone).norm() / alone.norm())


def _change(backbone: TextBackbone, m: int, side: Side, pad_id: int) -> float:
    """Returns how much padding changes the states of a text after m virtual tokens."""
    weight, limit = backbone.embedding_weight, backbone.max_positions
    # Real tokens: any numbers would not be of the scale that a model's layers are made for.
    tokens = torch.arange(m) % len(weight)
    virtual = backbone.virtual_tokens(tokens).detach() if m else weight.new_zeros(0, backbone.prompt_dim)

    def states(ids: Tensor, mask: Tensor) -> Tensor:
        batch = {"input_ids": ids, "attention_mask": mask}
        if backbone.placement != "after":  # which is after all of a text; placements in a chat alone read it
            batch["prompt_position"] = mask.new_ones(len(mask))
        found = backbone(virtual[None], batch)
        own: Tensor = found.hidden[0][found.content_mask[0] == 1]
        return own

    gap = _window(backbone) if m and backbone.placement in ("every_layer", "after") else 0
    room = None if limit is None else limit - m
    return change_by_padding(states, len(weight), side, pad_id, room, gap, weight.device)


def _window(backbone: TextBackbone) -> int:
    """Returns the widest window of local attention, which padding between virtual tokens and text must not use up."""
    entries = backbone.body.config.to_dict().items()
    return max((n for key, n in entries if "window" in key and type(n) is int and n <= _WIDEST), default=0)

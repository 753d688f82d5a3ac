"""Where virtual tokens go among the tokens of a text. Pure functions on tensors.

Virtual tokens sit before a text's first token, at a position within it or after its last, wherever the padding is:
``prompt, text, pad, pad`` and ``pad, pad, prompt, text``, never ``prompt, pad, pad, text``. All that
goes with a token (embedding, mask, token type, label) is moved by one layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Placement = Literal["before", "after_first", "after", "every_layer", "system", "user"]
"""Where virtual tokens go: ``before`` a text's first token (as published), ``after_first``, between a ``[CLS]``
or ``<s>`` and the rest, ``after`` the text and before its answer (of a causal model), in ``every_layer`` as keys and
values, see :mod:`~lopa_lightning.backbones.prefix`, or in a chat's ``system`` message or before its ``user``'s text,
see :mod:`~lopa_lightning.backbones.chat`."""
CHAT_PLACEMENTS = ("system", "user")
"""The placements within a chat, at a position that its template decides."""


@dataclass(frozen=True)
class Layout:
    """Says where the content of each position of a prompted sequence comes from.

    Attributes:
        index: ``[B, m + T]`` into ``[virtual tokens; text]``: below m a virtual token, from m on one of the text.
        start: The first virtual token's position, where it is the same in every row and every text starts at the
            first position: nothing then need be looked up by the index. None where rows differ.
        positions: Where each of the text's tokens is in the prompted sequence, ``[B, T]``.
    """

    index: Tensor
    start: int | None
    positions: Tensor


def prompt_layout(attention_mask: Tensor, num_virtual_tokens: int, position: Tensor | int = 0) -> Layout:
    """Returns where the content of each position of the prompted sequence comes from.

    Args:
        attention_mask: 1 at the text's tokens, 0 at padding, ``[B, T]``. The ones of a row are contiguous.
        num_virtual_tokens: Number m of virtual tokens.
        position: How many of a text's own tokens stand before the virtual ones: of all texts, or of each, ``[B]``.

    Example:
        >>> prompt_layout(torch.tensor([[1, 1, 0], [0, 1, 1]]), num_virtual_tokens=2).index
        tensor([[0, 1, 2, 3, 4],
                [2, 0, 1, 3, 4]])
    """
    m, length = num_virtual_tokens, attention_mask.shape[1]
    before = position.unsqueeze(1) if isinstance(position, Tensor) else position
    start = attention_mask.argmax(dim=1, keepdim=True) + before
    place = torch.arange(m + length, device=attention_mask.device).expand(len(attention_mask), -1)
    in_prompt = (place >= start) & (place < start + m)
    index = torch.where(in_prompt, place - start, torch.where(place < start, place + m, place))
    text = place[:, :length]
    is_same = attention_mask[:, 0].all() & (start == start[0]).all()
    same = int(torch.where(is_same, start[0], -1))  # waits for the device, once
    return Layout(index, None if same < 0 else same, text + m * (text >= start))


def insert(layout: Layout, prompt: Tensor | int, text: Tensor) -> Tensor:
    """Puts the virtual tokens' part of something among the text's.

    Args:
        layout: From :func:`prompt_layout`.
        prompt: What the virtual tokens have, ``[B, m, ...]``, or one number for all of them.
        text: What the text's tokens have, ``[B, T, ...]``.

    Returns:
        Both in the layout's order, ``[B, m + T, ...]``.

    Example:
        >>> layout = prompt_layout(torch.tensor([[0, 1, 1]]), num_virtual_tokens=2)
        >>> insert(layout, -1, torch.tensor([[7, 8, 9]]))
        tensor([[ 7, -1, -1,  8,  9]])
    """
    index, start = layout.index, layout.start
    if isinstance(prompt, int):
        m = index.shape[1] - text.shape[1]
        prompt = text.new_full((len(text), m, *text.shape[2:]), prompt)
    if start is not None:  # a gather and its backward pass cost many times as much
        return torch.cat([text[:, :start], prompt, text[:, start:]], dim=1)
    both = torch.cat([prompt, text], dim=1)
    index = index.view(*index.shape, *[1] * (both.dim() - 2)).expand(-1, -1, *both.shape[2:])
    return both.gather(1, index)


def with_offset(embedded: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
    """Adds learned vectors to the embeddings of a text's first tokens, counted from its first real one.

    Args:
        embedded: Embeddings of the text, ``[B, T, d]``.
        offset: ``[s, d]``; tokens after the first s stay as they are.
        mask: 1 at the tokens that are counted, ``[B, T]``: all others stay as they are, too.

    Returns:
        ``[B, T, d]``.
    """
    positions = position_ids(mask)
    added = offset[positions.clamp(max=len(offset) - 1)].to(embedded.dtype)
    return embedded + added * ((positions < len(offset)) & (mask == 1)).unsqueeze(-1)


def position_ids(attention_mask: Tensor, offset: int = 0) -> Tensor:
    """Positions that count tokens and pass over padding.

    Args:
        attention_mask: ``[B, L]``.
        offset: Position of the first token (2 in RoBERTa, whose positions start after its padding index).

    Returns:
        ``[B, L]``; padding before the text gets the first token's position, which nothing reads.

    Example:
        >>> position_ids(torch.tensor([[0, 1, 1], [1, 1, 0]]), offset=2)
        tensor([[2, 2, 3],
                [2, 3, 3]])
    """
    return (attention_mask.cumsum(dim=1) - 1).clamp(min=0) + offset

"""Splits prompted texts before their virtual tokens, for a causal model that reads them in two parts.

No token sees a later one, so what stands before the first virtual token does not depend on the soft prompt: it is read
first, without a backward pass, and the second part finds its keys and values in transformers' cache.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from lopa_lightning.backbones.prefix import cache_input
from lopa_lightning.backbones.pretrained import accepted_inputs


def reads_in_parts(model: PreTrainedModel) -> bool:
    """Returns whether a causal model says that it reads a part as it would within the whole.

    That is so where every layer keeps all that it has read and attends to it, and where rotations of positions do not
    depend on how long a text is. Padding between the parts is for :func:`~.padding_check.check_padding` to try.

    Args:
        model: Without a head.
    """
    if cache_input(model) is None or not {"use_cache", "position_ids"} <= accepted_inputs(model):
        return False
    if any(type(layer) is not DynamicLayer for layer in DynamicCache(config=model.config).layers):
        return False
    config = json.dumps(model.config.to_dict(), default=str)
    return '"longrope"' not in config and '"dynamic"' not in config


@dataclass(frozen=True)
class TwoParts:
    """Says which columns of prompted texts are read first, and which after that.

    Attributes:
        first: Number P of columns that are read first.
        mask: 1 at the tokens among them that stand before virtual ones, ``[B, P]``.
        rest: The columns that are read after that, ``[B, R]``: virtual tokens and what follows.
        rest_mask: 1 at tokens, 0 at padding, ``[B, R]``.
        columns: Where the content of each column is in both parts, one after the other: ``[B, L]``.
    """

    first: int
    mask: Tensor
    rest: Tensor
    rest_mask: Tensor
    columns: Tensor

    @classmethod
    def of(cls, mask: Tensor, start: Tensor, sizes: tuple[int, int] | None = None) -> TwoParts:
        """Splits prompted texts.

        Args:
            mask: 1 at tokens, 0 at padding, ``[B, L]``. The ones of a row are contiguous.
            start: The column of each row's first virtual token, ``[B]``.
            sizes: P and R, where they are known; otherwise they are found, which waits for the device.

        Example:
            >>> parts = TwoParts.of(torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]), torch.tensor([1, 2]))
            >>> parts.mask.tolist(), parts.rest.tolist(), parts.rest_mask.tolist(), parts.columns.tolist()
            ([[1, 0], [1, 1]], [[1, 2, 3], [2, 3, 3]], [[1, 1, 1], [1, 0, 0]], [[0, 2, 3, 4], [0, 1, 2, 3]])
        """
        length = mask.shape[1]
        if sizes is None:
            after = (length - mask.flip(1).argmax(dim=1) - start).max()
            # A model reads one column at least, if of padding.
            found = torch.stack([start.max().clamp(min=1), after]).tolist()
            sizes = int(found[0]), int(found[1])
        first, most = sizes
        column, start = torch.arange(length, device=mask.device), start.unsqueeze(1)
        ahead = start + column[:most]
        rest = ahead.clamp(max=length - 1)
        return cls(
            first,
            (mask * (column < start))[:, :first],
            rest,
            mask.gather(1, rest) * (ahead < length),
            torch.where(column < start, column, first + (column - start).clamp(max=most - 1)),
        )

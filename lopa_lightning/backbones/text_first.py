"""Splits texts where their virtual tokens go, for a causal model that reads in two parts.

No token sees a later one, so what stands before the first virtual token does not depend on the soft prompt: it is read
first, without a backward pass, and the second part finds its keys and values in transformers' cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from lopa_lightning.backbones.prefix import cache_input
from lopa_lightning.backbones.pretrained import accepted_inputs


def reads_in_parts(model: PreTrainedModel) -> bool:
    """Returns whether every layer of a causal model keeps all that it has read, and attends to it.

    Args:
        model: Without a head.
    """
    if cache_input(model) is None or not {"use_cache", "position_ids"} <= accepted_inputs(model):
        return False
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)


@dataclass(frozen=True)
class TwoParts:
    """Says which tokens of padded texts stand before their virtual ones, and which after.

    Attributes:
        length: Number T of columns that the texts have.
        start: The column of each text where its virtual tokens go, ``[B]``.
        before: How many tokens of each text stand before them, ``[B]``.
        first_mask: 1 at these tokens, ``[B, P]``, of the first P columns.
        rest: The column of each token after them, ``[B, K]``, and any where ``rest_mask`` is 0.
        rest_mask: 1 where there is such a token, ``[B, K]``.
    """

    length: int
    start: Tensor
    before: Tensor
    first_mask: Tensor
    rest: Tensor
    rest_mask: Tensor

    @classmethod
    def of(cls, attention_mask: Tensor, position: Tensor | None = None) -> TwoParts:
        """Splits texts.

        Args:
            attention_mask: 1 at the text's tokens, 0 at padding, ``[B, T]``. The ones of a row are contiguous.
            position: How many of each text's tokens stand before its virtual ones, ``[B]``; None for all of them,
                which does not wait for a device.

        Example:
            >>> parts = TwoParts.of(torch.tensor([[1, 1, 1], [1, 1, 0]]), torch.tensor([1, 2]))
            >>> parts.first_mask.tolist(), parts.rest.tolist(), parts.rest_mask.tolist()
            ([[1, 0], [1, 1]], [[1, 2], [2, 2]], [[1, 1], [0, 0]])
        """
        length, tokens = attention_mask.shape[1], attention_mask.sum(dim=1)
        before = tokens if position is None else position
        start = attention_mask.argmax(dim=1) + before
        columns, most = length, 0
        if position is not None:
            # Waits for the device, once. A model reads one column at least, if of padding.
            columns, most = torch.stack([start.max().clamp(min=1), (tokens - before).max()]).tolist()
        column = torch.arange(length, device=attention_mask.device)
        ahead = column[:most]
        return cls(
            length,
            start,
            before,
            (attention_mask * (column < start.unsqueeze(1)))[:, :columns],
            (start.unsqueeze(1) + ahead).clamp(max=length - 1),
            (ahead < (tokens - before).unsqueeze(1)).to(attention_mask.dtype),
        )

    def positions(self, num_virtual_tokens: int) -> Tensor:
        """Returns where each token of the texts is in both parts, one after the other: ``[B, T]``.

        Args:
            num_virtual_tokens: Number m of virtual tokens.

        Example:
            >>> TwoParts.of(torch.tensor([[0, 1, 1, 1]]), torch.tensor([2])).positions(5).tolist()
            [[0, 1, 2, 8]]
        """
        column, start = torch.arange(self.length, device=self.start.device), self.start.unsqueeze(1)
        columns, m = self.first_mask.shape[1], num_virtual_tokens
        after = (columns + m + column - start).clamp(max=columns + m + self.rest.shape[1] - 1)
        return torch.where(column < start, column, after)

"""Metrics of predicted tokens, each token counted once over all batches and processes."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class _OverTokens(Metric):
    """A mean over tokens of one column of ``[B, 3]``: losses, tokens, tokens predicted right, in sum for each text."""

    full_state_update = False
    column: int
    total: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "tokens"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, predictions: Tensor, labels: Tensor | None = None) -> None:
        """Adds a batch ``[B, 3]``; labels were counted where the losses were computed."""
        self.total += predictions[:, self.column].double().sum()
        self.tokens += predictions[:, 1].double().sum()

    def compute(self) -> Tensor:
        """The mean over all tokens."""
        return (self.total / self.tokens).float()


class TokenAccuracy(_OverTokens):
    """Share of tokens that were the likeliest one.

    Example:
        >>> accuracy = TokenAccuracy()
        >>> accuracy.update(torch.tensor([[4.0, 3, 1], [1.0, 1, 1]]))
        >>> accuracy.compute()
        tensor(0.5000)
    """

    column = 2


class Perplexity(_OverTokens):
    """The exponential of the mean loss of a token.

    Example:
        >>> perplexity = Perplexity()
        >>> perplexity.update(torch.tensor([[4.0, 3, 1], [0.0, 1, 1]]))
        >>> perplexity.compute()
        tensor(2.7183)
    """

    column = 0

    def compute(self) -> Tensor:
        """The exponential of the mean over all tokens."""
        return super().compute().exp()

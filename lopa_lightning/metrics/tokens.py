"""Defines metrics of predicted tokens, each token counted once over all batches and processes."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class _TokenSums(Metric):
    """Sums ``[B, 3]`` over all texts: losses of tokens, tokens, and tokens predicted right, each summed in its text."""

    full_state_update = False
    sums: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(3, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, predictions: Tensor, labels: Tensor | None = None) -> None:
        """Adds a batch ``[B, 3]``; labels were counted where the losses were computed."""
        self.sums += predictions.double().sum(0)


class TokenAccuracy(_TokenSums):
    """Computes the share of tokens that were the likeliest one.

    Example:
        >>> accuracy = TokenAccuracy()
        >>> accuracy.update(torch.tensor([[4.0, 3, 1], [1.0, 1, 1]]))
        >>> accuracy.compute()
        tensor(0.5000)
    """

    higher_is_better = True

    def compute(self) -> Tensor:
        """Returns the share, between 0 and 1."""
        return (self.sums[2] / self.sums[1]).float()


class Perplexity(_TokenSums):
    """Computes the exponential of the mean loss of a token.

    Example:
        >>> perplexity = Perplexity()
        >>> perplexity.update(torch.tensor([[4.0, 3, 1], [0.0, 1, 1]]))
        >>> perplexity.compute()
        tensor(2.7183)
    """

    higher_is_better = False

    def compute(self) -> Tensor:
        """Returns the exponential of the mean over all tokens."""
        return (self.sums[0] / self.sums[1]).float().exp()

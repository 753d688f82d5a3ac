"""Computes loss and metrics of one evaluation set, each example counted once over all batches and processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection


class KeepsDtype(nn.Module):
    """Goes to a device, and keeps its dtypes: precision bf16-true would round sums and counts."""

    def _apply(self, fn: Callable[[Tensor], Tensor], *options: Any) -> Any:
        device = fn(torch.zeros(())).device
        return super()._apply(lambda tensor: tensor.to(device), *options)  # type: ignore[no-untyped-call]


class Share(KeepsDtype, MeanMetric):
    """Computes a mean over all batches and processes."""


class Scores(KeepsDtype):
    """Gathers the loss, a task's metrics, and the score made of them.

    Args:
        metrics: The task's metrics; None for the loss alone.
        official: Names of the metrics whose mean is the score; without any it is the negative loss.

    Example:
        >>> scores = Scores(None, [])
        >>> scores.update(torch.tensor(0.5), 2, torch.tensor([1, 0]), None)
        >>> scores.update(torch.tensor(2.0), 1, torch.tensor([1]), None)
        >>> scores.compute()
        {'loss': tensor(1.), 'score': tensor(-1.)}
        >>> scores.update(torch.tensor(float("nan")), 2, torch.tensor([1, 0]), None)
        >>> scores.update(torch.tensor(2.0), 1, torch.tensor([1]), None)
        >>> scores.compute()["loss"]
        tensor(nan)
    """

    def __init__(self, metrics: MetricCollection | None, official: Sequence[str]) -> None:
        super().__init__()
        # A metric of its own: Lightning's mean over processes rounds the number of examples.
        # By itself torchmetrics leaves a batch out whose loss is NaN.
        self.loss = MeanMetric(nan_strategy=float("nan"))
        self.metrics = metrics
        self.official = official

    def update(self, loss: Tensor, weight: Tensor | int, predictions: Tensor, labels: Tensor | None) -> None:
        """Adds a batch.

        Args:
            loss: Mean over the batch, a scalar.
            weight: Number of things that it is the mean of.
            predictions: What the metrics compare with the labels, ``[B, ...]``.
            labels: ``[B, ...]``; not needed without metrics.
        """
        self.loss.update(loss, weight)
        if self.metrics is not None:
            self.metrics.update(predictions, labels)

    def reset(self) -> None:
        """Forgets all batches."""
        with torch.inference_mode(False):  # states made in inference mode could not be updated in a fit that follows
            self.loss.reset()
            if self.metrics is not None:
                self.metrics.reset()

    def compute(self) -> dict[str, Tensor]:
        """Returns all values by name, with ``loss`` and ``score``, and resets them."""
        values = {"loss": self.loss.compute(), **(self.metrics.compute() if self.metrics is not None else {})}
        self.reset()
        values = {name: value.float() for name, value in values.items()}
        official = [values[name] for name in self.official]
        return {**values, "score": torch.stack(official or [-values["loss"]]).mean()}

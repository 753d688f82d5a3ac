"""Lets the batches of an optimizer step count as one large batch, over all processes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from lightning.pytorch import Trainer
from torch import Tensor, nn


class Window:
    """Weights the batches from one optimizer step to the next.

    Lightning divides every loss by ``accumulate_grad_batches`` and averages gradients over the processes, as if all
    batches were of one size and every window full. Here a loss is multiplied by its batch's size relative to the
    window's first batch, and the gradient at the window's end by what the sizes then add up to. Where all are of one
    size and the window is full, both factors are 1, and nothing is computed.

    With ``batch_tokens``, a window counts by its examples as well, relative to an epoch's windows on average: each
    example so has the same weight in an epoch; where the loss is a mean over tokens, it has that on average over its
    window.

    Attributes:
        batches: How many batches the window has so far; 0 after its optimizer step.
    """

    def __init__(self) -> None:
        self.batches = 0
        self._batch_idx = 0
        self._first = self._size = 1.0
        self._first_examples = self._examples = 1
        self._share: Tensor | None = None

    def add(
        self,
        loss: Tensor,
        size: Tensor | int,
        size_everywhere: float,
        batch: Mapping[str, Tensor],
        batch_idx: int,
        trainer: Trainer,
    ) -> Tensor:
        """Weights the loss of a batch.

        Args:
            loss: Mean over the batch, a scalar.
            size: Number of things that it is the mean of: examples, or labelled tokens.
            size_everywhere: The same of this step's batches on all processes together.
            batch: With ``index``; and ``weight`` where it counts by its examples.
            batch_idx: Its number within the epoch.
            trainer: Of the run.

        Returns:
            The loss whose gradient is to be taken.
        """
        if not self.batches:
            self._first, self._size = max(size_everywhere, 1.0), 0.0
            self._first_examples, self._examples = len(batch["index"]), 0
            self._share = batch["weight"] * _share_of_window(trainer) if "weight" in batch else None
        self.batches += 1
        self._batch_idx = batch_idx
        self._size += size_everywhere
        self._examples += len(batch["index"])
        mine = size_everywhere if trainer.world_size == 1 else size
        factor = mine * trainer.world_size / self._first
        if self._share is not None:
            factor = factor * self._share
        return loss if isinstance(factor, float) and factor == 1 else loss * factor

    def end(self, parameters: Iterable[nn.Parameter], trainer: Trainer) -> None:
        """Scales the gradient of a whole window; does nothing before its last batch.

        Args:
            parameters: With gradients, already averaged over the processes.
            trainer: Of the run.
        """
        full = trainer.accumulate_grad_batches
        if (self._batch_idx + 1) % full and not trainer.is_last_batch:
            return
        self.batches = 0
        factor = full * self._first / self._size if self._size else 1.0
        if self._share is not None:
            factor *= self._examples / (full * self._first_examples)
        if factor != 1:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)


def _share_of_window(trainer: Trainer) -> float:
    """Returns the batches of a full window, by those of an epoch's windows on average."""
    batches, full = trainer.num_training_batches, trainer.accumulate_grad_batches
    return full * math.ceil(batches / full) / batches

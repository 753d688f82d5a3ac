"""Stops a run, or skips a step, where a loss is NaN or infinite."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lopa_lightning.errors import LoPAError, one_of

OnNonfinite = Literal["stop", "skip"]
"""``stop`` the run, or ``skip`` the optimizer's step and count it."""


class LossGuard:
    """Looks at every training loss, for all processes alike: what one skips, all skip.

    Args:
        action: What is done about a loss that is NaN or infinite.

    Attributes:
        skipped: Optimizer steps left out so far.

    Raises:
        LoPAError: If ``action`` is unknown.
    """

    def __init__(self, action: OnNonfinite) -> None:
        one_of("nonfinite_loss", action, get_args(OnNonfinite))
        self.action = action
        self.skipped = 0
        self._spoilt = False

    def look_at(self, loss: Tensor, batch: Any, batch_idx: int, trainer: Any, size: Tensor | float = 1) -> float:
        """Notes a loss that is NaN or infinite, of this process or of another.

        Args:
            loss: Of a training batch.
            batch: With ``index``.
            batch_idx: Its number within the epoch.
            trainer: Knows the other processes.
            size: Number of things that the loss is the mean of.

        Returns:
            That number over all processes: one message brings both.

        Raises:
            LoPAError: If the run is to stop; the message names step and rows.
        """
        mine = ~torch.isfinite(loss.detach()).all()
        facts = torch.stack([mine.float(), torch.as_tensor(size, dtype=torch.float, device=loss.device)])
        count, everywhere = trainer.strategy.reduce(facts, reduce_op="sum").tolist()
        if not count:
            return float(everywhere)
        what, rows = "NaN or infinite on another process", "its"
        if mine:
            what, rows = str(float(loss.detach())), ", ".join(map(str, batch["index"].tolist()))
        step = f"step {trainer.global_step} (epoch {trainer.current_epoch}, batch {batch_idx}), rows {rows}"
        where = f"the training loss is {what} at {step}"
        if self.action == "stop":
            raise LoPAError(f"{where}; try a lower learning rate or float32, or go on with nonfinite_loss: skip")
        rank_zero_warn(f"{where}: the step is skipped, with all batches that it accumulates")
        self._spoilt = True
        return float(everywhere)

    def drop_step(self, optimizer: Optimizer) -> bool:
        """Takes the gradients away if they are spoilt: an optimizer leaves a parameter without one as it is.

        Args:
            optimizer: About to step.

        Returns:
            Whether it did.
        """
        if not self._spoilt:
            return False
        optimizer.zero_grad(set_to_none=True)
        self._spoilt = False
        self.skipped += 1
        return True

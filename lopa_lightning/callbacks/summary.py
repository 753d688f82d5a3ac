"""Says in a few lines what was learned, at the end of a fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite, nan
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lopa_lightning.callbacks.checkpoints import best_checkpoint
from lopa_lightning.plain import built

ADVICE = (
    "Try another learning rate for shared_prompt (learning_rates; lower where the loss rose at first), more epochs, "
    "objective: head where it is not so already, or another instance encoder."
)

_BELOW = 0.999  # of the labels' variance: a prediction of their mean has all of it, but for rounding


def warn_if_blind(metrics: Mapping[str, float]) -> None:
    """Warns where validation is no better than the majority class, or than the mean of the labels.

    Args:
        metrics: Of a validation, by full name.
    """
    loss, variance = metrics.get("val/loss"), metrics.get("val/label_variance")
    if loss is not None and variance is not None and not loss < _BELOW * variance:
        rank_zero_warn(
            f"validation loss {loss:.4f} is not below the labels' variance {variance:.4f}, the loss of always "
            f"predicting their mean: nothing was learned. {ADVICE}"
        )
    accuracy, majority = metrics.get("val/accuracy"), metrics.get("val/majority_share")
    if accuracy is not None and majority is not None and accuracy <= majority:
        rank_zero_warn(
            f"validation accuracy {accuracy:.4f} is not above the majority class's share {majority:.4f}: nothing was "
            f"learned. {ADVICE}"
        )


def count_parameters(module: nn.Module) -> tuple[int, int]:
    """Returns the numbers of a module's trained and frozen parameters."""
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return trained, sum(p.numel() for p in module.parameters()) - trained


def validation_metrics(trainer: Any) -> dict[str, float]:
    """Returns what the last validation has logged."""
    found = trainer.callback_metrics.items()
    return {name: float(value) for name, value in found if name.startswith("val") and value.numel() == 1}


def parts_table(net: nn.Module) -> str:
    """Returns a table of a model's parts: class, parameters, and how many of them are trained.

    Args:
        net: The model, whose children are the parts. Parameters that two of them share count in both.

    Example:
        >>> print(parts_table(nn.ModuleDict({"readout": nn.Linear(2, 3)})))
        part                class                     parameters         trained
        read-out            Linear                             9               9
    """
    lines = [f"{'part':<20}{'class':<20}{'parameters':>16}{'trained':>16}"]
    for name, part in net.named_children():
        trained, frozen = count_parameters(part)
        shown = name.replace("_", " ").replace("readout", "read-out")
        lines.append(f"{shown:<20}{type(part).__name__:<20}{trained + frozen:>16,}{trained:>16,}")
    return "\n".join(lines)


class FitSummary(Callback):
    """Prints the parts of the model before a fit, and after it the best validation and what to run next."""

    def __init__(self) -> None:
        self._best: dict[str, float] = {}

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Prints a table of the model's parts."""
        if trainer.is_global_zero:
            print(parts_table(pl_module.net))

    def on_train_start(self, trainer: Any, pl_module: LightningModule) -> None:
        """Forgets the best of the run that goes on here where its checkpoint stays there."""
        checkpoint = best_checkpoint(trainer)
        if checkpoint is not None and checkpoint.monitor is not None and checkpoint.best_model_score is None:
            self._best = {}

    def on_validation_end(self, trainer: Any, pl_module: LightningModule) -> None:
        """Keeps the metrics of the best validation, which is that of the best checkpoint where one is kept."""
        if trainer.sanity_checking:
            return
        metrics = validation_metrics(trainer)
        key, sign = ("val/score", 1) if "val/score" in metrics else ("val/loss", -1)
        checkpoint = best_checkpoint(trainer)
        if checkpoint is not None and checkpoint.monitor in metrics:
            key, sign = checkpoint.monitor, 1 if checkpoint.mode == "max" else -1
        is_better = not self._best or sign * metrics.get(key, nan) > sign * self._best.get(key, nan)
        if _keeps_last(checkpoint) or (is_better and isfinite(metrics.get(key, nan))):
            self._best = metrics

    def state_dict(self) -> dict[str, dict[str, float]]:
        """Returns the best metrics so far, for a resumed run."""
        return {"best": self._best}

    def load_state_dict(self, state_dict: dict[str, dict[str, float]]) -> None:
        """Takes the best metrics so far."""
        self._best = built(state_dict["best"], dict[str, float], "best")

    def on_fit_end(self, trainer: Any, pl_module: LightningModule) -> None:
        """Prints the summary."""
        log_dir = trainer.log_dir  # broadcast from the first process: every one must ask for it
        if trainer.fast_dev_run or not trainer.is_global_zero:
            return
        if not self._best:
            score = trainer.callback_metrics.get("val/score")
            if not trainer.limit_val_batches:
                rank_zero_warn("nothing was validated, as trainer.limit_val_batches says: no best checkpoint was kept")
                return
            rank_zero_warn(
                "nothing was validated: the run ended before its first validation. `lopa validate` does it with the "
                "last checkpoint; trainer.val_check_interval brings it forward."
                if score is None
                else f"nothing was learned: val/score was {float(score)} in every validation, as a correlation is "
                f"where one number is predicted for all, so no best checkpoint was kept. {ADVICE}"
            )
            return
        trained, frozen = count_parameters(pl_module)
        checkpoint = best_checkpoint(trainer)
        title = "Last validation" if _keeps_last(checkpoint) else "Best validation"
        lines = ["", title, *(f"  {name:<26}{value:.4f}" for name, value in self._best.items())]
        lines += ["Trained", f"  {trained:,} parameters beside {frozen:,} frozen ones"]
        best, folder = (checkpoint.best_model_path, str(checkpoint.dirpath)) if checkpoint is not None else ("", "")
        # Of this run: a checkpoint that it was resumed from may name any.
        if best and Path(best).is_file() and Path(folder) in Path(best).parents:
            lines.append(
                f"  {Path(best).stat().st_size / 1e6:.1f} MB checkpoint, {4 * trained / 1e6:.1f} MB of it weights"
            )
            lines += _next_commands(trainer.loggers, log_dir or trainer.default_root_dir, _relative(best))
        print("\n".join(lines))
        warn_if_blind(self._best)


def _keeps_last(checkpoint: ModelCheckpoint | None) -> bool:
    return checkpoint is not None and checkpoint.monitor is None


def _next_commands(loggers: Sequence[Logger], log_dir: str, checkpoint: str) -> list[str]:
    if not loggers or not (config := Path(log_dir, "config.yaml")).is_file():
        return []
    run = f"--config {_relative(str(config))} --ckpt_path {checkpoint}"
    boards = [str(logger.log_dir) for logger in loggers if isinstance(logger, TensorBoardLogger)]
    shown = [f"  tensorboard --logdir {_relative(board)}" for board in boards[:1]]
    return ["Next", f"  lopa test {run}", f"  lopa predict {run}", *shown]


def _relative(path: str) -> str:
    absolute, here = Path(path).resolve(), Path.cwd()
    return str(absolute.relative_to(here)) if absolute.is_relative_to(here) else str(absolute)

"""Measures a run, and keeps the figures in a file beside it."""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.callbacks import Callback

from lopa_lightning.callbacks.summary import count_parameters, validation_metrics, warn_if_blind
from lopa_lightning.errors import LoPAError
from lopa_lightning.files import write_whole

RESULT_FILE = "result.json"
_STEPS_KEPT = 200  # they are stored in the checkpoint, whose size is measured


@dataclass(frozen=True)
class Result:
    """Holds what came out of a run.

    Attributes:
        status: ``running`` from its start to its end, then ``done`` or ``failed``.
        config_hash: Of the configuration that was run.
        reason: Why it failed, in a line.
        tags: What the caller said of the run.
        history: For each validation ``samples`` (trained on so far), ``step`` and ``metrics``.
        figures: Parameters ``trained`` and ``frozen``; ``seconds_per_step``, the median, and ``seconds`` of the whole
            run with loading and validation; ``peak_mb`` of memory, ``peak_of`` the GPU (``cuda``) or of what the
            ``process`` holds resident; ``checkpoint_mb`` of the last checkpoint. None for what is not known.
        read_version: Of the files on this machine that it read; empty if there were none, or it is not known.
    """

    status: Literal["running", "done", "failed"]
    config_hash: str = ""
    reason: str = ""
    tags: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    read_version: str = ""

    @property
    def done(self) -> bool:
        """Returns whether the run ended well."""
        return self.status == "done"

    @property
    def metrics(self) -> dict[str, float]:
        """Returns the metrics of the last validation, by full name.

        The last and not the best one: to choose an epoch by the split that is reported would make the figure too good.
        """
        return dict(self.history[-1]["metrics"]) if self.history else {}

    @property
    def scores(self) -> list[float]:
        """Returns ``val/score`` of each validation."""
        return [entry["metrics"].get("val/score", math.nan) for entry in self.history]

    @property
    def score(self) -> float:
        """Returns the last ``val/score``; NaN if there is none."""
        return self.scores[-1] if self.history else math.nan

    def write(self, folder: Path) -> None:
        """Writes ``result.json`` into the run's folder, whole or not at all."""
        write_whole(folder / RESULT_FILE, json.dumps({**asdict(self), "metrics": self.metrics}, indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Result | None:
        """Reads what :meth:`write` wrote; None if there is nothing, or nothing that can be read."""
        try:
            values = json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
            return cls(**{key: value for key, value in values.items() if key != "metrics"})
        except (OSError, ValueError, TypeError, AttributeError):
            return None


class RunRecord(Callback):
    """Measures a run, and writes ``result.json`` at its end.

    What it has measured is in the checkpoints too, so that a resumed run has all of it.

    Args:
        folder: Where the file goes, beside the run's checkpoints; one that is there gives its tags.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self._measured: dict[str, Any] = {
            "history": [],
            "samples": 0,
            "step_seconds": [],
            "seconds": 0.0,
            "peak_mb": 0.0,
        }
        self._is_cuda = False
        self._optimizer_step = 0
        self._batch_began = self._spent = 0.0
        self._began = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        """Returns all that was measured so far."""
        seconds = self._measured["seconds"] + time.perf_counter() - self._began
        peak = torch.cuda.max_memory_allocated() / 1e6 if self._is_cuda else _resident_mb()
        return {**self._measured, "seconds": seconds, "peak_mb": max(peak, self._measured["peak_mb"])}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes what was measured before an interruption."""
        self._measured = dict(state_dict)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Sees where memory is measured."""
        self._is_cuda = pl_module.device.type == "cuda"

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Starts the clock of a batch."""
        self._batch_began = self._now()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Counts examples, and the seconds of each optimizer step, whatever number of batches it has."""
        self._measured["samples"] += len(batch["index"]) * trainer.world_size
        self._spent += self._now() - self._batch_began
        if trainer.global_step != self._optimizer_step:
            self._optimizer_step = trainer.global_step
            self._measured["step_seconds"] = [*self._measured["step_seconds"], self._spent][-_STEPS_KEPT:]
            self._spent = 0.0

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Keeps the metrics."""
        if not trainer.sanity_checking:
            at = {"samples": self._measured["samples"], "step": trainer.global_step}
            self._measured["history"].append({**at, "metrics": validation_metrics(trainer)})

    def finish(self, trainer: Any, module: Any, data: Any) -> None:
        """Writes the result of a run that has ended, after one more validation where the last was at an earlier step.

        A budget of steps ends within an epoch, where Lightning does not validate.

        Raises:
            LoPAError: If nothing was validated, or the loss or score is not finite.
        """
        history = self._measured["history"]
        if not history or history[-1]["step"] < trainer.global_step:
            trainer.validate(module, datamodule=data)
        measured, checkpoint = self.state_dict(), self.folder / "checkpoints" / "last.ckpt"
        trained, frozen = count_parameters(module)
        figures = {
            "trained": trained,
            "frozen": frozen,
            "seconds_per_step": statistics.median(measured["step_seconds"]) if measured["step_seconds"] else None,
            "seconds": measured["seconds"],
            "peak_mb": measured["peak_mb"] or None,
            "peak_of": "cuda" if self._is_cuda else "process",
            "checkpoint_mb": checkpoint.stat().st_size / 1e6 if checkpoint.is_file() else None,
        }
        before = Result.read(self.folder) or Result("running")
        result = replace(before, status="done", history=history, figures=figures)
        if "val/score" not in result.metrics:
            raise LoPAError(
                "nothing was validated, so there is no val/score: see trainer.limit_val_batches and the data"
            )
        for name in ("val/loss", "val/score"):
            if not math.isfinite(result.metrics.get(name, 0.0)):
                raise LoPAError(f"{name} is {result.metrics[name]}: the run diverged, or predicts one number for all")
        warn_if_blind(result.metrics)
        if trainer.is_global_zero:
            result.write(self.folder)

    def _now(self) -> float:
        """Returns the time once the GPU has done what it was given."""
        if self._is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


def _resident_mb() -> float:
    """Returns the most that this process has held in memory; 0 where it cannot be known."""
    if sys.platform == "win32":
        return 0.0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e6 / 1024)

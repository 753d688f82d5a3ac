"""What is measured of a run, kept as a file beside it."""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.callbacks import Callback

from lopa_lightning.callbacks.summary import warn_if_blind
from lopa_lightning.errors import LoPAError
from lopa_lightning.files import write_whole

RESULT_FILE = "result.json"
_WARM_UP_STEPS = 3  # slower than the rest: allocation, kernels chosen
_STEPS_KEPT = 200  # they are stored in the checkpoint, whose size is measured


@dataclass(frozen=True)
class Result:
    """What came out of a run.

    Attributes:
        status: ``running`` from its start to its end, then ``done`` or ``failed``.
        config_hash: Of the configuration that was run.
        reason: Why it failed, in a line.
        tags: What the caller said of the run.
        history: For each validation ``samples`` (trained on so far), ``step``, ``epoch`` and ``metrics``.
        trained: Number of trained parameters.
        frozen: Number of frozen ones.
        checkpoint_bytes: Size of the last checkpoint.
        seconds_per_step: Median over training steps.
        seconds: The whole run, with loading and validation.
        peak_mb: Peak memory.
        peak_of: ``cuda`` for the GPU's memory, ``process`` for the resident memory of the process.
    """

    status: Literal["running", "done", "failed"]
    config_hash: str
    reason: str = ""
    tags: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    trained: int | None = None
    frozen: int | None = None
    checkpoint_bytes: int | None = None
    seconds_per_step: float | None = None
    seconds: float | None = None
    peak_mb: float | None = None
    peak_of: str | None = None

    @property
    def done(self) -> bool:
        """Whether the run ended well."""
        return self.status == "done"

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics of the last validation, by full name.

        Of the last and not the best one: to choose an epoch by the split that is reported would make
        the figure too good.
        """
        return dict(self.history[-1]["metrics"]) if self.history else {}

    @property
    def score(self) -> float:
        """``val/score`` of the last validation; NaN if there is none."""
        return self.metrics.get("val/score", math.nan)

    @property
    def best_score(self) -> float:
        """The highest ``val/score`` of all validations; NaN if there is none."""
        scores = [entry["metrics"].get("val/score", math.nan) for entry in self.history]
        return max((score for score in scores if not math.isnan(score)), default=math.nan)

    def write(self, folder: Path) -> None:
        """Writes ``result.json`` into the run's folder, whole or not at all."""
        write_whole(folder / RESULT_FILE, json.dumps({**asdict(self), "metrics": self.metrics}, indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Result | None:
        """Reads what :meth:`write` wrote; None if there is nothing, or nothing that can be read."""
        try:
            values = json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
            return cls(**{key: value for key, value in values.items() if key != "metrics"})
        except (OSError, ValueError, TypeError):
            return None


class RunRecord(Callback):
    """Measures a run, and writes ``result.json`` at its end.

    What it has measured is in the checkpoints too, so that a resumed run has all of it.

    Args:
        folder: Where the file goes, beside the run's checkpoints.
        config_hash: See :class:`Result`.
        tags: See :class:`Result`.
    """

    def __init__(self, folder: str, config_hash: str = "", tags: dict[str, Any] | None = None) -> None:
        self.folder = Path(folder)
        self.config_hash = config_hash
        self.tags = tags or {}
        self.history: list[dict[str, Any]] = []
        self.peak_of = "process"
        self._samples = self._epoch = self._steps = self._optimizer_step = 0
        self._step_seconds: deque[float] = deque(maxlen=_STEPS_KEPT)
        self._earlier_seconds = self._earlier_peak = self._step_began = self._spent = 0.0
        self._began = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        """All that was measured so far."""
        measured = {"history": self.history, "samples": self._samples, "epoch": self._epoch}
        return {**measured, "step_seconds": list(self._step_seconds), "seconds": self.seconds, "peak_mb": self.peak_mb}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes what was measured before an interruption."""
        self.history = state_dict["history"]
        self._samples, self._epoch = state_dict["samples"], state_dict["epoch"]
        self._step_seconds.extend(state_dict["step_seconds"])
        self._earlier_seconds, self._earlier_peak = state_dict["seconds"], state_dict["peak_mb"] or 0.0

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Sees where memory is measured."""
        self.peak_of = "cuda" if pl_module.device.type == "cuda" else "process"

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Starts the clock of a batch."""
        self._step_began = self._now()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Counts examples, and the seconds of each optimizer step, whatever number of batches it has."""
        self._epoch = trainer.current_epoch  # after the last one, Lightning's own count may be one more
        self._samples += len(batch["index"]) * trainer.world_size
        self._spent += self._now() - self._step_began
        if trainer.global_step != self._optimizer_step:
            self._optimizer_step = trainer.global_step
            self._steps += 1
            if self._steps > _WARM_UP_STEPS:
                self._step_seconds.append(self._spent)
            self._spent = 0.0

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Keeps the metrics."""
        if trainer.sanity_checking:
            return
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val") and v.numel() == 1}
        at = {"samples": self._samples, "step": trainer.global_step, "epoch": self._epoch}
        self.history.append({**at, "metrics": metrics})

    def finish(self, trainer: Any, module: Any, data: Any) -> None:
        """Writes the result of a run that has ended, after one more validation where the last was at an earlier step.

        A budget of steps ends within an epoch, where Lightning does not validate.

        Raises:
            LoPAError: If nothing was validated, or the loss or score is not finite.
        """
        if not self.history or self.history[-1]["step"] < trainer.global_step:
            trainer.validate(module, datamodule=data)
        metrics = self.history[-1]["metrics"] if self.history else {}
        if "val/score" not in metrics:
            raise LoPAError(
                "nothing was validated, so there is no val/score: see trainer.limit_val_batches and the data"
            )
        for name in ("val/loss", "val/score"):
            if not math.isfinite(metrics.get(name, 0.0)):
                raise LoPAError(f"{name} is {metrics[name]}: the run diverged, or predicts one number for all")
        warn_if_blind(metrics)
        last, parameters = self.folder / "checkpoints" / "last.ckpt", list(module.parameters())
        if trainer.is_global_zero:
            Result(
                "done",
                self.config_hash,
                tags=self.tags,
                history=self.history,
                trained=sum(p.numel() for p in parameters if p.requires_grad),
                frozen=sum(p.numel() for p in parameters if not p.requires_grad),
                checkpoint_bytes=last.stat().st_size if last.is_file() else None,
                seconds_per_step=statistics.median(self._step_seconds) if self._step_seconds else None,
                seconds=self.seconds,
                peak_mb=self.peak_mb,
                peak_of=self.peak_of,
            ).write(self.folder)

    def _now(self) -> float:
        if self.peak_of == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds since this was made, and before an interruption."""
        return self._earlier_seconds + time.perf_counter() - self._began

    @property
    def peak_mb(self) -> float | None:
        """Peak memory in MB, see :class:`Result`."""
        now = torch.cuda.max_memory_allocated() / 1e6 if self.peak_of == "cuda" else _resident_mb()
        return None if now is None else max(now, self._earlier_peak)


def _resident_mb() -> float | None:
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6

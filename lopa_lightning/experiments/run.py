"""One run: a resolved configuration, trained in a folder of its own by the process that calls it."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
import statistics
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch.callbacks import Callback

from lopa_lightning import checkpoint
from lopa_lightning.callbacks.summary import warn_if_blind
from lopa_lightning.cli import LoPACLI, ignore_expected_warnings
from lopa_lightning.errors import LoPAError
from lopa_lightning.experiments.resolve import Config, placed_in, reason
from lopa_lightning.experiments.result import RESULT_FILE, Result
from lopa_lightning.files import write_whole

LOG_FILE = "log.txt"
_CONFIG_FILE = "config.yaml"
_CHECKPOINTS = "checkpoints"
_WARM_UP_STEPS = 3  # slower than the rest: allocation, kernels chosen
_STEPS_KEPT = 200  # they are stored in the checkpoint, whose size is measured


@dataclass(frozen=True)
class Run:
    """What is to be run.

    Attributes:
        folder: Where its configuration, log, result and checkpoints go; of this run alone.
        config: As from :func:`~lopa_lightning.experiments.resolve.resolve`.
        tags: Anything to find in its result again.
        keep_checkpoints: Whether its checkpoints stay after it has ended.
    """

    folder: Path
    config: Config
    tags: dict[str, Any] = field(default_factory=dict)
    keep_checkpoints: bool = False

    @property
    def config_hash(self) -> str:
        """Of the configuration, wherever it is run."""
        return hashlib.sha256(json.dumps(self.config, sort_keys=True, default=str).encode()).hexdigest()[:16]

    @property
    def last_checkpoint(self) -> Path:
        """What an interrupted run goes on from."""
        return self.folder / _CHECKPOINTS / "last.ckpt"

    def finished(self) -> Result | None:
        """The result, if this very configuration has been run to its end."""
        result = Result.read(self.folder)
        return result if result is not None and result.done and result.config_hash == self.config_hash else None

    def is_changed(self) -> bool:
        """Whether the folder holds a run of another configuration."""
        written = self.folder / _CONFIG_FILE
        return written.is_file() and not written.read_text(encoding="utf-8").startswith(self._config_head())

    def prepare(self) -> None:
        """Makes the folder ready: a run of another configuration is put aside, the result of a failed attempt goes."""
        if self.is_changed():
            numbers = itertools.count(1)
            aside = (self.folder.with_name(f"{self.folder.name}.replaced-{number}") for number in numbers)
            self.folder.rename(next(path for path in aside if not path.exists()))
        (self.folder / RESULT_FILE).unlink(missing_ok=True)
        write_whole(self.folder / _CONFIG_FILE, self._config_text())

    def failed(self, why: str) -> Result:
        """A result that says why there is none.

        Args:
            why: One line.
        """
        return Result("failed", self.config_hash, reason=why, tags=self.tags)

    def _config_text(self) -> str:
        text: str = yaml.safe_dump(placed_in(self.config, self.folder), sort_keys=False, allow_unicode=True)
        return self._config_head() + text

    def _config_head(self) -> str:
        return f"# {self.config_hash}\n"


class Recorder(Callback):
    """Measures a run; what it has measured is in the checkpoints, so that a resumed run has all of it."""

    def __init__(self) -> None:
        self.history: list[dict[str, Any]] = []
        self.trained: int | None = None
        self.frozen: int | None = None
        self.peak_of = "process"
        self._samples = 0
        self._epoch = 0
        self._step_seconds: deque[float] = deque(maxlen=_STEPS_KEPT)
        self._earlier_seconds = 0.0
        self._earlier_peak = 0.0
        self._began = time.perf_counter()
        self._steps = 0
        self._optimizer_step = 0
        self._step_began = 0.0
        self._spent = 0.0

    @property
    def state_key(self) -> str:
        """There is one recorder."""
        return "ExperimentRecorder"

    def state_dict(self) -> dict[str, Any]:
        """All that was measured so far."""
        return {
            "history": self.history,
            "samples": self._samples,
            "epoch": self._epoch,
            "step_seconds": list(self._step_seconds),
            "seconds": self.seconds,
            "peak_mb": self.peak_mb,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes what was measured before an interruption."""
        self.history = state_dict["history"]
        self._samples = state_dict["samples"]
        self._epoch = state_dict["epoch"]
        self._step_seconds.extend(state_dict["step_seconds"])
        self._earlier_seconds = state_dict["seconds"]
        self._earlier_peak = state_dict["peak_mb"] or 0.0

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Counts parameters, and sees where memory is measured."""
        parameters = list(pl_module.parameters())
        self.trained = sum(p.numel() for p in parameters if p.requires_grad)
        self.frozen = sum(p.numel() for p in parameters if not p.requires_grad)
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
        place = {"samples": self._samples, "step": trainer.global_step, "epoch": self._epoch}
        self.history.append({**place, "metrics": metrics})

    def _now(self) -> float:
        if self.peak_of == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    @property
    def seconds(self) -> float:
        """Since the recorder was made, and before an interruption."""
        return self._earlier_seconds + time.perf_counter() - self._began

    @property
    def peak_mb(self) -> float | None:
        """Peak memory, see :class:`~lopa_lightning.experiments.result.Result`."""
        now = torch.cuda.max_memory_allocated() / 1e6 if self.peak_of == "cuda" else _resident_mb()
        return None if now is None else max(now, self._earlier_peak)

    def result(self, run: Run) -> Result:
        """What was measured, of a run that has ended.

        Args:
            run: The run.
        """
        last = run.last_checkpoint
        return Result(
            "done",
            run.config_hash,
            tags=run.tags,
            history=self.history,
            trained=self.trained,
            frozen=self.frozen,
            checkpoint_bytes=last.stat().st_size if last.is_file() else None,
            seconds_per_step=statistics.median(self._step_seconds) if self._step_seconds else None,
            seconds=self.seconds,
            peak_mb=self.peak_mb,
            peak_of=self.peak_of,
        )


def _resident_mb() -> float | None:
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def execute(run: Run, environment: Mapping[str, str], threads: int | None = None) -> None:
    """Runs a prepared run in this process, which is its own, and writes its result.

    Args:
        run: The run.
        environment: Variables to set before a device is touched.
        threads: Threads that torch may use; None for its own choice.
    """
    os.environ.update(environment)
    _write_to(run.folder / LOG_FILE)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to children too; the parent ends them
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.argv = ["lopa"]  # Lightning warns where both argv and args hold arguments
    if threads is not None:
        torch.set_num_threads(threads)
    ignore_expected_warnings()
    recorder = Recorder()
    try:
        _fit(run, recorder)
        result = recorder.result(run)
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        result = run.failed(reason(error))
    result.write(run.folder)
    if result.done and not run.keep_checkpoints:
        shutil.rmtree(run.folder / _CHECKPOINTS, ignore_errors=True)


def _fit(run: Run, recorder: Recorder) -> None:
    arguments = ["fit", "--config", str(run.folder / _CONFIG_FILE)]
    if run.last_checkpoint.is_file():
        try:
            checkpoint.read(run.last_checkpoint)
            arguments += ["--ckpt_path", str(run.last_checkpoint)]
            print(f"Goes on from {run.last_checkpoint}")
        except LoPAError as error:
            print(f"Begins anew: {error}")
    cli = LoPACLI(args=arguments, callbacks=[recorder])
    # A budget of steps ends within an epoch, where Lightning does not validate.
    if not recorder.history or recorder.history[-1]["step"] < cli.trainer.global_step:
        cli.trainer.validate(cli.model, datamodule=cli.datamodule)
    if not recorder.history or "val/score" not in recorder.history[-1]["metrics"]:
        raise LoPAError("nothing was validated, so there is no val/score: see trainer.limit_val_batches and the data")
    metrics = recorder.history[-1]["metrics"]
    for name in ("val/loss", "val/score"):
        if not math.isfinite(metrics.get(name, 0.0)):
            raise LoPAError(f"{name} is {metrics[name]}: the run diverged, or predicts one number for all")
    warn_if_blind(metrics)


def _write_to(log: Path) -> None:
    """Sends what this process and its libraries print to a file, at its end."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    for target in (1, 2):
        os.dup2(descriptor, target)
    os.close(descriptor)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # By line, so that the log of a process that was killed has its last words.
            stream.reconfigure(line_buffering=True, encoding="utf-8", errors="replace")


def _end_with_parent() -> None:
    """Ends this process when the one that started it is gone: else the same command would run it twice."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)

"""Runs of ``lopa fit``: each has a folder, a configuration, a process and a result of its own."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import yaml

from lopa_lightning import checkpoint
from lopa_lightning.callbacks.run_record import Result
from lopa_lightning.cli import main
from lopa_lightning.errors import LoPAError
from lopa_lightning.experiments.resolve import Config, placed_in
from lopa_lightning.files import write_whole

LOG_FILE = "log.txt"
_CONFIG_FILE = "config.yaml"
_CHECKPOINTS = "checkpoints"
# Imported once, in the process that runs are forked from.
_PRELOADED = ["lopa_lightning.experiments.run", "transformers.modeling_utils", "torch.utils.tensorboard"]


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
        """Hash of the configuration, wherever it is run."""
        return hashlib.sha256(json.dumps(self.config, sort_keys=True, default=str).encode()).hexdigest()[:16]

    @property
    def last_checkpoint(self) -> Path:
        """What an interrupted run goes on from."""
        return self.folder / _CHECKPOINTS / "last.ckpt"

    def finished(self) -> Result | None:
        """Returns the result, if this very configuration has been run to its end."""
        result = Result.read(self.folder)
        return result if result is not None and result.done and result.config_hash == self.config_hash else None

    def is_changed(self) -> bool:
        """Tells whether the folder holds a run of another configuration."""
        result = Result.read(self.folder)
        return result is not None and result.config_hash != self.config_hash

    def prepare(self) -> None:
        """Makes the folder ready; a run of another configuration that is there is put aside."""
        if self.is_changed():
            numbers = itertools.count(1)
            aside = (self.folder.with_name(f"{self.folder.name}.replaced-{number}") for number in numbers)
            self.folder.rename(next(path for path in aside if not path.exists()))
        record = {"folder": str(self.folder), "config_hash": self.config_hash, "tags": self.tags}
        config: str = yaml.safe_dump(placed_in(self.config, self.folder, record), sort_keys=False, allow_unicode=True)
        write_whole(self.folder / _CONFIG_FILE, config)
        Result("running", self.config_hash, tags=self.tags).write(self.folder)

    def result(self, exit_code: int | None) -> Result:
        """Returns what came out, once its process has ended, and writes it down if that is a failure."""
        if (finished := self.finished()) is not None:
            if not self.keep_checkpoints:
                shutil.rmtree(self.folder / _CHECKPOINTS, ignore_errors=True)
            return finished
        if exit_code is not None and exit_code < 0:
            name = signal.Signals(-exit_code).name
            why = f"its process was ended by {name}" + (", perhaps for want of memory" if name == "SIGKILL" else "")
        else:
            why = self._last_words() or f"its process ended with status {exit_code}"
        result = replace(Result("failed", self.config_hash, tags=self.tags), reason=why)
        result.write(self.folder)
        return result

    def outcome(self, result: Result) -> str:
        """Returns a result in a line."""
        if result.done:
            return f"score {result.score:.4f}, {result.seconds:.0f} s"
        return f"failed: {result.reason} (see {self.folder / LOG_FILE})"

    def _last_words(self) -> str:
        lines = (self.folder / LOG_FILE).read_text(encoding="utf-8", errors="replace").strip().splitlines()
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        return errors[-1] if errors else "".join(lines[-1:])


def launch(runs: Sequence[Run], on_end: Callable[[Run, Result], None], workers: int | None = None) -> None:
    """Runs each of ``runs`` in a process of its own, in their order.

    A run that fails, or whose process dies, is a result that says so. When this is left by an exception, the
    processes are ended.

    Args:
        runs: What to run.
        on_end: Called when one has ended.
        workers: How many at once; None for one on each visible GPU, or one where there is none.

    Raises:
        LoPAError: If ``workers`` is less than 1.
    """
    devices = _devices()
    workers = workers if workers is not None else max(1, len(devices))
    if workers < 1:
        raise LoPAError(f"workers must be at least 1, got {workers}")
    # Without this, each of several processes would take all cores, and they would wait for each other.
    threads = None if workers == 1 else max(1, (os.cpu_count() or 1) // workers)
    waiting, slots = list(runs), list(range(workers))
    running: dict[BaseProcess, tuple[Run, int]] = {}
    try:
        while waiting or running:
            while waiting and slots:
                run, slot = waiting.pop(0), slots.pop(0)
                device = {"CUDA_VISIBLE_DEVICES": devices[slot % len(devices)]} if devices else {}
                running[_start(run, device, threads)] = (run, slot)
            ended = connection.wait([process.sentinel for process in running])
            for process in [process for process in running if process.sentinel in ended]:
                run, slot = running.pop(process)
                slots.append(slot)
                process.join()
                on_end(run, run.result(process.exitcode))
    finally:
        for process in running:
            process.kill()  # checkpoints are written whole or not at all
            process.join()


def _start(run: Run, environment: dict[str, str], threads: int | None) -> BaseProcess:
    run.prepare()
    context: Any
    if "forkserver" in multiprocessing.get_all_start_methods():
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
    else:
        context = multiprocessing.get_context("spawn")
    # Not a daemon: those may not have children, and a DataLoader's workers are.
    process: BaseProcess = context.Process(target=_fit, args=(run, environment, threads))
    process.start()
    return process


def _fit(run: Run, environment: dict[str, str], threads: int | None) -> None:
    """Runs ``lopa fit`` in this process, which is its own."""
    os.environ.update(environment)
    _write_to(run.folder / LOG_FILE)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to children too; the parent ends them
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if threads is not None:
        torch.set_num_threads(threads)
    arguments = ["fit", "--config", str(run.folder / _CONFIG_FILE)]
    if run.last_checkpoint.is_file():
        try:
            checkpoint.read(run.last_checkpoint)
            arguments += ["--ckpt_path", str(run.last_checkpoint)]
            print(f"Goes on from {run.last_checkpoint}")
        except LoPAError as error:
            print(f"Starts from the beginning: {error}")
    main(arguments)


def _devices() -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]
    return names[: torch.cuda.device_count()]


def _write_to(log: Path) -> None:
    """Appends what this process and its libraries print to a file."""
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

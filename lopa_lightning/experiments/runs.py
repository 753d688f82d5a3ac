"""Makes runs of ``lopa fit``: each has a folder, a configuration, a process and a result of its own.

Reads what the commands of many runs have in common.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

import torch
from jsonargparse import auto_cli

from lopa_lightning import checkpoint
from lopa_lightning.callbacks.run_record import Result
from lopa_lightning.cli import main
from lopa_lightning.command_line import yaml_files
from lopa_lightning.command_line.parser import Parser
from lopa_lightning.errors import LoPAError
from lopa_lightning.experiments.resolve import Config
from lopa_lightning.files import Claim, version_of, write_whole
from lopa_lightning.instances.encoder import BACKBONE
from lopa_lightning.signals import Stopped, stoppable

T = TypeVar("T")

_CONFIG_FILE, _LOG_FILE, _CHECKPOINTS = "config.yaml", "log.txt", "checkpoints"
_BEGINS = "--- lopa fit begins ---"
# Imported once, in the process that runs are forked from.
_PRELOADED = [__name__, "transformers.modeling_utils", "torch.utils.tensorboard", "datasets", "peft"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Holds the options that commands of many runs share.

    Args:
        selection_share: Share of the training split that runs validate on where something is chosen by them.
        max_epochs: Epochs of every run, in place of the configs'.
        max_steps: Optimizer steps of every run, in place of the configs'; the lower one of both budgets ends it.
        workers: Runs at once; by default one on each visible GPU, or one where there is none.
    """

    selection_share: float = 0.2
    max_epochs: int | None = None
    max_steps: int | None = None
    workers: int | None = None


def check_limits(options: Options, **limits: tuple[bool, str]) -> None:
    """Raises a LoPAError that names an option outside its limits.

    Args:
        options: The options.
        **limits: By option whether it is within them, and what they are.
    """
    limits["workers"] = (options.workers is None or options.workers > 0, "at least 1")
    for name, (is_within, allowed) in limits.items():
        if not is_within:
            raise LoPAError(f"{name} must be {allowed}, got {getattr(options, name)}")


def budget(options: Options) -> list[str]:
    """Returns the budget of every run as options of ``lopa fit``."""
    given = {"max_epochs": options.max_epochs, "max_steps": options.max_steps}
    return [f"--trainer.{name}={value}" for name, value in given.items() if value is not None]


def parsed(options_class: Callable[..., T], program: str, args: Sequence[str]) -> tuple[T, list[str]]:
    """Reads a command line.

    Args:
        options_class: A dataclass with documented fields, which are the options.
        program: How the command is called.
        args: What follows on the command line.

    Returns:
        The options, and what follows ``--``, which is for every run.
    """
    at = list(args).index("--") if "--" in args else len(args)
    own = ["--config" if arg == "-c" else arg for arg in args[:at]]
    description = f"{str(options_class.__doc__).splitlines()[0]} What follows -- is given to every run, as to lopa fit."
    kwargs: Any = {"prog": program, "description": description, "parser_class": Parser}
    options: Any = auto_cli(options_class, args=own, as_positional=False, **kwargs)
    return dataclasses.replace(options, output=os.path.expanduser(options.output)), list(args[at + 1 :])


@contextmanager
def folder_of_runs(folder: str) -> Iterator[None]:
    """Keeps other commands out of a folder within the block, and says how to go on where a signal ends it.

    Raises:
        LoPAError: If another process works in the folder.
        OSError: If it cannot be written to.
    """
    claim = Claim(Path(folder), "output")
    try:
        with stoppable():
            yield
    except Stopped as stopped:
        stopped.outcome = "the same command goes on from here"
        raise
    finally:
        claim.release()


@dataclass(frozen=True)
class Run:
    """Holds a configuration with a folder to run it in.

    Attributes:
        folder: Where its configuration, log, result and checkpoints go; of this run alone.
        config: As from :func:`~lopa_lightning.experiments.resolve.resolve`.
        tags: Anything to find in its result again.
    """

    folder: Path
    config: Config
    tags: dict[str, Any]

    @property
    def config_hash(self) -> str:
        """Returns a hash of the configuration, wherever it is run."""
        return hashlib.sha256(json.dumps(self.config, sort_keys=True, default=str).encode()).hexdigest()[:16]

    @functools.cached_property
    def read_version(self) -> str:
        """Returns what names the versions of data and models that are named by path; empty if none of them is here."""
        data, model = self.config["data"].get("init_args", {}), self.config["model"].get("init_args", {})
        given = [data.get("path"), *(data.get("data_files") or {}).values()]
        names = [name for each in given for name in (each if isinstance(each, list) else [each])]
        models = {(model.get(part) or {}).get("name") for part in ("backbone", "instance_encoder")}
        names += models - {BACKBONE}
        return version_of(*(name for name in names if isinstance(name, str)), without=self.folder)

    @property
    def last_checkpoint(self) -> Path:
        """Returns what an interrupted run goes on from."""
        return self.folder / _CHECKPOINTS / "last.ckpt"

    def finished(self) -> Result | None:
        """Returns the result, if this very configuration has been run to its end, on what it would read now."""
        result = Result.read(self.folder)
        return result if result is not None and result.done and self._changed_since(result) is None else None

    def _changed_since(self, before: Result) -> str | None:
        """Returns what is not as it was when a result was begun; None if all is."""
        if before.config_hash != self.config_hash:
            return "its configuration has changed"
        versions = {before.read_version, self.read_version} - {""}  # what is not here is missed when it is read
        return "a file of its data or models has changed, by size or time" if len(versions) > 1 else None

    def prepare(self) -> None:
        """Makes the folder ready; a run of another or an unknown configuration, or on other files, is put aside."""
        before = Result.read(self.folder)
        why = self._changed_since(before) if before is not None else None
        if before is None and self.last_checkpoint.exists():
            why = "nothing says what was run"
        if why is not None:
            names = (f"{self.folder.name}.replaced-{number}" for number in itertools.count(1))
            aside = next(path for name in names if not (path := self.folder.with_name(name)).exists())
            print(f"{self.folder}: {why}; the old run is now {aside.name}", flush=True)
            self.folder.rename(aside)
        write_whole(self.folder / _CONFIG_FILE, yaml_files.dump(self._placed_config()))
        with (self.folder / _LOG_FILE).open("a", encoding="utf-8") as log:
            log.write(f"{_BEGINS}\n")
        Result("running", self.config_hash, tags=self.tags, read_version=self.read_version).write(self.folder)

    def _placed_config(self) -> Config:
        """Returns the configuration with logs, checkpoints and result in the folder, without progress bars."""
        placed = copy.deepcopy(self.config)
        trainer = placed["trainer"]
        trainer |= {"default_root_dir": str(self.folder), "enable_progress_bar": False}
        if trainer["logger"]:
            options = {"save_dir": str(self.folder), "name": "logs", "version": "", "default_hp_metric": False}
            trainer["logger"] = {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": options}
        given = trainer["callbacks"] or []
        record = {"class_path": "lopa_lightning.callbacks.RunRecord", "init_args": {"folder": str(self.folder)}}
        trainer["callbacks"] = [*(given if isinstance(given, list) else [given]), record]
        placed["checkpoint"]["dirpath"] = str(self.folder / _CHECKPOINTS)
        placed["last_checkpoint"] |= {"dirpath": str(self.folder / _CHECKPOINTS), "filename": "last"}
        return placed

    def result(self, exit_code: int | None) -> Result:
        """Returns what came out, once its process has ended, and writes it down if that is a failure."""
        if (finished := self.finished()) is not None:
            shutil.rmtree(self.folder / _CHECKPOINTS, ignore_errors=True)
            return finished
        if exit_code is not None and exit_code < 0:
            name = signal.Signals(-exit_code).name
            why = f"its process was ended by {name}" + (", perhaps for want of memory" if name == "SIGKILL" else "")
        else:  # the last error in the log, or else its last line
            text = (self.folder / _LOG_FILE).read_text(encoding="utf-8", errors="replace")
            lines = text.rpartition(_BEGINS)[2].strip().splitlines()  # of this start alone
            errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
            why = [f"its process ended with status {exit_code}", *lines[-1:], *errors[-1:]][-1]
        result = Result("failed", self.config_hash, why, self.tags, read_version=self.read_version)
        result.write(self.folder)
        return result


class Runs:
    """Makes the runs of a command, each in a process of its own, and keeps a report up to date.

    Args:
        folder: Of the report; the runs are in ``runs``.
        report: Writes the report; called whenever a run has ended.
        workers: Runs at once; None for one on each visible GPU, or one where there is none.

    Attributes:
        results: What came out, by folder.
        total: How many runs there will be, for messages.
    """

    def __init__(self, folder: str, report: Callable[[], None], workers: int | None = None) -> None:
        self.folder = Path(folder) / "runs"
        self.results: dict[Path, Result] = {}
        self.total = 0
        self.workers = workers or max(1, torch.cuda.device_count())
        self._report = report

    def make(self, runs: Sequence[Run]) -> None:
        """Makes those runs that have not been made, in their order.

        A run that fails, or whose process dies, is a result that says so. When this is left by an exception, the
        processes are ended.
        """
        ended = {run.folder: result for run in runs if (result := run.finished()) is not None}
        if ended:
            print(f"{len(ended)} of {len(runs)} runs have ended before", flush=True)
        self.results |= ended
        waiting, slots = [run for run in runs if run.folder not in ended], list(range(self.workers))
        running: dict[Any, tuple[Run, int, BaseProcess]] = {}
        try:
            while waiting or running:
                while waiting and slots:
                    run, slot = waiting.pop(0), slots.pop(0)
                    process = _started(run, slot, self.workers)
                    running[process.sentinel] = (run, slot, process)
                for sentinel in connection.wait(list(running)):
                    run, slot, process = running.pop(sentinel)
                    slots.append(slot)
                    process.join()
                    self._end(run, run.result(process.exitcode))
        finally:
            for _, _, process in running.values():
                process.kill()  # checkpoints are written whole or not at all
                process.join()

    def _end(self, run: Run, result: Result) -> None:
        """Keeps a result, and says so."""
        self.results[run.folder] = result
        if result.done:
            outcome = f"score {result.score:.4f}, {result.figures['seconds']:.0f} s"
        else:
            outcome = f"failed: {result.reason} (see {run.folder / _LOG_FILE})"
        print(f"[{len(self.results)}/{self.total}] {self._name(run.folder)}: {outcome}", flush=True)
        self._report()

    def _name(self, folder: Path) -> str:
        """Returns a run's name."""
        return folder.relative_to(self.folder).as_posix()

    def end_command(self) -> None:
        """Ends the program with status 1 and a line on the standard error if a run has failed."""
        failed = [self._name(folder) for folder, result in self.results.items() if not result.done]
        if failed:
            sys.stderr.write(f"{len(failed)} of {len(self.results)} runs failed: {', '.join(failed)}\n")
            raise SystemExit(1)


def _started(run: Run, slot: int, workers: int) -> BaseProcess:
    """Starts the process of a run: a fork of one that has imported everything, where there are such forks."""
    run.prepare()
    visible, count = os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.device_count()
    devices = visible.split(",") if visible else [str(index) for index in range(count)]
    # Without this, each of several processes would take all cores, and they would wait for each other.
    threads = None if workers == 1 else max(1, (os.cpu_count() or 1) // workers)
    has_forks = "forkserver" in multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if has_forks else "spawn")
    if has_forks:
        context.set_forkserver_preload(_PRELOADED)
    # Not a daemon: those may not have children, and a loader's workers are.
    process: BaseProcess = context.Process(target=_fit, args=(run, devices[slot % count] if count else None, threads))
    process.start()
    return process


def _fit(run: Run, device: str | None, threads: int | None) -> None:
    """Runs ``lopa fit`` in this process, which is its own."""
    log = (run.folder / _LOG_FILE).open("a", buffering=1, encoding="utf-8", errors="replace")
    for descriptor in (1, 2):
        os.dup2(log.fileno(), descriptor)
    sys.stdout = sys.stderr = log
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to children too; the parent ends them
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    # Always: after a fork torch renews its pool of threads at the first use, and two threads at once break that.
    torch.set_num_threads(threads or torch.get_num_threads())
    arguments = ["fit", "--config", str(run.folder / _CONFIG_FILE)]
    if run.last_checkpoint.is_file():
        try:
            checkpoint.read(run.last_checkpoint)
            arguments += ["--ckpt_path", str(run.last_checkpoint)]
            print(f"Goes on from {run.last_checkpoint}")
        except LoPAError as error:
            print(f"Starts from the beginning: {error}")
    main(arguments)


def _end_with_parent() -> None:
    """Ends this process when the one that started it is gone: else the same command would run it twice."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)

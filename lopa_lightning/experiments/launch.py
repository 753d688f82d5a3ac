"""Runs in processes of their own, several at once."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from lopa_lightning.errors import LoPAError
from lopa_lightning.experiments.result import Result
from lopa_lightning.experiments.run import Run, execute

# Imported once, in the process that runs are forked from.
_PRELOADED = [
    "lopa_lightning.experiments.run",
    "lopa_lightning.data",
    "transformers.modeling_utils",
    "torch.utils.tensorboard",
]


def launch(runs: Sequence[Run], on_end: Callable[[Run, Result], None], workers: int | None = None) -> None:
    """Runs each of ``runs`` in a process of its own, in their order.

    A run that fails, or whose process dies, is a :class:`~lopa_lightning.experiments.result.Result`
    that says so. When this is left by an exception, the processes are ended.

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
                on_end(run, _result(run, process.exitcode))
    finally:
        for process in running:
            process.kill()  # checkpoints are written whole or not at all
            process.join()


def run_one(run: Run) -> Result:
    """Runs one configuration in a process of its own, and returns what came out.

    Args:
        run: What to run; if it is finished already, its result is returned.
    """
    finished = run.finished()
    if finished is not None:
        return finished
    results: list[Result] = []
    launch([run], lambda _, result: results.append(result), workers=1)
    return results[0]


def _start(run: Run, environment: dict[str, str], threads: int | None) -> BaseProcess:
    run.prepare()
    context: Any
    if "forkserver" in multiprocessing.get_all_start_methods():
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
    else:
        context = multiprocessing.get_context("spawn")
    # Not a daemon: those may not have children, and a DataLoader's workers are.
    process: BaseProcess = context.Process(target=execute, args=(run, environment, threads))
    process.start()
    return process


def _result(run: Run, exit_code: int | None) -> Result:
    result = Result.read(run.folder)
    if result is not None and result.config_hash == run.config_hash:
        return result
    if exit_code is not None and exit_code < 0:
        name = signal.Signals(-exit_code).name
        why = f"its process was ended by {name}" + (", perhaps for want of memory" if name == "SIGKILL" else "")
    else:
        why = f"its process ended with status {exit_code}"
    result = run.failed(why)
    result.write(run.folder)
    return result


def _devices() -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]
    return names[: torch.cuda.device_count()]

"""Processes of their own for runs: forks of this one, which has imported everything that they need."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from lightning.pytorch.utilities import rank_zero_only

WORLD = 2


def _forked(function: Callable[[], object], log: Path) -> int:
    """Starts a fork that calls a function with its output in a file, and returns its process id."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        with log.open("w", buffering=1) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            sys.stdout = sys.stderr = file
            # After a fork torch renews its pool of threads at the first use, and two threads at once break that.
            torch.set_num_threads(torch.get_num_threads())
            function()
            status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        with log.open("a") as file:
            traceback.print_exc(file=file)
    finally:
        os._exit(status)


def forked(function: Callable[[], object], log: Path) -> int:
    """Calls a function in a forked process, whose output goes to a file.

    Returns:
        The exit status, or the negative number of the signal that killed it.
    """
    return os.waitstatus_to_exitcode(os.waitpid(_forked(function, log), 0)[1])


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port


def on_two(function: Callable[..., object], *arguments: Any, folder: Path, cache: Path | None = None) -> list[int]:
    """Calls a function in two forked processes, with the environment that ``torchrun`` gives them.

    As under ``torchrun``, the end of one in an error ends the other.

    Args:
        function: Called in each of them, with the arguments.
        folder: Gets the outputs, ``log0.txt`` and ``log1.txt``.
        cache: Of data sets, in place of that of all tests.

    Returns:
        The exit statuses, as those of ``forked``.
    """
    shared = {"WORLD_SIZE": WORLD, "LOCAL_WORLD_SIZE": WORLD, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}

    def call(rank: int) -> None:
        own = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "TORCHELASTIC_RUN_ID": "tests"}
        os.environ.update({name: str(value) for name, value in {**shared, **own}.items()})
        rank_zero_only.rank = rank  # read from the environment when Lightning is imported
        if cache is not None:
            datasets.config.HF_DATASETS_CACHE = cache
        function(*arguments)

    running = {_forked(lambda rank=rank: call(rank), folder / f"log{rank}.txt"): rank for rank in range(WORLD)}
    statuses = [0] * WORLD
    deadline = None
    while running:
        for child in list(running):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                statuses[running.pop(child)] = os.waitstatus_to_exitcode(status)
        if any(statuses) and running and deadline is None:
            deadline = time.monotonic() + 30
            for child in running:
                os.kill(child, signal.SIGTERM)
        if deadline is not None and time.monotonic() > deadline:
            for child in running:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.02)
    return statuses


def logs(folder: Path) -> str:
    """The end of what both processes have said."""
    return "\n".join((folder / f"log{rank}.txt").read_text()[-3000:] for rank in range(WORLD))


@contextmanager
def runs_in_forks() -> Iterator[None]:
    """Within it, the runs of a command are forks of this process, and not of a server that imports it all first."""
    get_context = multiprocessing.get_context
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            multiprocessing, "get_context", lambda kind=None: get_context("fork" if kind == "forkserver" else kind)
        )
        yield

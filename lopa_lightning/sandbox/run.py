"""Runs programs that a model wrote and nobody has read.

Each program runs in a process of its own: in a session and a temporary folder of its own, with a scrubbed
environment, ``python -I -S`` (the standard library and nothing else), no input, no open files but its own standard
error, and limits on time, memory, processes, files and output. Around it stand as many of these walls as the machine
has, found out by trying; :func:`isolation` names them, each :class:`Outcome` repeats them, and
:func:`isolation_line` says what a missing one leaves open:

- process and network namespaces: it sees and signals no other process, nothing of it survives, no network;
- own file system: Python and the system's libraries read-only, and a small ``/tmp`` in memory. Linux 5.12;
- Landlock: it opens no file but those, also where no namespaces can be had, and from Linux 6.12 on signals nobody;
- system call filter, on x86-64 and 64-bit ARM: the kernel refuses what programs of a benchmark do not call, such as
  sockets, other processes' memory, memory that no limit counts, keys, and namespaces of their own;
- unprivileged user: started by root, it runs as a user without files.

The kernel is asked directly (``kernel.py``); nothing needs to be installed.

A program passes only if a random sentinel comes back that it cannot know: the sentinel is sent when the last line
has been executed, see ``runner.py``. Ending the process before that, by whatever exit code, is a failure.

Not covered, with all walls in force:

- A verdict given in bad faith. The tests are lines of the program, so a program can satisfy them with values that claim
  to equal everything, or by giving a name that the tests use another meaning; no harness of this kind can tell. Code
  that reaches the memory of its own interpreter (machine code, or bytecode made by hand) can find the sentinel. An
  audit hook stops the usual ways there: ctypes, subinterpreters, ``marshal.loads``, tracing, the garbage collector's
  lists. It is a tripwire and no wall: bytecode can also come from a ``.pyc`` file, and ctypes that is compiled into
  Python itself is known by its name alone. Such code still harms nothing outside.
- Memory between two looks, a tenth of a second apart: the limit of each process is exact, that of all together is not.
- CPU: each process has the CPU limit, all together the wall-clock limit and one another's cores.
- A hole in the kernel: a virtual machine or a machine of its own is a stronger wall.

Where a program cannot have namespaces, it can also signal its user's processes (before Linux 6.12) and change their
limits, end its supervisor and leave processes behind, change the mode and times of its user's files, and fill the
disk. The order of sets of strings differs between runs, as in Python without a hash seed.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Literal

from lopa_lightning.errors import LoPAError
from lopa_lightning.sandbox.limits import Limits as Limits

Status = Literal["passed", "failed", "timeout", "killed"]

_ROOT = str(Path(__file__).resolve().parents[2])
_START = "import sys; sys.path.append({!r}); from lopa_lightning.sandbox.supervisor import *; main({!r}, {!r})"
_GRACE = 30.0  # seconds over a program's own after which a supervisor counts as dead
_LONGEST = 2e6  # seconds that the system waits

_ALWAYS: tuple[str, ...] = ("process", "rlimits")
# In the order in which they are tried, with what a program can do where one is missing.
WALLS = {
    "process and network namespaces": "signal this user's processes and change their limits, use what the system call "
    "filter leaves of the network, and leave processes behind by killing its supervisor",
    "own file system": "see which files there are, change the attributes of this user's, and fill the disk",
    "Landlock": "where there is no own file system either, read and change all that this user can, and read its own "
    "memory in /proc and so claim to have passed",
    "system call filter": "read the memory of its parent and so claim to have passed, take memory that is not counted "
    "(memfd, System V), open sockets between virtual machines, and leave keys in this user's keyring",
    "unprivileged user": "act as this user: root",
}


@dataclass(frozen=True)
class Outcome:
    """Says how one program ended.

    Args:
        status: ``passed``: its last line was executed. ``failed``: an exception, or an end before the last
            line. ``timeout``: out of wall-clock or CPU time. ``killed``: by a signal, its own, the kernel's for
            want of memory, or the sandbox's for too much memory or output.
        stderr: The end of its standard error, with replacement for what is not UTF-8; where there is more
            to say, a last line that starts with ``sandbox:``.
        seconds: Wall-clock seconds, starting the process included.
        isolation: What was in force.
    """

    status: Status
    stderr: str
    seconds: float
    isolation: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Returns whether the last line was reached."""
        return self.status == "passed"


def require_permission(allowed: bool) -> None:
    """Checks that the user allowed generated code to be run.

    Raises:
        LoPAError: If not.
    """
    if not allowed:
        raise LoPAError(
            "this evaluation runs code that a model wrote, and that needs your permission: set "
            f"allow_code_execution: true. On this machine {isolation_line()}"
        )


def run_programs(programs: Sequence[str], limits: Limits = Limits(), workers: int | None = None) -> list[Outcome]:
    """Runs programs, several at once.

    Args:
        programs: Python source; what must hold is asserted in it.
        limits: What each may use.
        workers: How many run at once; None for as many as there are cores for this process.

    Returns:
        One outcome for each program, in their order.

    Raises:
        LoPAError: If ``workers`` is less than 1, or the machine cannot start programs.
    """
    if workers is not None and workers < 1:
        raise LoPAError(f"workers must be at least 1, got {workers}")
    return _run(programs, limits, workers, isolation())


def _run(programs: Sequence[str], limits: Limits, workers: int | None, walls: tuple[str, ...]) -> list[Outcome]:
    """Runs programs behind the given walls; see :func:`run_programs`."""
    workers = workers or len(os.sched_getaffinity(0))
    todo = list(enumerate(programs))[::-1]
    free: list[_Supervisor] = []
    running: dict[Any, _Supervisor] = {}  # by socket
    outcomes: dict[int, Outcome] = {}
    try:
        while todo or running:
            while todo and len(running) < workers:
                supervisor = free.pop() if free else _Supervisor(walls, limits)
                running[supervisor.socket] = supervisor
                supervisor.send(*todo.pop())
            if not (ready := wait([*running], min(limits.wall_seconds + _GRACE, _LONGEST))):
                for supervisor in running.values():
                    supervisor.process.kill()  # which the next round sees
            for key in ready:
                outcomes[running[key].index] = running[key].receive()
                if (supervisor := running.pop(key)).process.returncode is None:
                    free.append(supervisor)
    finally:
        for supervisor in [*free, *running.values()]:
            supervisor.close()
    return [outcomes[index] for index in range(len(programs))]


class _Supervisor:
    """Starts a supervisor process, and has it run one program at a time."""

    def __init__(self, walls: tuple[str, ...], limits: Limits) -> None:
        self.walls = walls
        self.socket, theirs = socket.socketpair()
        self.socket.settimeout(_GRACE)
        command = [sys.executable, "-I", "-S", "-B", "-X", "utf8", "-c", _START.format(_ROOT, walls, limits)]
        env = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "TMPDIR": tempfile.gettempdir()}
        with theirs:
            self.process = subprocess.Popen(
                command, stdin=theirs.fileno(), stdout=theirs.fileno(), env=env, cwd="/", start_new_session=True
            )

    def send(self, index: int, program: str) -> None:
        """Has a program run."""
        self.index = index
        with contextlib.suppress(OSError):  # a supervisor that is dead gives no answer
            self.socket.sendall(json.dumps(program).encode() + b"\n")

    def receive(self) -> Outcome:
        """Returns what became of the program.

        Raises:
            LoPAError: If it could not be started.
        """
        try:
            with self.socket.makefile("rb") as lines:
                answer = json.loads(lines.readline())
        except (OSError, ValueError):  # without a process namespace a program can kill its supervisor
            self.close()
            answer = {"status": "killed", "stderr": "sandbox: the supervisor was killed", "seconds": 0.0}
        if "error" in answer:
            raise LoPAError(f"the sandbox could not start a program: {answer['error']}")
        return Outcome(isolation=self.walls, **answer)

    def close(self) -> None:
        """Ends the process, and the program that it may be running."""
        self.socket.close()
        try:
            self.process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@functools.cache
def isolation() -> tuple[str, ...]:
    """Returns what programs are isolated by on this machine; found out by trying, once.

    Raises:
        LoPAError: If not even a plain process can be started.
    """
    if sys.platform != "linux":
        raise LoPAError(f"generated programs can be run on Linux only, not on {sys.platform}")
    if not _problem(everything := (*_ALWAYS, *_possible())):
        return everything
    if problem := _problem(kept := _ALWAYS):
        raise LoPAError(f"this machine cannot run programs in a sandbox: {problem}")
    for wall in _possible():
        if not _problem((*kept, wall)):
            kept = (*kept, wall)
    return kept


def isolation_line() -> str:
    """Says in one line what programs are isolated by on this machine, and what they can do for want of the rest."""
    missing = [f"without {wall} they can {WALLS[wall]}" for wall in _possible() if wall not in isolation()]
    return "; ".join([f"programs are isolated by: {', '.join(isolation())}", *missing])


def _possible() -> tuple[str, ...]:
    return tuple(wall for wall in WALLS if wall != "unprivileged user" or os.getuid() == 0)


def _problem(walls: tuple[str, ...]) -> str:
    """Returns why a trivial program does not run behind these walls; empty if it does."""
    try:
        (outcome,) = _run(["import json, math, re"], Limits(), 1, walls)
    except LoPAError as error:
        return str(error)
    return "" if outcome.passed else outcome.stderr

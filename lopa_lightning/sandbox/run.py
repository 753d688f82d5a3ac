"""Runs programs that nobody has read.

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

The kernel is asked directly (``jail/kernel.py``); nothing needs to be installed.

A program passes only if a random sentinel comes back that it cannot know: the sentinel is sent when the last line
has been executed, see ``jail/runner.py``. Ending the process before that, by whatever exit code, is a failure.

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
disk. Sets of strings are ordered anew in each run, as Python does without a hash seed.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from lopa_lightning.errors import LoPAError
from lopa_lightning.sandbox.plan import WALLS
from lopa_lightning.sandbox.plan import Limits as Limits

Status = Literal["passed", "failed", "timeout", "killed"]

_ROOT = str(Path(__file__).resolve().parents[2])
_START = "import sys; sys.path.append({!r}); from lopa_lightning.sandbox.supervisor import main; main()"
_GRACE = 30.0  # seconds over a program's own after which a supervisor counts as dead


@dataclass(frozen=True)
class Outcome:
    """What became of one program.

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
        """Whether the last line was reached."""
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
    walls = _walls()
    count = min(workers or len(os.sched_getaffinity(0)), max(len(programs), 1))
    free: queue.SimpleQueue[_Supervisor] = queue.SimpleQueue()
    supervisors = [_Supervisor(walls, limits) for _ in range(count)]
    for supervisor in supervisors:
        free.put(supervisor)

    def run(program: str) -> Outcome:
        supervisor = free.get()
        try:
            return supervisor.run(program)
        finally:
            free.put(supervisor)

    pool = ThreadPoolExecutor(count, thread_name_prefix="sandbox")
    try:
        return list(pool.map(run, programs))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for supervisor in supervisors:
            supervisor.end()
        pool.shutdown()


def isolation() -> tuple[str, ...]:
    """What programs are isolated by on this machine; found out by trying, once.

    Raises:
        LoPAError: If not even a plain process can be started.
    """
    return _named(_walls())


def isolation_line() -> str:
    """One line: what programs are isolated by on this machine, and what they can do for want of the rest."""
    names = isolation()
    missing = [f"without {wall} they can {WALLS[wall]}" for wall in _possible() if wall not in names]
    return "; ".join([f"programs are isolated by: {', '.join(names)}", *missing])


def _possible() -> tuple[str, ...]:
    return tuple(wall for wall in WALLS if wall != "unprivileged user" or os.getuid() == 0)


def _named(walls: Sequence[str]) -> tuple[str, ...]:
    return ("process", "rlimits", *walls)


@functools.cache
def _walls() -> tuple[str, ...]:
    """The walls behind which a trivial program still runs."""
    if sys.platform != "linux":
        raise LoPAError(f"generated programs can be run on Linux only, not on {sys.platform}")
    if not _problem(possible := _possible()):
        return possible
    if problem := _problem(()):
        raise LoPAError(f"this machine cannot run programs in a sandbox: {problem}")
    kept: tuple[str, ...] = ()
    for wall in possible:
        if not _problem((*kept, wall)):
            kept = (*kept, wall)
    return kept


def _problem(walls: Sequence[str]) -> str:
    """Why a trivial program does not run behind these walls; empty if it does."""
    supervisor = _Supervisor(walls, Limits())
    try:
        outcome = supervisor.run("import json, math, re")
    except LoPAError as error:
        return str(error)
    finally:
        supervisor.end()
    return "" if outcome.passed else outcome.stderr


class _Supervisor:
    """The host's side of a supervisor process: started when first needed, and again when it died."""

    def __init__(self, walls: Sequence[str], limits: Limits) -> None:
        self._walls, self._limits = walls, limits
        self._process: subprocess.Popen[bytes] | None = None
        self._lock, self._ended = threading.Lock(), False

    def run(self, program: str) -> Outcome:
        """Runs one program.

        Raises:
            LoPAError: If it could not be started, or :meth:`end` was called.
        """
        with self._lock:  # the thread of a program whose turn has just come must not start what nobody would end
            if self._ended:
                raise LoPAError("the sandbox has been closed")
            process = self._process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        watch = threading.Timer(self._limits.wall_seconds + _GRACE, process.kill)
        watch.start()
        try:
            process.stdin.write(json.dumps(program).encode() + b"\n")
            process.stdin.flush()
            answer = json.loads(process.stdout.readline())
        except (OSError, ValueError):
            # Without a process namespace a program can kill its supervisor; the next one gets a new one.
            self._close()
            answer = {"status": "killed", "stderr": "sandbox: the supervisor was killed", "seconds": 0.0}
        finally:
            watch.cancel()
        if "error" in answer:
            raise LoPAError(f"the sandbox could not start a program: {answer['error']}")
        return Outcome(isolation=_named(self._walls), **answer)

    def end(self) -> None:
        """Ends the process for good, and the program that it may be running."""
        with self._lock:
            self._ended = True
        self._close()

    def _close(self) -> None:
        if (process := self._process) is None:
            return
        assert process.stdin is not None
        assert process.stdout is not None
        self._process = None
        with contextlib.suppress(OSError):
            process.stdin.close()
        try:
            process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()

    def _start(self) -> subprocess.Popen[bytes]:
        config = json.dumps({"walls": self._walls, "limits": asdict(self._limits)})
        return subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-X", "utf8", "-c", _START.format(_ROOT), config],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "TMPDIR": tempfile.gettempdir()},
            cwd="/",
            start_new_session=True,
        )

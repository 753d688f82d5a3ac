"""Runs programs that nobody has read.

Each program runs in a process of its own: in a session and a temporary folder of its own, with a scrubbed
environment, ``python -I -S`` (the standard library and nothing else), no input, no open files but its
own standard error, and limits on time, memory, processes, files and output. Where the kernel allows, it also
has its own process namespace, so that it sees and reaches no other process and nothing of it survives; no
network, not even loopback; and its own file system, with Python and the system's libraries read-only and a
small ``/tmp`` in memory. Started by root, it runs as an unprivileged user. :func:`isolation` says what of this
is in force; each :class:`Outcome` repeats it.

The kernel is asked directly (``jail/kernel.py``), by the calls that bubblewrap makes: nothing needs to be installed,
and bubblewrap would add nothing, as it is started by programs of the user and needs the same rights. Where the kernel
refuses namespaces to users, :func:`isolation` does not name them; started by root, they are there again.

A program passes only if a random sentinel comes back that it cannot know: the sentinel is sent when the last line
has been executed, see ``jail/runner.py``. Ending the process before that, by whatever exit code, is a failure.

What this does not promise. The tests are lines of the program, so a program can satisfy them with values that claim
to equal everything, or by giving a name that the tests use another meaning; no harness of this kind can tell. Code
that corrupts the interpreter's memory can find the sentinel. Where :func:`isolation` names no namespaces, a program
can read what the user running it can read, use the network, and kill that user's processes: this one, or its
supervisor, after which what it left running may stay. A hole in the kernel is a hole here: a virtual machine or a
machine of its own is a stronger wall. Sets of strings are ordered anew in each run, as Python does without a hash seed.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import queue
import selectors
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

from lopa_lightning.errors import LoPAError
from lopa_lightning.evaluation.jail.plan import Bounds, Plan

Status = Literal["passed", "failed", "timeout", "killed"]

_ROOT = str(Path(__file__).resolve().parents[2])
_START = "import sys; sys.path.append({!r}); from lopa_lightning.evaluation.jail.supervisor import main; main()"
_WALL_PER_CPU = 12.0
_GRACE = 30.0  # seconds over a program's own after which a supervisor counts as dead


@dataclass(frozen=True)
class Limits:
    """What one program may use.

    Args:
        cpu_seconds: CPU seconds of each process: what ends an endless loop.
        seconds: Wall-clock seconds until the program and all its processes are killed, for what waits and
            computes nothing. By default twelve times ``cpu_seconds``: a busy machine does not change the result.
        memory_mb: Address space of each process, and resident memory of all of them, in MiB.
        processes: Processes and threads at a time.
        file_mb: Size of a file; with a file system of its own, also of all its files, in MiB.
        open_files: Open files of each process.
        output_kb: Standard error until the program is killed, in KiB. Standard output goes nowhere.

    Raises:
        LoPAError: If a limit is not above 0.
    """

    cpu_seconds: int = 10
    seconds: float | None = None
    memory_mb: int = 1024
    processes: int = 32
    file_mb: int = 64
    open_files: int = 64
    output_kb: int = 1024

    def __post_init__(self) -> None:
        for limit in fields(self):
            value = getattr(self, limit.name)
            if value is not None and not value > 0:
                raise LoPAError(f"limits.{limit.name} must be above 0, got {value!r}")

    @property
    def wall_seconds(self) -> float:
        """``seconds``, or what it is by default."""
        return _WALL_PER_CPU * self.cpu_seconds if self.seconds is None else self.seconds


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
            "allow_code_execution: true. On this machine programs would be isolated by: " + ", ".join(isolation())
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
    return list(iterate_programs(programs, limits, workers))


def iterate_programs(
    programs: Sequence[str], limits: Limits = Limits(), workers: int | None = None
) -> Iterator[Outcome]:
    """As :func:`run_programs`, yielding each outcome as soon as it and all before it are there."""
    if workers is not None and workers < 1:
        raise LoPAError(f"workers must be at least 1, got {workers}")
    count = min(workers or _cores(), max(len(programs), 1))
    plan = _plan()
    free: queue.SimpleQueue[_Supervisor] = queue.SimpleQueue()
    supervisors = [_Supervisor(plan, limits) for _ in range(count)]
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
        yield from pool.map(run, programs)
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
    return _plan().isolation


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def _plan() -> Plan:
    """The strictest plan that a trivial program survives."""
    if sys.platform != "linux":
        raise LoPAError(f"generated programs can be run on Linux only, not on {sys.platform}")
    problem = ""
    for namespaces, root in ((True, True), (True, False), (False, False)):
        for unprivileged in (True, False) if os.getuid() == 0 else (False,):
            plan = Plan(namespaces, root, unprivileged)
            supervisor = _Supervisor(plan, Limits())
            try:
                if (outcome := supervisor.run("import json, math, re")).passed:
                    return plan
                problem = outcome.stderr
            except LoPAError as error:
                problem = str(error)
            finally:
                supervisor.close()
    raise LoPAError(f"this machine cannot run programs in a sandbox: {problem}")


class _Supervisor:
    """The host's side of a supervisor process: started when first needed, and again when it died."""

    def __init__(self, plan: Plan, limits: Limits) -> None:
        self._plan, self._limits = plan, limits
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
        try:
            process.stdin.write(json.dumps(program).encode() + b"\n")
            process.stdin.flush()
            answer = json.loads(self._read_line(process))
        except (OSError, ValueError):
            # Without a process namespace a program can kill its supervisor; the next one gets a new one.
            self.close()
            answer = {"status": "killed", "stderr": "sandbox: the supervisor was killed", "seconds": 0.0}
        if "error" in answer:
            raise LoPAError(f"the sandbox could not start a program: {answer['error']}")
        return Outcome(isolation=self._plan.isolation, **answer)

    def end(self) -> None:
        """Closes for good."""
        with self._lock:
            self._ended = True
        self.close()

    def close(self) -> None:
        """Ends the process, and the program that it may be running."""
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
        limits = self._limits
        bounds = Bounds(
            seconds=limits.wall_seconds,
            cpu_seconds=limits.cpu_seconds,
            memory=limits.memory_mb << 20,
            processes=limits.processes,
            file=limits.file_mb << 20,
            open_files=limits.open_files,
            output=limits.output_kb << 10,
        )
        config = json.dumps({"plan": asdict(self._plan), "bounds": asdict(bounds)})
        return subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-X", "utf8", "-c", _START.format(_ROOT), config],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "TMPDIR": tempfile.gettempdir()},
            cwd="/",
            start_new_session=True,
        )

    def _read_line(self, process: subprocess.Popen[bytes]) -> bytes:
        """The next line of the supervisor, or what there is of it when it ends or falls silent."""
        assert process.stdout is not None
        deadline, line = time.monotonic() + self._limits.wall_seconds + _GRACE, b""
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while not line.endswith(b"\n") and selector.select(deadline - time.monotonic()):
                if not (part := os.read(process.stdout.fileno(), 1 << 16)):
                    break
                line += part
        return line

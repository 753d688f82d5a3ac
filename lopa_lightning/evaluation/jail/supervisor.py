"""A process that runs programs, one after the other, and leaves nothing of any of them.

It reads one JSON line for each program and answers with one; when its input ends, it ends, also in the
middle of a program. It adopts what a program's processes leave behind, and kills all of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from typing import Any

from lopa_lightning.evaluation.jail import cell, kernel
from lopa_lightning.evaluation.jail.plan import Bounds, Plan
from lopa_lightning.evaluation.jail.runner import SENTINEL_BYTES

_TAIL = 4096  # bytes of standard error that are kept
_LOST = b'{"signal": 9, "cpu": 0}'  # the process that waited for the program was killed itself
_LOOK = 0.1  # seconds between two looks at the memory of all processes
_CLEANING = 10.0  # seconds until a process that cannot be killed is an error
_USERS = range(60578, 61184)  # ids that no distribution gives to anybody


@dataclass
class _Seen:
    """What came of a program while it was watched."""

    stderr: bytes = b""
    written: int = 0
    status: dict[str, Any] = field(default_factory=dict)
    stopped: str = ""  # why the supervisor ended it

    def add(self, part: bytes) -> None:
        self.written += len(part)
        self.stderr = (self.stderr + part)[-_TAIL:]


class Supervisor:
    """Runs programs under one plan and one set of limits.

    Args:
        plan: What they are locked into.
        bounds: The limits.
    """

    def __init__(self, plan: Plan, bounds: Bounds) -> None:
        self.plan, self.bounds = plan, bounds
        self.user: int | None = None
        if plan.unprivileged:
            self._reservation, self.user = _reserve_user()

    def run(self, program: str) -> dict[str, Any]:
        """Runs one program.

        Returns:
            ``status``, ``stderr`` and ``seconds``; or ``error``, if it could not be started.
        """
        sentinel = os.urandom(SENTINEL_BYTES)
        started = time.monotonic()
        folder = tempfile.mkdtemp(prefix="lopa-sandbox-")
        try:
            if self.user is not None:
                os.chown(folder, self.user, self.user)
            seen, answer = self._run_in(folder, sentinel, program.encode("utf-8", "surrogatepass"), started)
        finally:
            _clear()
            _remove(folder)
        if "error" in seen.status:
            return {"error": seen.status["error"]}
        status, note = self._judge(seen, answer == sentinel)
        stderr = seen.stderr.decode("utf-8", "replace")
        if note:
            stderr = f"{stderr.rstrip()}\nsandbox: {note}".lstrip()
        return {"status": status, "stderr": stderr, "seconds": time.monotonic() - started}

    def _run_in(self, folder: str, sentinel: bytes, program: bytes, started: float) -> tuple[_Seen, bytes]:
        errors, answers, statuses = os.pipe(), os.pipe(), os.pipe()
        with tempfile.TemporaryFile() as file:
            file.write(sentinel + program)
            file.seek(0)
            if os.fork() == 0:
                given = cell.Descriptors(errors[1], file.fileno(), answers[1], statuses[1])
                cell.keep(self.plan, self.bounds, self.user, folder, given)
        for _, end in (errors, answers, statuses):
            os.close(end)
        try:
            seen = self._watch(errors[0], statuses[0], started + self.bounds.seconds)
            _clear()  # whoever still holds the other ends is gone, so what follows comes to an end
            with contextlib.suppress(OSError):
                while part := os.read(errors[0], 1 << 16):
                    seen.add(part)
            return seen, os.read(answers[0], 4 * SENTINEL_BYTES)
        finally:
            for start, _ in (errors, answers, statuses):
                os.close(start)

    def _watch(self, errors: int, statuses: int, deadline: float) -> _Seen:
        """Reads what the program writes until it has ended, or breaks a limit."""
        seen, look = _Seen(), time.monotonic() + _LOOK
        with selectors.DefaultSelector() as selector:
            for descriptor in (errors, statuses, sys.stdin.fileno()):
                selector.register(descriptor, selectors.EVENT_READ)
            while True:
                now = time.monotonic()
                if now >= look:
                    look = now + _LOOK
                    if _memory(_descendants(os.getpid())) > self.bounds.memory:
                        seen.stopped = f"its processes hold more than {self.bounds.memory >> 20} MB"
                if now >= deadline:
                    seen.stopped = f"still running after {self.bounds.seconds:g} s"
                for key, _ in [] if seen.stopped else selector.select(min(deadline, look) - now):
                    if key.fd == statuses:
                        seen.status = json.loads(os.read(statuses, 4096).split(b"\n")[0] or _LOST)
                    elif key.fd == errors:
                        self._listen(seen, errors, selector)
                    else:  # the host is gone
                        _clear()
                        os._exit(0)
                if seen.stopped or seen.status:
                    return seen

    def _listen(self, seen: _Seen, errors: int, selector: selectors.BaseSelector) -> None:
        if not (part := os.read(errors, 1 << 16)):
            selector.unregister(errors)
        seen.add(part)
        if seen.written > self.bounds.output:
            seen.stopped = f"wrote more than {self.bounds.output >> 10} kB"

    def _judge(self, seen: _Seen, returned: bool) -> tuple[str, str]:
        """The outcome's name, and what there is to say beside the program's own words."""
        if seen.stopped:
            return ("timeout" if seen.stopped.startswith("still") else "killed"), seen.stopped
        number = seen.status.get("signal")
        if number is not None:
            if number == signal.SIGXCPU or seen.status["cpu"] >= self.bounds.cpu_seconds:
                return "timeout", f"used {self.bounds.cpu_seconds} s of CPU"
            return "killed", f"ended by {signal.Signals(number).name}"
        if seen.status["exit"] == 0 and returned:
            return "passed", ""
        if seen.stderr:
            return "failed", ""
        return "failed", f"ended with exit code {seen.status['exit']} before its last line"


def _reserve_user() -> tuple[socket.socket, int]:
    """An id that no other supervisor uses, and a socket whose name reserves it as long as this process lives."""
    for user in _USERS:
        name = socket.socket(socket.AF_UNIX)
        try:
            name.bind(f"\0lopa-sandbox-user-{user}")
        except OSError:
            name.close()
        else:
            return name, user
    raise RuntimeError(f"all user ids from {_USERS[0]} to {_USERS[-1]} are in use")


def _children(pid: int) -> list[int]:
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            return [int(child) for child in file.read().split()]
    except OSError:
        return []


def _descendants(pid: int) -> list[int]:
    found = _children(pid)
    for child in found:
        found.extend(_children(child))
    return found


def _memory(pids: list[int]) -> int:
    pages = 0
    for pid in pids:
        with contextlib.suppress(OSError), open(f"/proc/{pid}/statm") as file:
            pages += int(file.read().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _clear() -> None:
    """Kills every descendant, and waits until none is left."""
    deadline = time.monotonic() + _CLEANING
    while True:
        for pid in _descendants(os.getpid()):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            time.sleep(0.001)
        if time.monotonic() > deadline:
            raise RuntimeError("a process of the program could not be ended")


def _remove(folder: str) -> None:
    """Removes a folder that a program may have filled with what Python's own removal does not survive."""
    try:
        os.rmdir(folder)
    except OSError:
        if shutil.which("rm"):
            subprocess.run(["rm", "-rf", "--", folder], check=False, stderr=subprocess.DEVNULL)
        else:
            shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """Serves until the input ends. The first argument is the configuration, as JSON."""
    config = json.loads(sys.argv[1])
    kernel.adopt_orphans()
    supervisor = Supervisor(Plan(**config["plan"]), Bounds(**config["bounds"]))
    # The host waits for each answer, so nothing of a next line can lie in the buffer.
    for line in iter(sys.stdin.buffer.readline, b""):
        print(json.dumps(supervisor.run(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()

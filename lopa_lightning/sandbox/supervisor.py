"""Runs programs in a process of its own, one after the other, and leaves nothing of any of them.

It reads one JSON line for each program and answers with one; when its input ends, it ends, also in the
middle of a program. It adopts what a program's processes leave behind, and kills all of it.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator
from typing import Any

from lopa_lightning.sandbox import kernel
from lopa_lightning.sandbox.limits import Limits
from lopa_lightning.sandbox.runner import SENTINEL_BYTES
from lopa_lightning.sandbox.walls import run_behind

_TAIL = 4096  # bytes of standard error that are kept
_LOST = b'{"code": -9, "cpu": 0}'  # the process that waited for the program was killed itself
_LOOK = 0.1  # seconds between two looks at all processes
_CLEANING = 10.0  # seconds until a process that cannot be killed is an error
_USERS = range(60578, 61184)  # ids that no distribution gives to anybody


class Supervisor:
    """Runs programs behind the same walls, under the same limits.

    Args:
        walls: What they are locked into.
        limits: What each may use.
    """

    def __init__(self, walls: Collection[str], limits: Limits) -> None:
        self.walls, self.limits = walls, limits
        self.user = _USERS[os.getpid() % len(_USERS)] if "unprivileged user" in walls else None

    def run(self, program: str) -> dict[str, Any]:
        """Runs one program.

        Returns:
            ``status``, ``stderr`` and ``seconds``.

        Raises:
            OSError: If it could not be started.
        """
        sentinel, started = os.urandom(SENTINEL_BYTES), time.monotonic()
        folder = tempfile.mkdtemp(prefix="lopa-sandbox-")
        answers, statuses = os.pipe(), os.pipe()
        with tempfile.TemporaryFile() as file, tempfile.TemporaryFile() as errors:
            file.write(sentinel + program.encode("utf-8", "surrogatepass"))
            file.seek(0)
            if os.fork() == 0:
                given = (errors.fileno(), file.fileno(), answers[1], statuses[1])
                run_behind(self.walls, self.limits, self.user, folder, given)
            os.close(answers[1])
            os.close(statuses[1])
            with open(answers[0], "rb", 0) as answer, open(statuses[0], "rb", 0) as status:
                try:
                    seen = self._watch(status.fileno(), errors.fileno(), started + self.limits.wall_seconds)
                finally:
                    _clear()  # whoever still holds the other end is gone, so what follows comes to an end
                    _remove(folder)
                returned = answer.read(4 * SENTINEL_BYTES) == sentinel
            size = os.fstat(errors.fileno()).st_size
            stderr = os.pread(errors.fileno(), _TAIL, max(size - _TAIL, 0)).decode("utf-8", "replace")
        if size > self.limits.output_kb << 10:
            seen = {"killed": f"wrote more than {self.limits.output_kb} kB"}
        outcome, note = self._judge(seen, returned, bool(stderr))
        if note:
            stderr = f"{stderr.rstrip()}\nsandbox: {note}".lstrip()
        return {"status": outcome, "stderr": stderr, "seconds": time.monotonic() - started}

    def _watch(self, status: int, errors: int, deadline: float) -> dict[str, Any]:
        """Returns how the program ended, or, under the status that follows, which limit it broke."""
        while True:
            ready, _, _ = select.select([status, sys.stdin.fileno()], [], [], _LOOK)
            if sys.stdin.fileno() in ready:
                sys.exit()  # the host is gone
            if status in ready:
                ended = dict(json.loads(os.read(status, 4096).split(b"\n")[0] or _LOST))
                if "error" in ended:
                    raise OSError(ended["error"])
                return ended
            if time.monotonic() >= deadline:
                return {"timeout": f"still running after {self.limits.wall_seconds:g} s"}
            if broken := self._broken_by_all():
                return {"killed": broken}
            if os.fstat(errors).st_size > self.limits.output_kb << 10:
                return {}  # the size says it all

    def _broken_by_all(self) -> str:
        """Returns which limit all processes together have broken."""
        tasks, pages = 0, 0
        for pid in _descendants():
            with contextlib.suppress(OSError), open(f"/proc/{pid}/statm") as file:
                pages += int(file.read().split()[1])
                tasks += len(os.listdir(f"/proc/{pid}/task"))
        if pages * os.sysconf("SC_PAGE_SIZE") > self.limits.memory_mb << 20:
            return f"its processes hold more than {self.limits.memory_mb} MB"
        # Two are the sandbox's own.
        return f"more than {self.limits.processes} processes" if tasks > self.limits.processes + 2 else ""

    def _judge(self, seen: dict[str, Any], returned: bool, spoke: bool) -> tuple[str, str]:
        """Returns the outcome's status, and what there is to say beside the program's own words."""
        if "code" not in seen:
            ((status, note),) = seen.items()
            return status, note
        code = seen["code"]
        if code < 0:
            if -code == signal.SIGXCPU or seen["cpu"] >= self.limits.cpu_seconds:
                return "timeout", f"used {self.limits.cpu_seconds} s of CPU"
            named = {number.value: number.name for number in signal.Signals}  # most real-time signals have no name
            return "killed", f"ended by {named.get(-code, f'signal {-code}')}"
        if code == 0 and returned:
            return "passed", ""
        return "failed", "" if spoke else f"ended with exit code {code} before its last line"


def _descendants() -> Iterator[int]:
    """Yields every process below this one, children of their threads included."""
    todo = [os.getpid()]
    while todo:
        for path in glob.glob(f"/proc/{todo.pop()}/task/*/children"):
            with contextlib.suppress(OSError), open(path) as file:
                found = [int(pid) for pid in file.read().split()]
                todo += found
                yield from found


def _clear() -> None:
    """Kills every descendant, and waits until none is left."""
    deadline = time.monotonic() + _CLEANING
    while True:
        for pid in _descendants():
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
    try:
        os.rmdir(folder)
    except OSError:  # Python's own removal does not survive all that a program may have filled it with
        subprocess.run(["rm", "-rf", "--", folder], check=False, stderr=subprocess.DEVNULL)


def main(walls: Collection[str], limits: Limits) -> None:
    """Runs a program for each line of the input, until that ends; see :class:`Supervisor`."""
    kernel.adopt_orphans()
    kernel.hide_memory()  # the sentinel is in it
    supervisor = Supervisor(walls, limits)
    # The host waits for each answer, so nothing of a next line can be in the buffer.
    for line in iter(sys.stdin.buffer.readline, b""):
        try:
            answer = supervisor.run(json.loads(line))
        except (OSError, RuntimeError) as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)

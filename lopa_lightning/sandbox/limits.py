"""Limits the time, memory, processes and files of a program."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from lopa_lightning.errors import LoPAError


@dataclass(frozen=True)
class Limits:
    """Sets what one program may use.

    Args:
        cpu_seconds: CPU seconds of each process: what ends an endless loop.
        seconds: Wall-clock seconds until the program and all its processes are killed, for what waits and
            computes nothing. By default twelve times ``cpu_seconds``: a busy machine does not change the result.
        memory_mb: Address space of each process, and resident memory of all of them, in MiB; the latter is looked
            at ten times a second.
        processes: Processes and threads at a time.
        file_mb: Size of a file; with a file system of its own, also of all its files, in MiB.
        open_files: Open files of each process.
        output_kb: Standard error until the program is killed, in KiB. Standard output goes nowhere.

    Raises:
        LoPAError: If a limit is not above 0 and finite.
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
            if value is not None and not 0 < value < math.inf:
                raise LoPAError(f"limits.{limit.name} must be above 0 and finite, got {value!r}")

    @property
    def wall_seconds(self) -> float:
        """Returns ``seconds``, or its default."""
        return 12.0 * self.cpu_seconds if self.seconds is None else self.seconds

"""What a supervisor is told by the host: what programs are locked into, and what they may use."""

from __future__ import annotations

from dataclasses import dataclass, fields

from lopa_lightning.errors import LoPAError

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
class Limits:
    """What one program may use.

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
        return 12.0 * self.cpu_seconds if self.seconds is None else self.seconds

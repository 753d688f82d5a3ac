"""What a supervisor is told by the host."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """What programs are locked into.

    Args:
        namespaces: Processes, network, IPC and host name of their own.
        root: A file system of their own, read-only, with a small ``/tmp`` in memory.
        unprivileged: A user id that nobody else has, where root asks.

    Example:
        >>> Plan(namespaces=True).isolation
        ('process', 'rlimits', 'process namespace', 'network namespace')
    """

    namespaces: bool = False
    root: bool = False
    unprivileged: bool = False

    @property
    def isolation(self) -> tuple[str, ...]:
        """What is in force, in words."""
        named = {
            "process": True,
            "rlimits": True,
            "process namespace": self.namespaces,
            "network namespace": self.namespaces,
            "read-only file system": self.root,
            "unprivileged user": self.unprivileged,
        }
        return tuple(name for name, there in named.items() if there)


@dataclass(frozen=True)
class Bounds:
    """Limits in the kernel's units: seconds, bytes and counts.

    Args:
        seconds: Wall-clock seconds of a program.
        cpu_seconds: CPU seconds of a process.
        memory: Address space of a process, and resident memory of all.
        processes: Processes and threads.
        file: Bytes of a file.
        open_files: Open files of a process.
        output: Bytes of standard error.
    """

    seconds: float
    cpu_seconds: int
    memory: int
    processes: int
    file: int
    open_files: int
    output: int

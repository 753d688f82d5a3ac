"""Names the calls of Linux that Python has no names for."""

from __future__ import annotations

import ctypes
import os
import stat
import struct
from collections.abc import Iterable

NEW_MOUNT, NEW_IPC, NEW_USER, NEW_PID, NEW_NET = 0x00020000, 0x08000000, 0x10000000, 0x20000000, 0x40000000
NOSUID, NODEV, NOEXEC, BIND, RECURSIVE, PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18

_MOUNT_SETATTR, _LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_ENFORCE = 442, 444, 445, 446  # on every architecture

# What programs of a benchmark do not call, and what would lead out of their limits: memory that is not counted
# (memfd, System V), memory of other processes, keys, sockets of every family, namespaces of their own, and the parts
# of the kernel that are attacked most. The same names in both lists: socket, ptrace, process_vm_readv and _writev,
# kcmp, memfd_create, shmget, shmat, shmctl, semget, semctl, msgget, msgctl, mq_open, mq_unlink, add_key, request_key,
# keyctl, unshare, setns, bpf, perf_event_open, userfaultfd. First the audit architecture and the number of clone.
_CALLS = {
    "x86_64": (0xC000003E, 56, (41, 101, 310, 311, 312, 319, 29, 30, 31, 64, 66, 68, 71, 240, 241, 248, 249, 250,
               272, 308, 321, 298, 323)),
    "aarch64": (0xC00000B7, 220, (198, 117, 270, 271, 272, 279, 194, 196, 195, 190, 191, 186, 187, 180, 181, 217, 218,
                219, 97, 268, 280, 241, 282)),
}  # fmt: skip
# pidfd_send_signal, io_uring_setup, _enter and _register, pidfd_open, clone3 (whose flags no filter can read; libraries
# then use clone), pidfd_getfd, process_madvise, memfd_secret. All of the table after the last are newer than it.
_CALLS_OF_ALL = (424, 425, 426, 427, 434, 435, 438, 440, 447)
_NEWEST_CALL = 462
_CLONE_NAMESPACES = 0x7E020000

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: int | bytes | None) -> int:
    """Calls a function of the C library, with integers as 64 bits."""
    result: int = getattr(_libc, name)(*(ctypes.c_long(part) if isinstance(part, int) else part for part in arguments))
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def _prctl(option: int, value: int, pointer: bytes | None = None) -> None:
    _call("prctl", option, value, pointer, 0, 0)


def die_with_parent() -> None:
    """Has this process killed when its parent ends."""
    _prctl(1, 9)


def hide_memory(hidden: bool = True) -> None:
    """Keeps other processes of the same user from this one's memory, until it executes another program."""
    _prctl(4, not hidden)


def adopt_orphans() -> None:
    """Makes this process the parent of every descendant that loses its own."""
    _prctl(36, 1)


def renounce_privileges() -> None:
    """Keeps programs that this process becomes from rights: by a set-user-id bit, as root, or otherwise."""
    if os.getuid() == 0:
        _prctl(28, 0b1111)  # root is a user like others, for good
    _prctl(38, 1)


def unshare(namespaces: int) -> None:
    """Leaves namespaces of the parent for new ones: ``NEW_MOUNT`` and the others, added up."""
    _call("unshare", namespaces)


def mount(source: str, target: str, kind: str = "", flags: int = 0, data: str = "") -> None:
    """Shows one place of the file system at another, or a file system of a kind."""
    _call("mount", os.fsencode(source), os.fsencode(target), kind.encode(), flags, data.encode())


def set_read_only(path: str, read_only: bool) -> None:
    """Makes the mount at ``path``, and all below it, read-only and free of set-user-id; or it alone writable."""
    wanted = struct.pack("4Q", 0x1 | 0x2, 0, 0, 0) if read_only else struct.pack("4Q", 0, 0x1, 0, 0)
    _call("syscall", _MOUNT_SETATTR, -100, os.fsencode(path), 0x8000 * read_only, wanted, len(wanted))


def restrict_files(readable: Iterable[str], writable: Iterable[str]) -> None:
    """Lets this process and what it becomes open nothing but files at or below the given paths (Landlock, Linux 5.13).

    From Linux 6.12 on they can signal nobody outside either.
    """
    version = _call("syscall", _LANDLOCK_CREATE, None, 0, 1)
    every = (1 << (13, 14, 15, 15, 16)[min(version, 5) - 1]) - 1
    wanted = struct.pack("3Q", every, 0, 3 if version >= 6 else 0)
    rules = _call("syscall", _LANDLOCK_CREATE, wanted, len(wanted), 0)
    for paths, rights in ((readable, 0b1101), (writable, every)):
        for path in filter(os.path.exists, paths):
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            possible = every if stat.S_ISDIR(os.fstat(place).st_mode) else every & 0xC007
            _call("syscall", _LANDLOCK_ADD, rules, 1, struct.pack("=Qi", rights & possible, place), 0)
            os.close(place)
    _call("syscall", _LANDLOCK_ENFORCE, rules, 0)
    os.close(rules)


def filter_calls() -> None:
    """Has the kernel refuse ``_CALLS``, and all newer than those known here, as if it did not have them.

    Raises:
        OSError: If this is neither x86-64 nor 64-bit ARM.
    """
    if (machine := os.uname().machine) not in _CALLS:
        raise OSError(f"the system calls of {machine} are not known")
    architecture, clone, own = _CALLS[machine]
    load, equal, at_least, any_bit, give, refuse = 0x20, 0x15, 0x35, 0x45, 0x06, 0x00050000 | 38  # ENOSYS
    # Another architecture ends the process.
    rows = [(load, 0, 0, 4), (equal, 1, 0, architecture), (give, 0, 0, 0x80000000), (load, 0, 0, 0)]
    # The number of a call of the x32 ABI is above all others.
    for test, number in [(at_least, _NEWEST_CALL + 1), *((equal, number) for number in (*own, *_CALLS_OF_ALL))]:
        rows += [(test, 0, 1, number), (give, 0, 0, refuse)]
    # Of clone the flags.
    rows += [(equal, 0, 3, clone), (load, 0, 0, 16), (any_bit, 0, 1, _CLONE_NAMESPACES), (give, 0, 0, refuse)]
    rows += [(give, 0, 0, 0x7FFF0000)]  # allows
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *row) for row in rows))
    _prctl(22, 2, struct.pack("@HP", len(rows), ctypes.addressof(code)))

"""The calls of Linux that Python has no names for."""

from __future__ import annotations

import ctypes
import os

NEW_NAMESPACES = {
    "mount": 0x00020000,
    "uts": 0x04000000,
    "ipc": 0x08000000,
    "user": 0x10000000,
    "pid": 0x20000000,
    "net": 0x40000000,
}
NOSUID, NODEV, NOEXEC, BIND, RECURSIVE, PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18

_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_MOUNT_SETATTR = 442  # the same on every architecture
_PARENT_DEATH_SIGNAL, _CHILD_SUBREAPER, _NO_NEW_PRIVILEGES = 1, 36, 38

_libc = ctypes.CDLL(None, use_errno=True)


class _MountAttributes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "user_namespace")]


def die_with_parent() -> None:
    """Has this process killed when its parent ends."""
    _prctl(_PARENT_DEATH_SIGNAL, 9)


def adopt_orphans() -> None:
    """Makes this process the parent of every descendant that loses its own."""
    _prctl(_CHILD_SUBREAPER, 1)


def renounce_privileges() -> None:
    """No program that this process becomes can gain rights, by a set-user-id bit or otherwise."""
    _prctl(_NO_NEW_PRIVILEGES, 1)


def unshare(*namespaces: str) -> None:
    """Leaves the namespaces of the parent for new ones, named as in ``NEW_NAMESPACES``."""
    flags = 0
    for name in namespaces:
        flags |= NEW_NAMESPACES[name]
    _check(_libc.unshare(flags), "unshare")


def mount(source: str, target: str, kind: str = "", flags: int = 0, data: str = "") -> None:
    """Shows one place of the file system at another, or a file system of a kind."""
    _check(
        _libc.mount(os.fsencode(source), os.fsencode(target), kind.encode(), ctypes.c_ulong(flags), data.encode()),
        f"mount {target}",
    )


def make_read_only(path: str) -> None:
    """Makes the mount at ``path``, and all below it, read-only and free of set-user-id; Linux 5.12."""
    wanted = _MountAttributes(set=0x1 | 0x2)
    _check(
        _libc.syscall(
            ctypes.c_long(_MOUNT_SETATTR),
            ctypes.c_int(_AT_FDCWD),
            ctypes.c_char_p(os.fsencode(path)),
            ctypes.c_uint(_AT_RECURSIVE),
            ctypes.byref(wanted),
            ctypes.c_size_t(ctypes.sizeof(wanted)),
        ),
        "mount_setattr",
    )


def _prctl(option: int, value: int) -> None:
    _check(_libc.prctl(option, ctypes.c_ulong(value), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0)), "prctl")


def _check(result: int, name: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")

"""Runs a program behind walls: namespaces, a file system of its own, an unprivileged user, and limits."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NoReturn

from lopa_lightning.sandbox import kernel
from lopa_lightning.sandbox.limits import Limits

RUNNER = Path(__file__).with_name("runner.py").read_text(encoding="utf-8")
PYTHON = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
NOBODY = 65534

# Everything the interpreter and the standard library may need; what is not there is left out.
_SYSTEM = ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/nix/store", "/etc/ld.so.cache", "/etc/ld.so.conf")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
# The folder of the executable last: it may be in one of the others, which would not be shown once it is.
_READABLE = (*_SYSTEM, sys.base_prefix, sys.base_exec_prefix, os.path.dirname(PYTHON))
_NAMESPACES = {
    "process and network namespaces": kernel.NEW_PID | kernel.NEW_NET | kernel.NEW_IPC,
    "own file system": kernel.NEW_MOUNT,
}
_STATUS = 5


def run_behind(
    walls: Collection[str], limits: Limits, user: int | None, folder: str, descriptors: Sequence[int]
) -> NoReturn:
    """Runs the program in a descendant of this process, a fork of the supervisor; never returns.

    In a process namespace of its own, the process that waits for the program is the first of it, so that
    whatever the program left behind dies with it.

    Args:
        walls: Which of ``run.WALLS`` it is locked into.
        limits: What it may use.
        user: The user and group id that it takes; None to stay who one is.
        folder: An empty folder: where its file system is mounted, or its working directory.
        descriptors: Four: its standard error, what it reads the sentinel and itself from, what takes the sentinel
            back, and what is told how it ended, as JSON: ``code`` and ``cpu``, or ``error``.
    """
    try:
        null = os.open("/dev/null", os.O_RDWR)
        # First away from the low numbers, where one could overwrite another.
        moved = [fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 32) for descriptor in (null, null, *descriptors)]
        for low, descriptor in enumerate(moved):  # all others close themselves when the program starts
            os.dup2(descriptor, low, inheritable=low != _STATUS)
        kernel.die_with_parent()
        os.setsid()
        others = _leave_host(walls, user)
        if (first := os.fork()) != 0:
            os.waitpid(first, 0)
            os._exit(0)
        kernel.die_with_parent()
        if (program := os.fork()) == 0:
            _become_program(walls, limits, user, folder, others)
        os.closerange(0, _STATUS)
        os.closerange(_STATUS + 1, max(moved) + 1)
        _say(_wait_for(program))
    except BaseException as error:
        _say({"error": f"{type(error).__name__}: {error}"})
    finally:
        os._exit(0)


def _say(ended: dict[str, object]) -> None:
    os.write(_STATUS, json.dumps(ended).encode() + b"\n")


def _wait_for(program: int) -> dict[str, object]:
    while True:
        pid, status, usage = os.wait4(-1, 0)  # orphans of the program too, where this is the first process
        if pid == program:
            return {"code": os.waitstatus_to_exitcode(status), "cpu": usage.ru_utime + usage.ru_stime}


def _leave_host(walls: Collection[str], user: int | None) -> int:
    """Enters new namespaces.

    Returns:
        At least as many tasks as the kernel counts against a program's limit beside its own. It counts those of a
        user; from Linux 5.14 on, of a user in a user namespace.
    """
    host_user, host_group = os.getuid(), os.getgid()
    namespaces = sum(_NAMESPACES.get(wall, 0) for wall in walls)
    own_users = namespaces != 0 and user is None
    kernel.unshare(namespaces | own_users * kernel.NEW_USER)
    if own_users:
        kernel.hide_memory(False)  # these files are its user's only then
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{NOBODY} {host_user} 1")
        Path("/proc/self/gid_map").write_text(f"{NOBODY} {host_group} 1")
        kernel.hide_memory()
    linux = tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])
    if user is not None or (own_users and linux >= (5, 14)):
        return 0
    return int(Path("/proc/loadavg").read_text().split()[3].split("/")[1])


def _become_program(walls: Collection[str], limits: Limits, user: int | None, home: str, others: int) -> None:
    if "own file system" in walls:
        _enter_root(home, limits.file_mb)
        home = "/tmp"
    os.chdir(home)
    os.setsid()
    os.umask(0o077)
    _limit(limits, others)
    if user is not None:
        os.chown(home, user, user)
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    kernel.renounce_privileges()
    if "Landlock" in walls:
        kernel.restrict_files(_READABLE, (home, *_DEVICES))
    if "system call filter" in walls:
        kernel.filter_calls()
    environment = {"PATH": "/usr/bin:/bin", "HOME": home, "TMPDIR": home, "LANG": "C.UTF-8"}
    os.execve(PYTHON, [PYTHON, "-I", "-S", "-B", "-X", "utf8", "-c", RUNNER], environment)


def _limit(limits: Limits, others: int) -> None:
    for kind, value in (
        (resource.RLIMIT_CPU, limits.cpu_seconds),
        (resource.RLIMIT_AS, limits.memory_mb << 20),
        (resource.RLIMIT_NPROC, limits.processes + others),
        (resource.RLIMIT_FSIZE, limits.file_mb << 20),
        (resource.RLIMIT_NOFILE, limits.open_files),
        (resource.RLIMIT_CORE, 0),
    ):
        allowed = resource.getrlimit(kind)[1] % (1 << 64)  # a stricter limit of this process stays; -1 is none
        hard = min(value + (kind == resource.RLIMIT_CPU), allowed)  # a second after the signal that says so
        resource.setrlimit(kind, (min(value, hard), hard))


def _enter_root(folder: str, megabytes: int) -> None:
    """Makes ``folder`` the root: Python and the system's libraries read-only, and ``/tmp`` in memory."""
    kernel.mount("none", "/", flags=kernel.RECURSIVE | kernel.PRIVATE)
    kernel.mount("tmpfs", folder, "tmpfs", kernel.NOSUID, "size=1m,mode=755")
    os.mkdir(f"{folder}/tmp")
    flags = kernel.NOSUID | kernel.NODEV | kernel.NOEXEC
    # Before the others: Python may lie under a temporary folder.
    kernel.mount("tmpfs", f"{folder}/tmp", "tmpfs", flags, f"size={megabytes}m,nr_inodes=4096,mode=1777")
    for path in (*_READABLE, *_DEVICES):
        target, is_folder = folder + path, os.path.isdir(path)
        if os.path.exists(path) and not os.path.exists(target):
            os.makedirs(target if is_folder else os.path.dirname(target), exist_ok=True)
            if not is_folder:
                Path(target).touch()
            kernel.mount(path, target, flags=kernel.BIND | kernel.RECURSIVE)
    kernel.set_read_only("/", True)  # the host's own mounts too, should the program ever get there
    kernel.set_read_only(f"{folder}/tmp", False)
    os.chroot(folder)

"""What a program is locked into: namespaces, a file system of its own, an unprivileged user, limits.

Which of these there are depends on the kernel and on who asks; a plan says which are used.
"""

from __future__ import annotations

import fcntl
import json
import os
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

from lopa_lightning.evaluation.jail import kernel
from lopa_lightning.evaluation.jail.plan import Bounds, Plan

RUNNER = Path(__file__).with_name("runner.py").read_text(encoding="utf-8")
PYTHON = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
NOBODY = 65534

# Everything the interpreter and the standard library may need; what is not there is left out.
_SYSTEM = ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/nix/store", "/etc/ld.so.cache", "/etc/ld.so.conf")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")


@dataclass(frozen=True)
class Descriptors:
    """What the program's process is given: standard error, the program, and where the sentinel goes."""

    stderr: int
    program: int
    sentinel: int
    status: int


def keep(plan: Plan, bounds: Bounds, user: int | None, folder: str, descriptors: Descriptors) -> None:
    """Runs the program in a descendant of this process, and tells ``descriptors.status`` how it ended.

    Called in a fork of the supervisor; never returns. In a process namespace of its own, the process that
    waits for the program is the first of it, so that whatever the program left behind dies with it.

    Args:
        plan: What to lock the program into.
        bounds: Its limits.
        user: The user and group id that it takes; None to stay who one is.
        folder: An empty folder: where its file system is mounted, or its working directory.
        descriptors: Its open files.
    """
    try:
        kernel.die_with_parent()
        os.setsid()
        if plan.namespaces:
            _leave_host(plan.root)
            if (first := os.fork()) != 0:
                os.waitpid(first, 0)
                os._exit(0)
            kernel.die_with_parent()
        if (program := os.fork()) == 0:
            _become_program(plan, bounds, user, folder, descriptors)
        for descriptor in (0, 1, 2, descriptors.stderr, descriptors.program, descriptors.sentinel):
            os.close(descriptor)
        _report(descriptors.status, *_wait_for(program))
    except BaseException as error:
        _say(descriptors.status, {"error": f"{type(error).__name__}: {error}"})
    os._exit(0)


def _leave_host(root: bool) -> None:
    wanted = ["pid", "net", "ipc", "uts", *(["mount"] if root else [])]
    user, group = os.getuid(), os.getgid()
    if user != 0:
        kernel.unshare("user", *wanted)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{NOBODY} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{NOBODY} {group} 1")
    else:
        kernel.unshare(*wanted)


def _wait_for(program: int) -> tuple[int, float]:
    while True:
        pid, status, usage = os.wait4(-1, 0)  # orphans of the program too, where this is the first process
        if pid == program:
            return status, usage.ru_utime + usage.ru_stime


def _report(descriptor: int, status: int, cpu: float) -> None:
    if os.WIFSIGNALED(status):
        _say(descriptor, {"signal": os.WTERMSIG(status), "cpu": cpu})
    else:
        _say(descriptor, {"exit": os.WEXITSTATUS(status), "cpu": cpu})


def _say(descriptor: int, what: dict[str, object]) -> None:
    os.write(descriptor, json.dumps(what).encode() + b"\n")


def _become_program(plan: Plan, bounds: Bounds, user: int | None, folder: str, descriptors: Descriptors) -> None:
    try:
        home = folder
        if plan.root:
            _enter_root(folder, bounds.file)
            home = "/tmp"
        os.chdir(home)
        os.setsid()
        os.umask(0o077)
        _give(descriptors)
        _limit(bounds)
        if user is not None:
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
        kernel.renounce_privileges()
        os.execve(
            PYTHON,
            [PYTHON, "-I", "-S", "-B", "-X", "utf8", "-c", RUNNER],
            {"PATH": "/usr/bin:/bin", "HOME": home, "TMPDIR": home, "LANG": "C.UTF-8"},
        )
    except BaseException as error:
        _say(descriptors.status, {"error": f"{type(error).__name__}: {error}"})
    os._exit(1)


def _give(descriptors: Descriptors) -> None:
    """Moves the descriptors to 0 to 4; all others close themselves when the program starts."""
    null = os.open("/dev/null", os.O_RDWR)
    moved = [null, null, descriptors.stderr, descriptors.program, descriptors.sentinel]
    # First away from the low numbers, where one could overwrite another.
    high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 32) for descriptor in moved]
    for low, descriptor in enumerate(high):
        os.dup2(descriptor, low)


def _limit(bounds: Bounds) -> None:
    for kind, soft, hard in (
        (resource.RLIMIT_CPU, bounds.cpu_seconds, bounds.cpu_seconds + 1),
        (resource.RLIMIT_AS, bounds.memory, bounds.memory),
        (resource.RLIMIT_NPROC, bounds.processes, bounds.processes),
        (resource.RLIMIT_FSIZE, bounds.file, bounds.file),
        (resource.RLIMIT_NOFILE, bounds.open_files, bounds.open_files),
        (resource.RLIMIT_CORE, 0, 0),
    ):
        allowed = resource.getrlimit(kind)[1]  # an own limit that is stricter stays
        if allowed != resource.RLIM_INFINITY:
            soft, hard = min(soft, allowed), min(hard, allowed)
        resource.setrlimit(kind, (soft, hard))


def _enter_root(folder: str, size: int) -> None:
    """Makes ``folder`` the root: Python and the system's libraries read-only, and ``/tmp`` in memory."""
    kernel.mount("none", "/", flags=kernel.RECURSIVE | kernel.PRIVATE)
    kernel.mount("tmpfs", folder, "tmpfs", kernel.NOSUID, "size=1m,mode=755")
    for path in (*_SYSTEM, *_DEVICES, os.path.dirname(PYTHON), sys.base_prefix, sys.base_exec_prefix):
        _show(path, folder)
    for empty in ("tmp", "proc"):
        os.makedirs(f"{folder}/{empty}", exist_ok=True)
    kernel.make_read_only("/")  # the host's own mounts too, should the program ever get there
    flags = kernel.NOSUID | kernel.NODEV | kernel.NOEXEC
    kernel.mount("tmpfs", f"{folder}/tmp", "tmpfs", flags, f"size={size},nr_inodes=4096,mode=1777")
    os.chroot(folder)


def _show(path: str, folder: str) -> None:
    """Makes the host's ``path`` visible under ``folder``, unless it is not there or is visible already."""
    target = folder + path
    if not os.path.lexists(path) or os.path.lexists(target):
        return
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), target)
        return
    if os.path.isdir(path):
        os.mkdir(target)
    else:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o600))
    kernel.mount(path, target, flags=kernel.BIND | kernel.RECURSIVE)

"""What a program is locked into: namespaces, a file system of its own, an unprivileged user, limits."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from lopa_lightning.sandbox import kernel
from lopa_lightning.sandbox.plan import Limits

RUNNER = Path(__file__).with_name("runner.py").read_text(encoding="utf-8")
PYTHON = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
NOBODY = 65534

# Everything the interpreter and the standard library may need; what is not there is left out.
_SYSTEM = ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/nix/store", "/etc/ld.so.cache", "/etc/ld.so.conf")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
# The folder of the executable last: it may lie in one of the others, which would not be shown once it is.
_READABLE = (*_SYSTEM, sys.base_prefix, sys.base_exec_prefix, os.path.dirname(PYTHON))


@dataclass(frozen=True)
class Cell:
    """Where one program runs.

    Args:
        walls: Which of ``plan.WALLS`` it is locked into.
        limits: What it may use.
        user: The user and group id that it takes; None to stay who one is.
        folder: An empty folder: where its file system is mounted, or its working directory.
        stderr: Descriptor of its standard error.
        program: Descriptor that it reads the sentinel and itself from.
        sentinel: Descriptor that takes the sentinel back.
        status: Descriptor that is told how it ended.
    """

    walls: Collection[str]
    limits: Limits
    user: int | None
    folder: str
    stderr: int
    program: int
    sentinel: int
    status: int

    def keep(self) -> None:
        """Runs the program in a descendant of this process, a fork of the supervisor; never returns.

        In a process namespace of its own, the process that waits for the program is the first of it, so that
        whatever the program left behind dies with it.
        """
        try:
            kernel.die_with_parent()
            os.setsid()
            self._leave_host()
            if (first := os.fork()) != 0:
                os.waitpid(first, 0)
                os._exit(0)
            kernel.die_with_parent()
            if (program := os.fork()) == 0:
                self._become_program()
            for descriptor in (0, 1, 2, self.stderr, self.program, self.sentinel):
                os.close(descriptor)
            self._say(_wait_for(program))
        except BaseException as error:
            self._say({"error": f"{type(error).__name__}: {error}"})
        os._exit(0)

    def _say(self, what: dict[str, object]) -> None:
        os.write(self.status, json.dumps(what).encode() + b"\n")

    def _namespaces(self) -> list[str]:
        names = ["pid", "net", "ipc"] if "process and network namespaces" in self.walls else []
        names += ["mount"] if "own file system" in self.walls else []
        return names + (["user"] if names and self.user is None else [])

    def _leave_host(self) -> None:
        user, group, names = os.getuid(), os.getgid(), self._namespaces()
        kernel.unshare(names)
        if "user" not in names:
            return
        kernel.hide_memory(False)  # these files are its user's only then
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{NOBODY} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{NOBODY} {group} 1")
        kernel.hide_memory()

    def _become_program(self) -> None:
        try:
            home, others = self.folder, self._tasks_of_others()
            if self.user is not None:
                os.chown(home, self.user, self.user)
            if "own file system" in self.walls:
                _enter_root(home, self.limits.file_mb)
                home = "/tmp"
            os.chdir(home)
            os.setsid()
            os.umask(0o077)
            self._give()
            self._limit(others)
            if self.user is not None:
                os.setgroups([])
                os.setresgid(self.user, self.user, self.user)
                os.setresuid(self.user, self.user, self.user)
            kernel.renounce_privileges()
            if "Landlock" in self.walls:
                kernel.restrict_files(_READABLE, (home, *_DEVICES))
            if "system call filter" in self.walls:
                kernel.filter_calls()
            os.execve(
                PYTHON,
                [PYTHON, "-I", "-S", "-B", "-X", "utf8", "-c", RUNNER],
                {"PATH": "/usr/bin:/bin", "HOME": home, "TMPDIR": home, "LANG": "C.UTF-8"},
            )
        except BaseException as error:
            self._say({"error": f"{type(error).__name__}: {error}"})
        os._exit(1)

    def _give(self) -> None:
        """Moves the descriptors to 0 to 4; all others close themselves when the program starts."""
        null = os.open("/dev/null", os.O_RDWR)
        # First away from the low numbers, where one could overwrite another.
        moved = [
            fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 32) for fd in (null, null, self.stderr, self.program, self.sentinel)
        ]
        for low, descriptor in enumerate(moved):
            os.dup2(descriptor, low)

    def _limit(self, others: int) -> None:
        limits = self.limits
        for kind, soft, hard in (
            (resource.RLIMIT_CPU, limits.cpu_seconds, limits.cpu_seconds + 1),
            (resource.RLIMIT_AS, *[limits.memory_mb << 20] * 2),
            (resource.RLIMIT_NPROC, *[limits.processes + others] * 2),
            (resource.RLIMIT_FSIZE, *[limits.file_mb << 20] * 2),
            (resource.RLIMIT_NOFILE, *[limits.open_files] * 2),
            (resource.RLIMIT_CORE, 0, 0),
        ):
            allowed = resource.getrlimit(kind)[1]  # an own limit that is stricter stays
            if allowed != resource.RLIM_INFINITY:
                soft, hard = min(soft, allowed), min(hard, allowed)
            resource.setrlimit(kind, (soft, hard))

    def _tasks_of_others(self) -> int:
        """At least as many tasks as the kernel counts against a program's limit beside its own.

        It counts those of a user; from Linux 5.14 on, of a user in a user namespace.
        """
        linux = tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])
        if self.user is not None or ("user" in self._namespaces() and linux >= (5, 14)):
            return 0
        return int(Path("/proc/loadavg").read_text().split()[3].split("/")[1])


def _wait_for(program: int) -> dict[str, object]:
    while True:
        pid, status, usage = os.wait4(-1, 0)  # orphans of the program too, where this is the first process
        if pid == program:
            return {"code": os.waitstatus_to_exitcode(status), "cpu": usage.ru_utime + usage.ru_stime}


def _enter_root(folder: str, megabytes: int) -> None:
    """Makes ``folder`` the root: Python and the system's libraries read-only, and ``/tmp`` in memory."""
    kernel.mount("none", "/", flags=kernel.RECURSIVE | kernel.PRIVATE)
    kernel.mount("tmpfs", folder, "tmpfs", kernel.NOSUID, "size=1m,mode=755")
    os.mkdir(f"{folder}/tmp")
    flags = kernel.NOSUID | kernel.NODEV | kernel.NOEXEC
    # Before the others: Python may lie under a temporary folder.
    kernel.mount("tmpfs", f"{folder}/tmp", "tmpfs", flags, f"size={megabytes}m,nr_inodes=4096,mode=1777")
    for path in (*_READABLE, *_DEVICES):
        _show(path, folder)
    kernel.make_read_only("/")  # the host's own mounts too, should the program ever get there
    kernel.make_writable(f"{folder}/tmp")
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

"""Writes files that are whole or not there, tells if files have changed, and keeps second processes out of folders."""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import platform
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from lopa_lightning.errors import LoPAError


def write_whole(path: Path, content: str) -> None:
    """Writes a file under a temporary name, then renames it.

    Args:
        path: The file; its folder is made.
        content: Text, in UTF-8.
    """
    with replacing(path) as file:
        file.write(content.encode("utf-8"))


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Yields a file to write to, which takes a path's place when the block ends well and leaves nothing else.

    What a process leaves that is killed meanwhile, :func:`clear_unfinished` removes.

    Args:
        path: The file; its folder is made.
    """
    with _taking_place_of(path, 0o644) as temporary, temporary.open("xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def new_folder(path: Path, what: str) -> Iterator[Path]:
    """Yields a folder to write to, which takes a path's place when the block ends well and leaves nothing else.

    Args:
        path: The folder; must not be there, or be empty.
        what: Its name, for messages.

    Raises:
        LoPAError: If it is there and not empty, or cannot be written to.
    """
    path = path.absolute()
    check_new(path, what)
    with _taking_place_of(path, 0o755) as temporary:
        temporary.mkdir()
        yield temporary
        with suppress(FileNotFoundError):
            path.rmdir()  # empty, or something was put into it meanwhile


@contextmanager
def _taking_place_of(path: Path, mode: int) -> Iterator[Path]:
    """Yields a name for what takes a path's place; in its folder, since between file systems a rename is a copy."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        yield temporary
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except BaseException as error:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
        name_file(error, path)
        raise


def check_new(path: Path, what: str) -> None:
    """Refuses a folder that is there and not empty, or that cannot be made; leaves nothing.

    Args:
        path: The folder.
        what: Its name, for messages.

    Raises:
        LoPAError: If it is.
    """
    if os.path.lexists(path) and not (path.is_dir() and not path.is_symlink() and not any(path.iterdir())):
        raise LoPAError(f"{what} {str(path)!r} is there already and not an empty folder; give another")
    check_writable(path.parent, f"the folder of {what}")


def name_file(error: BaseException, path: str | Path) -> None:
    """Adds what was written to an error, which does not say it where it comes from a full disk.

    Args:
        error: Any; others than an ``OSError`` without a name stay as they are.
        path: The file or folder.
    """
    for cause in causes_of(error):
        if isinstance(cause, OSError) and cause.filename is None:
            cause.filename = str(path)


def causes_of(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an error, what caused it, what caused that, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def is_full_disk(error: BaseException | None) -> bool:
    """Returns whether an error, or what caused it, is that there is no space left on a disk or in a quota."""
    full = (errno.ENOSPC, errno.EDQUOT)
    return any(isinstance(cause, OSError) and cause.errno in full for cause in causes_of(error))


def version_of(*names: str, without: Path | None = None) -> str:
    """Names what is in files by their paths, sizes and times, without reading them.

    Args:
        *names: Files, patterns of files, or folders, of which all files count but hidden ones and those behind links to
            folders.
        without: A file or folder that does not count, nor does anything else in the folders below a given one that lead
            to it.

    Returns:
        16 hexadecimal digits; empty if nothing of this is on this machine, as for the id of something on a hub.
    """
    lines = []
    for path in sorted({path for name in names for path in _files_of(os.path.expanduser(name), without)}):
        with suppress(FileNotFoundError):  # a temporary file
            stat = os.stat(path)
            lines.append(f"{path!r} {stat.st_size} {stat.st_mtime_ns}\n")
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()[:16] if lines else ""


def _files_of(name: str, without: Path | None) -> Iterator[str]:
    """Yields the paths of the files that a path or a pattern stands for."""
    left_out = (
        {str(path) for path in (without.absolute(), *without.absolute().parents)} if without is not None else set()
    )
    for place in [name] if os.path.exists(name) else glob.glob(name, recursive=True):
        if os.path.isfile(place):
            yield place
        for folder, folders, files in os.walk(place):
            below = os.path.abspath(folder)
            folders[:] = [each for each in folders if each[0] != "." and os.path.join(below, each) not in left_out]
            yield from (path for each in files if each[0] != "." and os.path.isfile(path := os.path.join(folder, each)))


def clear_unfinished(folder: Path, name: str = "*") -> None:
    """Removes what :func:`replacing` left of processes that were killed on this host; of another it cannot be known.

    Args:
        folder: Where to look.
        name: Pattern of the files' names.
    """
    for left in folder.glob(f".{name}.{platform.node()}.*"):
        process = left.name.split(".")[-2]
        if process.isdigit() and not _is_running(int(process)):
            left.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    try:
        if sys.platform != "win32":  # where there is no harmless signal
            os.kill(process, 0)
    except OSError as error:
        return error.errno != errno.ESRCH  # else another user's
    return True


def check_writable(folder: Path, what: str) -> None:
    """Refuses a folder that cannot be written to, or made and written to; leaves nothing.

    Args:
        folder: Need not exist.
        what: Its name, for messages.

    Raises:
        LoPAError: If it cannot.
    """
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.exists(path))
    try:  # what the permissions say is not all: nobody makes a folder in /proc
        with tempfile.TemporaryDirectory(dir=existing):
            pass
    except OSError as error:
        raise LoPAError(f"{what} {str(folder)!r} cannot be written to: {error.strerror}") from None


class Claim:
    """Keeps other processes out of a folder until it is released, or this process has ended, however it ends.

    Args:
        folder: Is made.
        what: Its name, for messages.
        name: Of the file that is locked in it.

    Raises:
        LoPAError: If another process has claimed it.
    """

    def __init__(self, folder: Path, what: str, name: str = ".lock") -> None:
        self._path = folder / name
        self._is_new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(self._descriptor)
            is_there = os.fstat(self._descriptor).st_ino == os.stat(self._path).st_ino
        except (BlockingIOError, PermissionError, FileNotFoundError):
            is_there = False
        if not is_there:  # locked by another process, which may just have removed it
            os.close(self._descriptor)
            raise LoPAError(f"{what} {str(folder)!r} is in use by another lopa command; give another")

    def release(self) -> None:
        """Lets others in, and leaves nothing where there was nothing."""
        self._path.unlink(missing_ok=True)
        os.close(self._descriptor)
        if self._is_new:
            with suppress(OSError):  # by now it holds something
                self._path.parent.rmdir()


def _lock(descriptor: int) -> None:
    """Locks a file for this process; its forks, such as a loader's workers, do not keep the lock when it ends."""
    if sys.platform != "win32":
        import fcntl

        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

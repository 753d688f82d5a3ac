"""What the subcommands of many runs share: options of a dataclass, and a clean end when interrupted."""

from __future__ import annotations

import inspect
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from filelock import FileLock, Timeout
from jsonargparse import ActionConfigFile

from lopa_lightning.errors import LoPAError
from lopa_lightning.parsing import Parser

T = TypeVar("T")

_INTERRUPTED = 130  # what a shell expects of a program that Ctrl-C ended


def parsed(options_class: Callable[..., T], program: str, args: Sequence[str]) -> tuple[T, list[str]]:
    """Reads a command line.

    Args:
        options_class: A dataclass with documented fields, which are the options.
        program: How the command is called.
        args: What follows on the command line.

    Returns:
        The options, and what follows ``--``, which is for every run.
    """
    at = list(args).index("--") if "--" in args else len(args)
    first_line = str(inspect.getdoc(options_class)).splitlines()[0]
    description = f"{first_line} What follows -- is given to every run, as to lopa fit."
    parser = Parser(prog=program, description=description)
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="YAML file with any of these options.")
    parser.add_class_arguments(options_class, as_group=False)
    values = parser.parse_args(list(args[:at]))
    names: Any = inspect.signature(options_class).parameters
    return options_class(**{name: values[name] for name in names}), list(args[at + 1 :])


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Holds a folder of runs, so that no second command works in it.

    Args:
        folder: Is made.

    Raises:
        LoPAError: If another process holds it, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock", timeout=0)
        lock.acquire()
    except Timeout:
        raise LoPAError(f"output {str(folder)!r} is in use by another lopa command; give another output") from None
    except OSError as error:
        raise LoPAError(f"output {str(folder)!r} cannot be written to: {error.strerror}") from None
    with lock:
        yield


@contextmanager
def interruptible() -> Iterator[None]:
    """Ends the program in a line where Ctrl-C or SIGTERM ends the block.

    Raises:
        SystemExit: With status 130, if interrupted.
    """
    try:
        with _terminated_as_interrupted():
            yield
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the same command goes on from here\n")
        raise SystemExit(_INTERRUPTED) from None


def end_with(count: int, what: str, failed: Sequence[str]) -> None:
    """Ends the program with an error where something has failed.

    Args:
        count: How many there were.
        what: What they are called.
        failed: The names of those that failed.

    Raises:
        SystemExit: With status 1, if any did.
    """
    if failed:
        sys.stderr.write(f"{len(failed)} of {count} {what} failed: {', '.join(failed)}\n")
        raise SystemExit(1)


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not in the main thread, where signals do not arrive anyway
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

"""Defines the error for input that cannot be right, and what its messages are made of."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

_LONGEST = 300  # characters of another library's message, or of a value


class LoPAError(ValueError):
    """Says that a config, file, label, model or checkpoint is not what it must be.

    Its message names the thing, what was got and what is allowed. The command line shows it without
    a traceback.
    """


def one_line(error: BaseException) -> str:
    """Returns another library's error as one short line, with its type where the message alone says little."""
    lines = str(error).strip().splitlines()
    said = shown(" ".join(lines) if lines and lines[0].rstrip().endswith(":") else "".join(lines[:1]), str)
    return said if isinstance(error, (OSError, ValueError)) and said else f"{type(error).__name__}: {said}".rstrip(": ")


def shown(value: Any, write: Any = repr) -> str:
    """Returns a value as one short line.

    Example:
        >>> len(shown("a" * 400))
        300
    """
    line = " ".join(write(value).split())
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 60]} ... {line[-55:]}"


def imported(package: str, extra: str, needed: str) -> Any:
    """Imports a package that is not installed with this one.

    Args:
        package: Its name.
        extra: The extra of this package that brings it.
        needed: What it is needed for, as the message begins.

    Raises:
        LoPAError: If it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError:
        raise LoPAError(f'{needed}: pip install "lopa-lightning[{extra}]"') from None


def one_of(name: str, value: Any, choices: Iterable[str]) -> None:
    """Refuses a value that is none of the choices.

    Args:
        name: The argument.
        value: What was given.
        choices: What is allowed.

    Raises:
        LoPAError: If it is none of them; the message lists them.
    """
    if value not in (allowed := list(choices)):
        raise LoPAError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def at_least(bound: int, **values: float | None) -> None:
    """Refuses arguments, by their names, that are less than a bound; None is none.

    Raises:
        LoPAError: If one is; the message names it.
    """
    for name, value in values.items():
        if value is not None and not value >= bound:  # as of NaN
            raise LoPAError(f"{name} must be at least {bound}, got {value}")


def is_unicode(text: str) -> bool:
    """Returns whether tokenizers take a text: not with half a character, as Python reads bytes of another encoding."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def listed(name: str, values: Iterable[Any]) -> list[Any]:
    """Returns the values of an argument that is a list.

    Args:
        name: The argument.
        values: What was given.

    Raises:
        LoPAError: If it is one string, whose letters would be taken for the values, or no list at all.
    """
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise LoPAError(f"{name} must be a list, got {values!r}")
    return list(values)

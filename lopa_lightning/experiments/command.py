"""Reads the options of the commands of many runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from jsonargparse import auto_cli

from lopa_lightning.command_line.parser import Parser
from lopa_lightning.errors import LoPAError
from lopa_lightning.files import Claim
from lopa_lightning.stopping import Stopped, stoppable

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Holds the options that commands of many runs share.

    Args:
        selection_share: Share of the training split that runs validate on where something is chosen by them.
        max_epochs: Epochs of every run, in place of the configs'.
        max_steps: Optimizer steps of every run, in place of the configs'; the lower one of both budgets ends it.
        workers: Runs at once; by default one on each visible GPU, or one where there is none.
    """

    selection_share: float = 0.2
    max_epochs: int | None = None
    max_steps: int | None = None
    workers: int | None = None


def check_limits(options: Options, **limits: tuple[bool, str]) -> None:
    """Raises a LoPAError that names an option outside its limits.

    Args:
        options: The options.
        **limits: By option whether it is within them, and what they are.
    """
    limits["workers"] = (options.workers is None or options.workers > 0, "at least 1")
    for name, (is_within, allowed) in limits.items():
        if not is_within:
            raise LoPAError(f"{name} must be {allowed}, got {getattr(options, name)}")


def budget(options: Options) -> list[str]:
    """Returns the budget of every run as options of ``lopa fit``."""
    given = {"max_epochs": options.max_epochs, "max_steps": options.max_steps}
    return [f"--trainer.{name}={value}" for name, value in given.items() if value is not None]


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
    own = ["--config" if arg == "-c" else arg for arg in args[:at]]
    description = f"{str(options_class.__doc__).splitlines()[0]} What follows -- is given to every run, as to lopa fit."
    kwargs: Any = {"prog": program, "description": description, "parser_class": Parser}
    return auto_cli(options_class, args=own, as_positional=False, **kwargs), list(args[at + 1 :])


@contextmanager
def folder_of_runs(folder: str) -> Iterator[None]:
    """Keeps other commands out of a folder within the block, and says how to go on where a signal ends it.

    Raises:
        LoPAError: If another process works in the folder.
        OSError: If it cannot be written to.
    """
    claim = Claim(Path(folder), "output")
    try:
        with stoppable():
            yield
    except Stopped as stopped:
        stopped.outcome = "the same command goes on from here"
        raise
    finally:
        claim.release()

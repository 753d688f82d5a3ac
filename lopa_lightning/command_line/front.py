"""Answers in milliseconds what needs no torch: help, version, the shipped configurations, a misspelt command."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from lopa_lightning import __version__

TASKS = ("fit", "validate", "test", "predict")
EXPERIMENTS = ("compare", "sweep", "plan")
SERVING = ("chat", "export", "doctor", "serve")
COMMANDS = (*TASKS, *EXPERIMENTS, *SERVING, "configs")
_WITHOUT_CONFIG = ("--text", "--file")  # options of `lopa predict` that take a configuration's place
_PACKAGE = Path(__file__).parent.parent
# In the package once it is installed, beside it in a checkout.
_FOLDER = next((path for path in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if path.is_dir()), None)


def answer(given: Sequence[str]) -> None:
    """Answers what needs no task to be built; returns where something does.

    Args:
        given: The command line.

    Raises:
        SystemExit: With status 0 after an answer, 2 where the command is none.
    """
    command, rest = (given[0], list(given[1:])) if given else ("", [])
    if command in ("-h", "--help"):
        said = _page("lopa")
    elif command == "--version":
        said = f"lopa-lightning {__version__}"
    elif command == "configs":
        files = descriptions()
        width = max(map(len, files), default=0) + 2
        said = "\n".join(f"{name:<{width}}{description}" for name, description in files.items())
    elif command in COMMANDS and {"-h", "--help"} & set(rest[: rest.index("--")] if "--" in rest else rest):
        said = _page("task" if command in TASKS else command).replace("{command}", command)
        said += f"\n\n{_page(command)}" if command == "predict" else ""
    elif command in COMMANDS or command.startswith("-"):
        return
    else:
        close = difflib.get_close_matches(command, COMMANDS, n=1)
        meant = f". Did you mean {close[0]}?" if close else ""
        got = " ".join(command.split())[:60] or "nothing"
        sys.stderr.write(f"error: the first argument must be one of {', '.join(COMMANDS)}, got {got}{meant}\n")
        raise SystemExit(2)
    try:
        print(said, flush=True)
    except BrokenPipeError:  # as of `lopa configs | head`; else Python would fail once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(0)


def home_of(given: Sequence[str]) -> str | None:
    """Returns the module of the package whose ``main`` runs a command line; None where it is a task's of Lightning.

    Args:
        given: The command line.
    """
    command = given[0] if given else ""
    if command in EXPERIMENTS:
        return f"experiments.{command}"
    without = command == "predict" and any(each.partition("=")[0] in _WITHOUT_CONFIG for each in given)
    return f"serving.{command}" if command in SERVING or without else None


def _page(name: str) -> str:
    return Path(__file__).with_name("help").joinpath(f"{name}.txt").read_text(encoding="utf-8").rstrip()


def located(path: str) -> str:
    """Returns where a configuration lies: as it is named or, for ``configs/NAME`` that is not there, in the package.

    Args:
        path: As given by the user.
    """
    parts = Path(path).parts
    if _FOLDER is None or parts[:1] != ("configs",) or ".." in parts or os.path.exists(path):
        return path
    shipped = _FOLDER.joinpath(*parts[1:])
    return str(shipped) if shipped.is_file() else path


def descriptions() -> dict[str, str]:
    """Returns the first line of each file by its name, ``configs/`` first: tasks, then what is put over them."""
    if _FOLDER is None:
        return {}
    paths = sorted(_FOLDER.rglob("*.yaml"), key=lambda path: (len(path.parts), path))
    lines = {path: path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ") for path in paths}
    return {f"configs/{path.relative_to(_FOLDER).as_posix()}": line for path, line in lines.items()}

"""Parses every command line, and says in one line what is wrong."""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib
import inspect
import itertools
import os
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, Namespace

from lopa_lightning.command_line import yaml_files
from lopa_lightning.command_line.front import TASKS, located
from lopa_lightning.command_line.messages import condensed

_UNKNOWN = re.compile(
    r"(?:Option|Key) '([^']+)' is not|accept (?:option|nested key) '([^']+)'|[Uu]nrecognized arguments: (.*)", re.DOTALL
)
_CLASS_PATH = re.compile(r"class_path[ =]'([\w.]+)'")
# Where options are that belong to a class which the configuration names: by the classes that most name.
_PLACES = {
    "model.backbone": "lopa_lightning.backbones.pretrained.PretrainedSpec",
    "model.optimizer": "torch.optim.AdamW",
    "model.prompt_encoder": "lopa_lightning.LoPA",
    "data": "lopa_lightning.TextClassificationDataModule",
    "model": "lopa_lightning.ClassificationModule",
}


class UsageError(SystemExit):
    """Says in one line what is wrong with a command line, or with what a configuration file says."""


class Options(argparse.ArgumentParser):
    """Reads a command line, and raises what is wrong as a :class:`UsageError`, in one line.

    Args:
        command: Of ``lopa``.
        description: What it does.
    """

    def __init__(self, command: str, description: str) -> None:
        super().__init__(f"lopa {command}", description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raises the error."""
        raise UsageError(f"{message} ({self.prog} --help)")


class Parser(ArgumentParser):
    """Raises what is wrong as a :class:`UsageError`, and reads YAML by ``yaml_files``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"parser_mode": yaml_files.MODE, **kwargs})
        self.allow_abbrev = False  # a misspelt option must not pass for the one that it begins like

    def parse_args(self, args: Sequence[str] | None = None, *rest: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Parses a command line.

        Raises:
            LoPAError: If a file that it names is no configuration.
            UsageError: If it is wrong in another way.
        """
        given = with_shipped_files(sys.argv[1:] if args is None else args)
        given = [_within_option(each) for each in given] if len(given) == 1 else given
        try:
            return super().parse_args(given, *rest, **kwargs)
        except UsageError as error:
            if given[:1] and given[0] in TASKS and (missing := _missing_classes(given)):
                raise UsageError(missing) from error
            raise

    def parse_path(self, path: Any, *args: Any, **kwargs: Any) -> Namespace:
        """Parses a configuration file.

        Raises:
            LoPAError: If it is no such file.
            UsageError: If what it says is wrong.
        """
        name = os.fspath(path)
        if "://" not in name:  # else of a remote file system, and read as it is
            yaml_files.read(name)
        try:
            parsed: Namespace = super().parse_path(path, *args, **kwargs)
            return parsed
        except UsageError as error:
            raise UsageError(f"{error} (in {name})") from None

    def dump(self, *args: Any, **kwargs: Any) -> str:
        """Writes a configuration as text."""
        # Lightning, which alone asks for link targets, has parsed it: to check it again takes a fifth of a start.
        was_parsed = not kwargs.get("skip_link_targets", True)
        text: str = super().dump(*args, **{"skip_validation": was_parsed, **kwargs})
        return text

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises the error in one line, with the options that were perhaps meant."""
        if not (found := _UNKNOWN.search(message)):
            raise UsageError(condensed(message))
        given = [next(filter(None, found.groups()))] if found[3] is None else found[3].split()
        names = [name.removeprefix("--").split("=")[0] for name in given if found[3] is None or name.startswith("--")]
        if not names:
            raise UsageError(f"{' '.join(given)!r} belongs to no option: each is written --name value")
        hints = [hint for name in names if (hint := self._hint(name, message))]
        raise UsageError(". ".join(dict.fromkeys([f"unknown option {', '.join(names)}", *hints])))

    def _hint(self, misspelt: str, message: str) -> str | None:
        """Returns what was perhaps meant."""
        parsers = [self, *getattr(self._subcommands_action, "_name_parser_map", {}).values()]
        known = {str(action.dest) for parser in parsers for action in parser._actions}
        # Of a class's options jsonargparse names the last part alone: only one of that very name is meant elsewhere.
        is_whole = "model" in known
        places = _PLACES if is_whole else {place: path for place, path in _PLACES.items() if "backbone" in known}
        known |= {name for path in _CLASS_PATH.findall(message) for name in _parameters(path)}
        nested = {name: f"{place}.{name}" for place, path in places.items() for name in _parameters(path)}
        beside = misspelt.rpartition(".")[0]
        own = {name.rpartition(".")[2]: name for name in sorted(known, key=lambda name: name.startswith(f"{beside}."))}
        names = {**nested, **own}
        # By the part that is wrong: of model.init_args.rnak that is rnak, of trainer.max_epoch max_epoch.
        parts = [part for part in misspelt.split(".") if part not in ("init_args", "class_path")]
        whole = {name.partition(".")[0] for name in known}
        for place, part in enumerate(parts):
            candidates = whole if place == 0 and len(parts) > 1 else set(names if is_whole else own)
            if part not in {*candidates, *names} and (close := difflib.get_close_matches(part, candidates, n=3)):
                return f"Did you mean {' or '.join(names.get(name, name) for name in close)}?"
        meant = names.get(parts[-1]) if parts else None
        is_there = meant in (None, misspelt) or (not is_whole and meant == f"model.{misspelt}")
        return None if is_there else f"Did you mean {meant}?"


def _within_option(argument: str) -> str:
    """Returns an option within another, of which jsonargparse has written the value as Python does, with it in YAML.

    Example:
        >>> _within_option("--revision=None"), _within_option("--adapter={'target_modules': None}")
        ('--revision=null', '--adapter={target_modules: null}')
        >>> _within_option("--name=['a")
        "--name=['a"
    """
    name, _, value = argument.partition("=")
    if value != "None" and value[:1] not in ("{", "["):
        return argument
    try:
        return f"{name}={yaml_files.dump(ast.literal_eval(value), in_line=True)}"
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):  # a text that only looks like a value
        return argument


def with_shipped_files(args: Sequence[str]) -> list[str]:
    """Returns a command line in which each configuration that the package brings is found.

    Args:
        args: As given by the user.
    """
    given = list(args)
    for place, arg in enumerate(given):
        if arg.startswith("--config="):
            given[place] = f"--config={located(arg.removeprefix('--config='))}"
        elif given[place - 1 : place] in (["--config"], ["-c"]):
            given[place] = located(arg)
    return given


def _parameters(class_path: str) -> list[str]:
    module, _, name = class_path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return []
    classes = [base for base in inspect.getmro(found) if base is not object] if isinstance(found, type) else [found]
    return [parameter for base in classes for parameter in inspect.signature(base).parameters]


def _missing_classes(given: Sequence[str]) -> str | None:
    """Says what a command line lacks to be a task: a class of the model and one of the data.

    Args:
        given: The subcommand and what follows.
    """
    files = [after for before, after in itertools.pairwise(given) if before in ("-c", "--config")]
    files += [arg.partition("=")[2] for arg in given if arg.startswith("--config=")]
    if not all(os.path.isfile(os.path.expanduser(file)) for file in files):
        return None
    settings, options = [yaml_files.read(file) for file in files], {arg.partition("=")[0] for arg in given}
    named = {
        part: {f"--{part}", f"--{part}.class_path"} & options or any(_names_class(each.get(part)) for each in settings)
        for part in ("model", "data")
    }
    if all(named.values()):
        return None
    if not files:
        return f"give a configuration: --config TASK.yaml, such as configs/own_csv.yaml (lopa {given[0]} --help)"
    missing = " or ".join(part for part in named if not named[part])
    overlay = f"is an overlay, to be put over a task: --config TASK.yaml --config {files[-1]}"
    return f"{files[-1]} {overlay}; no class of {missing} is named"


def _names_class(setting: Any) -> bool:
    return isinstance(setting, str) or (isinstance(setting, dict) and "class_path" in setting)

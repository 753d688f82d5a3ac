"""Reads YAML without surprises: no key twice, no alias that grows without end, errors that name the file.

Writes it so that each text is read back as a text.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader, set_dumper, set_loader

from lopa_lightning.errors import LoPAError, shown

MODE = "lopa_yaml"
"""The mode of a jsonargparse parser that reads its files and values by :func:`load`."""

_MOST_NODES = 100_000  # with every alias written out; the largest shipped configuration has 200


def load(text: str) -> Any:
    """Reads YAML as jsonargparse does, where ``1e-3`` is a number.

    Args:
        text: A document.

    Raises:
        LoPAError: If a key stands twice, an anchor holds itself, or aliases stand for too much.
        yaml.YAMLError: If it is not YAML.

    Example:
        >>> load("{a: 1, a: 2}")
        Traceback (most recent call last):
        ...
        lopa_lightning.errors.LoPAError: key 'a' stands twice, in lines 1 and 1
    """
    root = yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    if root is not None:
        _count(root, {})
    return get_loader("yaml")(text)


def read(path: str) -> dict[str, Any]:
    """Reads a configuration file.

    Args:
        path: The file.

    Returns:
        Options by name.

    Raises:
        OSError: If it cannot be read.
        LoPAError: If it is not text, not YAML, or not options by name; the message names the file.
    """
    file = Path(path).expanduser()
    if file.exists() and not (file.is_file() or file.is_dir()):  # reading from a pipe might never end
        raise LoPAError(f"--config must be a regular file, got {path!r}")
    try:
        found = load(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        got = f"{error.object[error.start]:#04x} at byte {error.start}"
        raise LoPAError(f"{path} must be text in UTF-8, got {got}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise LoPAError(f"{path}{where} is not YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, RecursionError, LoPAError) as error:
        raise LoPAError(f"{path}: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        got = shown(found) if found else "nothing"
        raise LoPAError(f"{path} must hold options by name, such as trainer: {{max_epochs: 3}}; got {got}")
    return found


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]  # yaml has no types
    """Quotes what would be read as a number: jsonargparse reads ``1e3`` as one, PyYAML does not."""


_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9.][0-9_.:]*(?:[eE][-+]?[0-9]+)?$"), list("-+0123456789.")
)


def _text_node(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Returns a text's node, in double quotes where it has a line break that is read as another one without them."""
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if "\x85" in text else None)


_Dumper.add_representer(str, _text_node)


def dump(data: Any, in_line: bool = False) -> str:
    """Writes YAML that :func:`load` reads back as it was.

    Args:
        data: Mappings, lists, texts, numbers, truth values and None.
        in_line: Whether it is to be one line.

    Example:
        >>> print(dump({"revision": "1e3", "lr": 1e-3}), end="")
        revision: '1e3'
        lr: 0.001
        >>> dump({"lr": [1e-3, None]}, in_line=True)
        '{lr: [0.001, null]}'
    """
    width = math.inf if in_line else None
    text: str = yaml.dump(
        data, Dumper=_Dumper, default_flow_style=in_line, allow_unicode=True, sort_keys=False, width=width
    )
    return text.removesuffix("\n...\n").rstrip("\n") if in_line else text


def _count(node: yaml.Node, known: dict[int, int | None]) -> int:
    """Returns how many nodes there are in one, with every alias written out.

    Args:
        node: Where to begin.
        known: The counts of other nodes by their identity; None for those that hold this one.
    """
    if id(node) in known:
        count = known[id(node)]
        if count is None:
            raise LoPAError(f"the anchor in line {node.start_mark.line + 1} holds itself")
        return count
    known[id(node)] = None
    children = node.value if isinstance(node, yaml.SequenceNode) else []
    if isinstance(node, yaml.MappingNode):
        lines: dict[Any, int] = {}
        for key, _ in node.value:
            name, line = (key.tag, str(key.value)), key.start_mark.line + 1
            if name in lines:
                raise LoPAError(f"key {key.value!r} stands twice, in lines {lines[name]} and {line}")
            lines[name] = line
        children = [child for pair in node.value for child in pair]
    count = 1 + sum(_count(child, known) for child in children)
    if count > _MOST_NODES:
        raise LoPAError(f"aliases stand for more than {_MOST_NODES} values")
    known[id(node)] = count
    return count


set_loader(MODE, load, exceptions=(yaml.YAMLError,))
set_dumper("yaml", dump)  # by this name alone there are a header and comments

"""Says errors of jsonargparse and of other libraries in one line."""

from __future__ import annotations

import re

from lopa_lightning.command_line.front import TASKS
from lopa_lightning.errors import shown

_KEY = re.compile(r"Parser key \"([^\"]+)\":\s*(.*)", re.DOTALL)
_UNION_GOT = re.compile(r"(.*)\n\s*Given value: (.*)", re.DOTALL)  # the last: unions may lie within unions
_GOT = re.compile(r"(.*?)\. Got value: (.*)", re.DOTALL)
_NESTED = re.compile(r"NestedArg\(key='([^']*)', val=(.*)\)\Z", re.DOTALL)
_PATH_OR = re.compile(r"- Expected a path but (.*?) either not accessible or invalid\n", re.DOTALL)
_NO_CLASS_PATH = re.compile(r"Expected a dot import path string: (.*)")
_NOT_LOADED = re.compile(r"Unable to load config [\"'](.*?)[\"']", re.DOTALL)
_EXPECTED = re.compile(r"Expected an? (.+?)(?:\. Got value.*)?$", re.MULTILINE)
_SAID_OF_TYPES = ("Expected a", "Does not validate", "Subtypes:", "Errors:", "Given value", "Problem with given class_")
# A part of a list of types, which may have commas within brackets, three deep.
_PART = re.compile(r"(?:[^,\[\]]|\[(?:[^\[\]]|\[(?:[^\[\]]|\[[^\[\]]*\])*\])*\])+")
_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "NoneType": "null",
    "dict": "values by name",
    "list": "a list",
    "Iterable": "a list",
}
_NAMED_BY = ("backbone", "instance_encoder")  # models, of which a name alone is often given


def condensed(message: str) -> str:
    r"""Returns an error of jsonargparse in one line: the option, what is allowed, and what was got.

    Args:
        message: Of any number of lines.

    Example:
        >>> condensed("Parser key \"trainer.max_epochs\":\n  Expected a <class 'int'>. Got value: abc")
        'trainer.max_epochs must be a whole number, got abc'
    """
    if found := _KEY.search(message):
        return _of_option(*found.groups())
    if found := re.search(r"arguments are required: (.*)|Key \"(.*?)\" is required", message):
        required = {name.partition(".")[2] or name for name in (found[1] or found[2]).split(", ")}
        return f"{', '.join(sorted(required))} must be given"
    if found := re.search(r"Unexpected config: (.*)", message, re.DOTALL):
        return f"--config must be a YAML file with options by name, got {shortened(found[1])}"
    if found := re.search(r'Invalid option "(.*)" for --print_config', message):
        return f"--print_config must be alone or followed by =skip_default or =skip_unset, got {shortened(found[1])}"
    if "subcommand" in message:
        return f"a command must be given, one of {', '.join(TASKS)}"
    return shortened(message)


def folded(text: str) -> str:
    r"""Returns a text of several lines as one.

    Example:
        >>> folded("the checkpoint does not fit:\n  rank: 4, not 2\n  m: 10, not 5")
        'the checkpoint does not fit: rank: 4, not 2; m: 10, not 5'
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    ends = [" " if line.endswith((":", ";", ",", "since")) else "; " for line in lines]
    return "".join(line + end for line, end in zip(lines, [*ends[:-1], ""]))


def shortened(text: str) -> str:
    """Returns a text in one line that is not too long, or a word for an empty one."""
    return shown(text, str) or "nothing"


def _of_option(name: str, body: str) -> str:
    value, within = "", False
    if got := _UNION_GOT.search(body) or _GOT.search(body):
        body, value = got[1], got[2].strip()
        if nested := _NESTED.fullmatch(value):
            name, value, within = f"{name}.{nested[1]}", nested[2].strip("'"), True
    elif got := _PATH_OR.search(body) or _NO_CLASS_PATH.search(body):
        value = got[1]
    if found := _NOT_LOADED.search(body):
        option = "name" if name in _NAMED_BY else "OPTION"
        return f"{name} has options of its own, got {shortened(found[1])}; say {name}.{option}"
    if "class_path entry" in body and "'class_path':" not in value.partition("'init_args'")[0]:
        return f"{name} must be given a class_path, of its own or before, got {shortened(value)}"
    if "has no attribute 'keys'" in body:  # where a class's options should be
        return f"{name} must be values by name, got {shortened(value)}"
    body = _PATH_OR.sub("", body)
    lines = [line.strip(" -") for line in body.splitlines() if line.strip(" -")]
    told = [line for line in lines if not line.startswith(_SAID_OF_TYPES)]
    items = value.startswith(("{", "["))
    allowed = _allowed(body, within or items)
    if not told and allowed:
        return f"{name}{': each' if items else ''} must be {allowed}, got {shortened(value)}"
    problem = shortened((told or lines)[0].rpartition("callable class: ")[2])
    return f"{name}: {problem}" if value in problem else f"{name}: {problem}, got {shortened(value)}"


def _allowed(body: str, within: bool) -> str:
    """Returns what the types that jsonargparse names mean.

    Args:
        body: Its message.
        within: Whether it is a value within a list or mapping that has another type.
    """
    subtypes = re.search(r"Subtypes: \[(.*)\]\n", body)
    types = _EXPECTED.findall(body) if within or subtypes is None else _PART.findall(subtypes[1])
    choices, kinds = [], []
    for written in types:
        inner = re.sub(r"^<class '(.*)'>$", r"\1", written.strip())
        if literal := re.fullmatch(r"typing\.Literal\[(.*)\]", inner):
            choices += [choice.strip() for choice in literal[1].split(",")]
        elif inner.startswith("dot import path"):
            kinds.append("a class path such as package.Class")
        elif inner != "torch.Tensor":  # of a learning rate
            kind = inner.partition("[")[0].rpartition(".")[2]
            kinds.append(_WORDS.get(kind, f"the class path of a {kind}"))
    if choices:
        kinds.insert(0, f"one of {', '.join(dict.fromkeys(choices))}")
    kinds = list(dict.fromkeys(kinds))
    return " or ".join(filter(None, [", ".join(kinds[:-1]), *kinds[-1:]]))

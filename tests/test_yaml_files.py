"""YAML is read back as it was written."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lopa_lightning.command_line.parser import Parser
from lopa_lightning.command_line.yaml_files import dump, load

LIKE_NUMBERS = [
    "1e3",
    "12e45",
    "-1E-3",
    "1_0e3",
    "012",
    "1_000",
    "0x1F",
    "0b1",
    "0o7",
    "1:30",
    "1:30.5",
    "1.",
    ".5",
    ".5e+3",
    "1.5e3",
    ".inf",
    "-.INF",
    ".nan",
    "+1",
    "-",
    "1e",
    "1.e",
]
LIKE_OTHERS = ["on", "yes", "No", "~", "null", "true", "=", "<<", "2026-11-26", "2026-11-26T10:00:00Z"]
TEXTS = st.one_of(st.text(), st.from_regex(r"\A[-+]?[0-9._:]*[eE]?[-+]?[0-9_]*\Z"))


@given(TEXTS)
@example("")
@example("a: b # c\n'")
@example("a\x85b")
def test_a_text_is_read_as_that_text(text: str) -> None:
    assert load(dump({"a": text, "b": [text], "c": {"d": text}})) == {"a": text, "b": [text], "c": {"d": text}}
    assert load(dump({text: 1})) == {text: 1}


@pytest.mark.parametrize("text", [*LIKE_NUMBERS, *LIKE_OTHERS])
def test_what_looks_like_something_else_is_read_as_a_text(text: str) -> None:
    assert load(dump([text])) == [text]


@given(st.one_of(st.integers(), st.booleans(), st.none(), st.floats(allow_nan=False)))
def test_what_is_no_text_is_read_as_it_was(value: Any) -> None:
    read = load(dump([value]))
    assert read == [value]
    assert type(read[0]) is type(value)


def test_a_parser_writes_what_it_reads() -> None:
    parser = Parser()
    parser.add_argument("--labels", type=list[str | int | bool])
    parser.add_argument("--revision", type=str)
    given = parser.parse_args(["--labels", "['1e3', '12', 12]", "--revision", "12e45"])
    again = parser.parse_string(parser.dump(given))
    assert (again.labels, again.revision) == (["1e3", "12", 12], "12e45")

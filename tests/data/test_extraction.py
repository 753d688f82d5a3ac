from __future__ import annotations

import ast
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lopa_lightning.data.code.programs import code_block, cruxeval_answer, first_function
from lopa_lightning.errors import LoPAError

SIGNATURE = 'def f(a, b):\n    """Adds.\n    """'

CUTS = {
    "next function": ("\n    return a\n\n\ndef g():\n    pass\n", "\n    return a\n"),
    "print": ("\n    return a\nprint(f(1))", "\n    return a\n"),
    "assert after blank lines": ("\n    return a\n   \n\nassert f(1, 2)\n", "\n    return a\n"),
    "fence": ("\n    return a\n```\nSo this is it.", "\n    return a\n"),
    "done": ("\n    return a\n[DONE]\n", "\n    return a\n"),
    "docstring after it": ('\n    return a\n"""Another task"""', "\n    return a\n"),
    "comment before what follows": ("\n    return a\n# Tests\nassert f", "\n    return a\n"),
    "comment within": ("\n    a += 1\n# one more\n    return a", "\n    a += 1\n# one more\n    return a\n"),
    "first line goes on": ("return a\nx = 1", "return a\n"),
    "open bracket": ("\n    return [\n1,\n2]\nx", "\n    return [\n1,\n2]\n"),
    "open string": ("\n    return '''\nx = (1\n'''\ny", "\n    return '''\nx = (1\n'''\n"),
    "continued line": ("\n    return a + \\\nb\nc", "\n    return a + \\\nb\n"),
    "bracket in a string": ("\n    return '(['\nx", "\n    return '(['\n"),
    "quote in a comment": ("\n    return a  # it's '''\nx", "\n    return a  # it's '''\n"),
    "escaped quote": ("\n    return 'a\\'('\nx", "\n    return 'a\\'('\n"),
    "windows": ("\r\n    return a\r\nx = 1\r\n", "\n    return a\n"),
    "nothing": ("", ""),
    "only what follows": ("\n\ndef g():\n    pass", ""),
    "tabs": ("\n\treturn a\nx", "\n\treturn a\n"),
    "nested": (
        "\n    def g():\n        return a\n    return g\n\nf(1)",
        "\n    def g():\n        return a\n    return g\n",
    ),
    "never closed": ("\n    return (a\nx = 1", "\n    return (a\nx = 1\n"),
}


@pytest.mark.parametrize("name", CUTS)
def test_a_completion_is_cut_where_the_function_ends(name: str) -> None:
    completion, expected = CUTS[name]
    assert first_function(completion) == expected


@given(st.text(alphabet="ab \n\t\\'\"()[]#:=\r", max_size=60))
def test_any_text_is_cut_to_a_part_of_it(text: str) -> None:
    part = first_function(text).removesuffix("\n")
    assert text.replace("\r\n", "\n").replace("\r", "\n").startswith(part)
    assert first_function(part) in (part + "\n", "")  # what is left needs no further cut


def test_a_hostile_completion_takes_no_time() -> None:
    for text in ('"""' * 20_000 + "\\", "(" * 100_000, "\\\n" * 50_000, "#\n" * 50_000, " \n" * 50_000 + "x"):
        assert len(first_function(text)) <= len(text) + 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("def f():\n    return 1\n[DONE]\n[BEGIN]\nx", "def f():\n    return 1\n"),
        ("[BEGIN]\ndef f():\n    return 1\n[DONE]", "def f():\n    return 1\n"),
        ("Sure!\n```python\ndef f():\n    pass\n```\nor\n```\nx\n```", "def f():\n    pass\n"),
        ("```py\ndef f():\n    pass", "def f():\n    pass\n"),
        ("```\n    x = '```'\n    y\n```", "    x = '```'\n    y\n"),
        ("\r\ndef f():\r\n    pass\r\n", "def f():\n    pass\n"),
        ("  \n", ""),
        ("[DONE]", ""),
    ],
)
def test_code_is_found_in_an_answer(text: str, expected: str) -> None:
    assert code_block(text) == expected


@pytest.mark.parametrize(
    ("text", "output", "input"),
    [
        ("assert f(17) == 18\n[/ANSWER]", "18", "f(17)"),
        ("assert f(17) == 18", "18", "f(17)"),
        ("18\n[/ANSWER]\n\n[PYTHON]\nassert f(2) == 3", "18", "18"),
        ("f('a', [1]) == {'b': 2}\n[/ANSWER]", "{'b': 2}", "f('a', [1])"),
        ("So f(1) == 2.\n[ANSWER]\nassert f(1) == 3\n[/ANSWER]", "3", "f(1)"),
        ("assert f('a==b') == 'c'", "b')", "f('a"),  # the benchmark's harness splits here as well
        ('assert f("assert x") == 1', "1", 'f("assert x")'),  # an input is what stands from `assert f` on
        ('assert f ("a") == 1', "1", 'f("a")'),
        ("assert 1 == f(2)", "f(2)", "assert 1"),
        ("", "", ""),
    ],
)
def test_cruxeval_answers(text: str, output: str, input: str) -> None:
    assert cruxeval_answer(text, "output") == output
    assert cruxeval_answer(text, "input") == input


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(LoPAError, match="mode must be one of input, output, got 'outputs'"):
        cruxeval_answer("1", "outputs")  # type: ignore[arg-type]


# Real solutions


def functions(code: str) -> list[tuple[str, str]]:
    """Each top-level function of a program: up to its body, and its body, as Python's parser sees them."""
    found = []
    lines = code.splitlines(keepends=True)
    for node in ast.parse(code).body:
        if isinstance(node, ast.FunctionDef) and node.body[0].lineno > node.lineno:
            start, end = node.body[0].lineno - 1, node.end_lineno
            found.append(("".join(lines[node.lineno - 1 : start]), "".join(lines[start:end])))
    return found


@pytest.mark.real
def test_solutions_are_cut_where_the_parser_ends_them(real_data: Callable[[str], str]) -> None:
    import datasets

    rows = datasets.load_dataset(real_data("google-research-datasets/mbpp"), "full")
    draw = random.Random(0)
    followed = ["\n\nprint(f(1))\n", "# so\n\nassert f(2)\n", "\nclass A:\n    x = '''\n", "```\n", "\n\ndef main(\n"]
    cuts = 0
    for split in rows.values():
        for code in split["code"]:
            for head, body in functions(code.replace("\r\n", "\n")):
                if body.strip() and not head.rstrip().endswith("\\"):
                    whole = "\n" + body.rstrip() + "\n"
                    assert first_function(whole + draw.choice(followed)).rstrip() == whole.rstrip()
                    cuts += 1
    assert cuts > 974


@pytest.mark.real
def test_cruxeval_references_survive_their_own_prompt(real_data: Callable[[str], str]) -> None:
    path = Path(real_data("cruxeval-org/cruxeval")) / "test.jsonl"
    rows: list[dict[str, Any]] = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        reply = f"assert f({row['input']}) == {row['output']}\n[/ANSWER]\n"
        assert cruxeval_answer(reply, "output") == row["output"]
        assert cruxeval_answer(reply, "input") == f"f({row['input']})"
    assert len(rows) == 800

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lopa_lightning.data.code.programs import cruxeval_answer_program, is_skipped, mbpp_program
from lopa_lightning.errors import LoPAError
from lopa_lightning.sandbox.run import run_programs

SQUARE = "def f(n):\n    return n * n"


def test_mbpp_tests_come_after_their_setup_and_the_solution() -> None:
    code = "class Node:\r\n    def __init__(self, x):\r\n        self.x = x\r\ndef value(node):\r\n    return node.x"
    program = mbpp_program(code, ["assert value(root) == 5", "assert value(Node(1)) == 1"], setup="root = Node(5)")
    assert "\r" not in program
    names: dict[str, object] = {}
    exec(program, names)
    wrong = mbpp_program(code, ["assert value(root) == 6"], setup="root = Node(5)")
    with pytest.raises(AssertionError):
        exec(wrong, names)


@pytest.mark.parametrize(
    ("answer", "mode", "passes"),
    [
        ("9", "output", True),
        ("8", "output", False),
        ("3 * 3", "output", True),
        ("f(3)", "output", False),  # the call is no answer to what it returns
        ("", "output", False),
        ("f(3)", "input", True),
        ("f(-3)", "input", True),  # any input will do
        ("f(4)", "input", False),
        ("9", "input", False),  # not a call
        ("f(3", "input", False),
    ],
)
def test_cruxeval_answers_pass_by_the_benchmarks_rules(answer: str, mode: str, passes: bool) -> None:
    program = cruxeval_answer_program(SQUARE, "3", "9", answer, mode)  # type: ignore[arg-type]
    try:
        exec(program, {})
    except (AssertionError, SyntaxError):
        assert not passes
    else:
        assert passes


@pytest.mark.parametrize(
    ("answer", "mode", "skipped"),
    [
        ("9", "output", False),
        ("f(4)", "output", False),  # a call, but not the one that was asked for: it is run
        ("f(3)", "output", True),
        ("1 + f(3)", "output", True),
        ("f(3)", "input", False),
        ("", "input", True),
        ("9", "input", True),
    ],
)
def test_what_is_no_answer_to_cruxeval_is_skipped(answer: str, mode: str, skipped: bool) -> None:
    assert is_skipped("3", answer, mode) == skipped  # type: ignore[arg-type]


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(LoPAError, match="mode must be one of input, output, got 'in'"):
        cruxeval_answer_program(SQUARE, "3", "9", "9", "in")  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.real
def test_the_benchmarks_own_solutions_pass_in_the_sandbox_and_others_answers_fail(
    real_data: Callable[[str], str],
) -> None:
    import datasets

    splits = datasets.load_dataset(real_data("google-research-datasets/mbpp"), "full").values()
    rows = [row for split in splits for row in split if row["task_id"] % 30 == 7 or row["test_setup_code"]]
    lines = (Path(real_data("cruxeval-org/cruxeval")) / "test.jsonl").read_text().splitlines()
    answers = [json.loads(line) for line in lines[::80]]
    right = [mbpp_program(r["code"], r["test_list"] + r["challenge_test_list"], r["test_setup_code"]) for r in rows]
    right += [cruxeval_answer_program(**_fields(row), answer=row["output"], mode="output") for row in answers]
    wrong = [
        cruxeval_answer_program(**_fields(row), answer=other["output"], mode="output")
        for row, other in zip(answers, answers[1:] + answers[:1])
        if row["output"] != other["output"]
    ]
    statuses = [outcome.status for outcome in run_programs(right + wrong)]
    assert statuses == ["passed"] * len(right) + ["failed"] * len(wrong)
    assert len(rows) > 25
    assert len(wrong) > 5


def _fields(row: dict[str, str]) -> dict[str, str]:
    return {name: row[name] for name in ("code", "input", "output")}

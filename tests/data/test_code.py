"""MBPP's and CRUXEval's prompts, splits and programs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lopa_lightning.data import CRUXEvalDataModule, MBPPDataModule
from lopa_lightning.errors import LoPAError
from lopa_lightning.sandbox.run import run_programs
from tests.mini_code import write_mini_cruxeval, write_mini_mbpp
from tests.refusals import Refused

Find = Callable[[str], str]

PROBLEM = {
    "text": 'Write a function with """quotes""" and a \\n.',
    "code": "import math\r\nLIMIT = 3\r\nx = 5\r\ndef helper(a):\r\n  return a\r\n"
    "def f(x, k = 2):\r\n  '''old'''\r\n  return helper(x) + LIMIT",
    "test_list": ["assert f( 1,2)==4", "assert set(f(2)) != {'a\\n'}", "assert f(0) == 3"],
    "test_setup_code": "",
}


def test_the_docstring_prompt_is_built_from_the_problems_code_and_tests(tmp_path: Path) -> None:
    data = MBPPDataModule(path=str(tmp_path))
    example = data.layout("test")(PROBLEM)
    assert example.prompt == (
        "def f(x, k=2):\n"
        '    """Write a function with \\"\\"\\"quotes\\"\\"\\" and a \\\\n.\n'
        "    >>> f(1, 2)\n"
        "    4\n"
        "    >>> set(f(2)) != {'a\\\\n'}\n"
        "    True\n"
        "    >>> f(0)\n"
        "    3\n"
        '    """\n'
    )
    assert example.completion == (
        "    import math\n    LIMIT = 3\n    def helper(a):\n        return a\n    return helper(x) + LIMIT"
    )
    assert example.instance == example.prompt
    assert data.instance_source is None
    space: dict[str, Any] = {}
    exec(example.prompt + example.completion, space)
    assert space["f"](1) == 4
    assert space["f"].__doc__.startswith('Write a function with """quotes""" and a \\n.\n')


def test_what_follows_the_function_is_not_run(tmp_path: Path) -> None:
    data = MBPPDataModule(path=str(tmp_path))
    program = data.program(PROBLEM, "    return x + 3\n\nprint(open('/etc/passwd'))\n")
    assert "print" not in program
    assert program.endswith("    return x + 3\n\nassert f( 1,2)==4\nassert set(f(2)) != {'a\\n'}\nassert f(0) == 3")


NEEDY = {
    "text": "Measure pairs.",
    "code": "import sys, os.path\r\nfrom math import pi as p\r\nclass Pair:\r\n  x = 1\r\nclass Own:\r\n  y = 2\r\n"
    "def size(pair):\r\n  return sys.getsizeof(pair.x) * Own.y",
    "test_list": ["assert size(Pair()) == 2 * sys.getsizeof(1)", "assert os.path.sep", "assert size(Pair())"],
    "test_setup_code": "",
}


@pytest.mark.parametrize("style", ["docstring", "asserts"])
def test_what_tests_need_of_the_solution_is_the_harnesss_and_not_the_prompts(tmp_path: Path, style: Any) -> None:
    data = MBPPDataModule(path=str(tmp_path), style=style)
    row = {**NEEDY, "test_list": [NEEDY["test_list"][0]] if style == "docstring" else NEEDY["test_list"]}
    written = (
        "    return 2 * (1).__sizeof__()"
        if style == "docstring"
        else "class Pair: x = 1\ndef size(pair):\n    return 2 * (1).__sizeof__()"
    )
    program = data.program(row, written)
    assert program.splitlines()[-1 - len(row["test_list"])] == "import sys, os.path"
    assert "math" not in program
    exec(program, {})
    if style == "docstring":
        example = data.layout("test")(row)
        assert example.prompt.startswith('class Pair:\n    x = 1\ndef size(pair):\n    """Measure pairs.\n')
        own = "    import sys, os.path\n    from math import pi as p\n    class Own:\n        y = 2\n    return"
        assert str(example.completion).startswith(own)
        exec(data.program(row, str(example.completion)), {})


def test_mbpps_halves_are_by_id_and_its_own_splits_are_as_stored(tmp_path: Path) -> None:
    folder = write_mini_mbpp(tmp_path / "mini_mbpp")
    halves = MBPPDataModule(path=folder).raw()
    assert {split: rows["task_id"][:] for split, rows in halves.items()} == {
        "train": list(range(1, 9)),
        "test": list(range(9, 17)),
    }
    own = MBPPDataModule(path=folder, division="own").raw()
    assert own["train"]["task_id"][:] == list(range(13, 17))
    assert set(own) == {"train", "test", "validation", "prompt"}


def test_the_original_prompt_has_the_published_shots(tmp_path: Path) -> None:
    data = MBPPDataModule(path=write_mini_mbpp(tmp_path / "mini_mbpp"), style="asserts", num_shots=3)
    row = data.raw()["test"][0]
    example = data.layout("test")(row)
    asked = (
        "You are an expert Python programmer, and here is your task: Write a function to add {i}. Your code should "
        "pass these tests:\n\n"
    )
    assert example.prompt.count("[DONE]") == 3
    assert [example.prompt.index(asked.format(i=i)) for i in (2, 3, 4, 9)] == sorted(
        example.prompt.index(asked.format(i=i)) for i in (2, 3, 4, 9)
    )
    assert example.completion == "def add(x):\n    return x + 9\n[DONE]"
    assert example.instance.startswith(asked.format(i=9))
    assert data.program(row, f"{example.completion}\nrubbish").startswith(
        "def add(x):\n    return x + 9\n\nassert add(0)"
    )


def test_cruxevals_prompt_ends_with_the_question_and_its_instance_is_the_question_alone(tmp_path: Path) -> None:
    folder = write_mini_cruxeval(tmp_path / "mini_cruxeval")
    row = {"code": "def f(n):\n    return n + 1", "input": "1", "output": "2"}
    for predict, asked in (("output", "f(1) == ??"), ("input", "f(??) == 2")):
        data = CRUXEvalDataModule(predict, path=folder)  # type: ignore[arg-type]
        example = data.layout("test")(row)
        question = f"def f(n):\n    return n + 1\nassert {asked}"
        assert example.instance == question
        assert example.prompt.endswith(f"[/ANSWER]\n\n[PYTHON]\n{question}\n[/PYTHON]\n[ANSWER]\n")
        assert example.prompt.count("[PYTHON]") == 3
        assert example.completion == "assert f(1) == 2\n[/ANSWER]"
    assert data.program(row, "assert f(0 + 1) == 2\n") == "def f(n):\n    return n + 1\nassert 2 == f(0 + 1)"
    raw = data.raw()
    assert (len(raw["train"]), len(raw["test"]), raw["test"]["id"][0]) == (6, 6, "sample_6")


@pytest.mark.parametrize(
    ("predict", "written", "matches"),
    [
        ("output", "assert f(1) == 2\n[/ANSWER]", True),
        ("output", "2 [/ANSWER] and so on", True),
        ("output", "assert f(1) == 3\n[/ANSWER]", False),
        ("output", "assert f(1) == 2.0", False),  # equal, but not letter for letter
        ("input", "f(1)\n", True),
        ("input", "assert f(1) == 7", True),  # the answer is the call
        ("input", "assert f(0 + 1) == 2", False),
    ],
)
def test_exact_matches_compare_the_answers(tmp_path: Path, predict: Any, written: str, matches: bool) -> None:
    data = CRUXEvalDataModule(predict, path=write_mini_cruxeval(tmp_path / "mini", rows=2))
    assert data.exact_matches("test", [0], [written]) == [matches]


def test_exact_matches_of_functions_compare_their_bodies(tmp_path: Path) -> None:
    folder = write_mini_mbpp(tmp_path / "mini_mbpp")
    docstring = MBPPDataModule(path=folder)
    written = ["    return x + 9\n\nprint(1)", "    return 9 + x", "    return x + 10  \n"]
    assert docstring.exact_matches("test", [0, 0, 1], written) == [True, False, True]
    asserts = MBPPDataModule(path=folder, style="asserts")
    assert asserts.exact_matches("test", [0, 0], ["def add(x):\n    return x + 9\n[DONE]\n\n", "add"]) == [True, False]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CRUXEvalDataModule("both"), "predict must be one of input, output, got 'both'"),  # type: ignore[arg-type]
        (lambda: MBPPDataModule(style="words"), "style must be one of docstring, asserts"),  # type: ignore[arg-type]
        (lambda: MBPPDataModule(division="paper"), "division must be one of halves, own"),  # type: ignore[arg-type]
        (lambda: MBPPDataModule(num_shots=3), "num_shots must be from 0 to 3, and 0 with style: docstring; got 3"),
    ],
)
def test_unknown_choices_are_listed(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(LoPAError, match=message):
        make()


GIVEN = {"code": "def f(n):\n    return n", "input": "'a'", "output": "'a'"}


def stored(folder: Path, rows: list[dict[str, Any]], split: str = "test") -> str:
    """Writes a split in a folder whose only config is MBPP's, and returns the folder."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = f"[{{split: {split}, path: rows.jsonl}}]"
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: full\n  data_files: {files}\n---\n")
    return str(folder)


@pytest.mark.sampled(6)
@pytest.mark.parametrize(
    ("column", "value", "wanted"),
    [
        ("task_id", "one", "whole numbers"),
        ("task_id", None, "whole numbers"),
        ("text", None, "texts"),
        ("text", 5, "texts"),
        ("code", 7, "Python code"),
        ("code", "def f(:", "Python code"),
        ("code", "x = '\0'", "Python code"),
        ("test_list", "assert f(1) == 4", "lists of Python code"),
        ("test_list", None, "lists of Python code"),
        ("test_list", [], "lists of Python code"),
        ("test_list", ["assert f(1) == 4", None], "lists of Python code"),
        ("test_list", ["assert f("], "lists of Python code"),
        ("test_setup_code", None, "Python code"),
        ("input", {"n": 1}, "texts"),
        ("input", None, "texts"),
        ("output", [1], "texts"),
        ("output", 1, "texts"),
    ],
    ids=str,
)
def test_a_row_that_is_none_of_the_benchmark_is_named(
    column: str, value: Any, wanted: str, tmp_path: Path, refused: Refused
) -> None:
    is_mbpp = column in PROBLEM or column == "task_id"
    right = {"task_id": 1, **PROBLEM} if is_mbpp else GIVEN
    folder = stored(tmp_path, [right, {**right, column: value}])
    data = MBPPDataModule(path=folder) if is_mbpp else CRUXEvalDataModule(path=folder)
    with refused(f"test: column {column!r} must hold {wanted}, got {value!r} in row 2 (counted from 1)"):
        data.raw()


def test_a_split_or_column_that_is_not_there_is_named(tmp_path: Path, refused: Refused) -> None:
    folder = stored(tmp_path, [GIVEN], "train")
    with refused("no split test; there are train"):
        CRUXEvalDataModule(path=folder).raw()
    with refused("train: no column task_id; there are code, input, output"):
        MBPPDataModule(path=folder).raw()


@pytest.mark.parametrize("test", ["assert f(1) == 1; x = 2", "f(1)", "assert f(1)", ""])
def test_a_test_that_is_no_comparison_is_refused(test: str, tmp_path: Path) -> None:
    with pytest.raises(LoPAError, match="a test must be an assert with a comparison, got "):
        MBPPDataModule(path=str(tmp_path)).layout("test")({**PROBLEM, "test_list": [test]})


@pytest.mark.slow
@pytest.mark.real
def test_real_solutions_pass_as_completions_of_their_prompts(real_data: Find) -> None:
    data = MBPPDataModule(path=real_data("google-research-datasets/mbpp"))
    rows = [row for split in ("train", "test") for row in data.raw()[split]]
    some = [row for row in rows if row["task_id"] in (342, 367, 596, 601, 927) or row["task_id"] % 60 == 3]
    layout = data.layout("test")
    outcomes = run_programs([data.program(row, str(layout(row).completion)) for row in some])
    assert [(row["task_id"], outcome) for row, outcome in zip(some, outcomes) if not outcome.passed] == []
    assert len(some) > 20


@pytest.mark.slow
@pytest.mark.real
def test_every_real_problem_is_laid_out(real_data: Find) -> None:
    data = MBPPDataModule(path=real_data("google-research-datasets/mbpp"))
    raw, layout = data.raw(), data.layout("train")
    assert (raw["train"]["task_id"][-1], raw["test"]["task_id"][0], len(raw["test"])) == (487, 488, 487)
    for split in ("train", "test"):
        for row in raw[split]:
            example = layout(row)
            compile(f"{example.prompt}{example.completion}", str(row["task_id"]), "exec")
            assert example.prompt.count("\n    >>> ") == 3
            assert "import " not in example.prompt.split('"""')[0]
            before = example.prompt.split("def ", 1)[0]
            assert before == "" or (before.startswith("class ") and row["task_id"] in (367, 601, 927))
    cruxeval = CRUXEvalDataModule(path=real_data("cruxeval-org/cruxeval")).raw()
    assert (len(cruxeval["train"]), len(cruxeval["test"]), cruxeval["test"]["id"][0]) == (400, 400, "sample_400")

"""MBPP (Austin et al. 2021, https://arxiv.org/abs/2108.07732): short functions from a sentence and their tests."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from lopa_lightning.data.code.base import CodeDataModule, InstanceReads, checked, halves
from lopa_lightning.data.code.programs import code_block, first_function, mbpp_program
from lopa_lightning.data.completion_rows import Example, Layout
from lopa_lightning.data.splits import Role
from lopa_lightning.data.types import DatasetDict
from lopa_lightning.errors import LoPAError, one_of

Style = Literal["docstring", "asserts"]
Division = Literal["halves", "own"]

_COLUMNS = {
    "task_id": "whole numbers",
    "text": "texts",
    "code": "Python code",
    "test_list": "lists of Python code",
    "test_setup_code": "Python code",
}

_EXPERT = (
    "You are an expert Python programmer, and here is your task: {text} Your code should pass these tests:\n\n{tests}"
)


@dataclass(frozen=True)
class DocstringLayout:
    """Makes a prompt of a signature and a docstring with the tests as examples, as in MBXP.

    MBXP is by Athiwaratkun et al. 2022, arXiv 2210.14868. The function is the one that the tests call. Code is printed
    from its syntax tree: one style for problems of many authors. What stands beside the function in the reference
    solution (imports, helpers, constants) moves into it, so that it is whole without the rest and the prompt shows
    nothing of the solution. Only classes that the tests make objects of are a part of the problem, and stand before it.
    """

    columns = ("text", "code", "test_list", "test_setup_code")

    def __call__(self, row: Mapping[str, Any]) -> Example:
        """Makes an example of a problem."""
        tree = _parsed(row["code"])
        tests = [_test(line) for line in row["test_list"]]
        function = _tested(tree, tests)
        needed = _names([*row["test_list"], row["test_setup_code"]])
        before = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name in needed]
        helpers = [node for node in tree.body if node is not function and node not in before]
        helpers = [node for node in helpers if not _sets_argument(node, function)]
        has_docstring = ast.get_docstring(function) is not None and len(function.body) > 1
        body = function.body[1:] if has_docstring else function.body
        document = [row["text"].strip().replace("\r\n", "\n"), *(line for test in tests for line in _doctest(test))]
        head = "".join(f"{ast.unparse(node)}\n" for node in before)
        indented = "\n    ".join("\n".join(document).split("\n")).replace("\\", "\\\\").replace('"""', '\\"\\"\\"')
        signature = f"def {function.name}({ast.unparse(function.args)}):"
        prompt = f'{head}{signature}\n    """{indented}\n    """\n'
        lines = "\n".join(ast.unparse(node) for node in [*helpers, *body]).split("\n")
        completion = "\n".join(f"    {line}" if line else "" for line in lines)
        return Example(prompt, completion, prompt)


def _parsed(code: str) -> ast.Module:
    return ast.parse(code.replace("\r\n", "\n"))


def _names(lines: Sequence[str]) -> set[str]:
    return {node.id for line in lines for node in ast.walk(_parsed(line)) if isinstance(node, ast.Name)}


def _test(line: str) -> ast.Compare:
    statements = ast.parse(line.strip()).body
    test = statements[0].test if len(statements) == 1 and isinstance(statements[0], ast.Assert) else None
    if not isinstance(test, ast.Compare):
        raise LoPAError(f"a test must be an assert with a comparison, got {line!r}")
    return test


def _tested(tree: ast.Module, tests: list[ast.Compare]) -> ast.FunctionDef:
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    called = [node.id for test in tests for node in ast.walk(test) if isinstance(node, ast.Name)]
    found = next((functions[name] for name in called if name in functions), None)
    if found is None:
        raise LoPAError(f"the tests call none of the functions {', '.join(functions)}")
    return found


def _sets_argument(node: ast.stmt, function: ast.FunctionDef) -> bool:
    """Returns whether a statement of a module would, within a function, overwrite one of its arguments."""
    arguments = {argument.arg for argument in ast.walk(function.args) if isinstance(argument, ast.arg)}
    stored = {name.id for name in ast.walk(node) if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)}
    return isinstance(node, ast.Assign) and bool(stored & arguments)


def _doctest(test: ast.Compare) -> list[str]:
    if len(test.ops) == 1 and isinstance(test.ops[0], ast.Eq):
        return [f">>> {ast.unparse(test.left)}", ast.unparse(test.comparators[0])]
    return [f">>> {ast.unparse(test)}", "True"]


@dataclass(frozen=True)
class AssertsLayout:
    """Makes the original prompt: a sentence and three asserts, the code between ``[BEGIN]`` and ``[DONE]``.

    Attributes:
        shots: Solved problems before the one to solve.
        instance_reads: ``question``, the sentence with its tests, or the whole ``prompt``.
    """

    columns = ("text", "code", "test_list")

    shots: tuple[tuple[str, str, tuple[str, ...]], ...]
    instance_reads: InstanceReads

    def __call__(self, row: Mapping[str, Any]) -> Example:
        """Makes an example of a problem."""
        before = "".join(
            f"{_question(text, tests)}\n[BEGIN]\n{_plain(code)}\n[DONE]\n\n" for text, code, tests in self.shots
        )
        question = _question(row["text"], row["test_list"])
        prompt = f"{before}{question}\n[BEGIN]\n"
        instance = question if self.instance_reads == "question" else prompt
        return Example(prompt, f"{_plain(row['code'])}\n[DONE]", instance)


def _question(text: str, tests: Any) -> str:
    return _EXPERT.format(text=text.strip(), tests="\n".join(tests))


def _plain(code: str) -> str:
    return code.replace("\r\n", "\n").strip()


class MBPPDataModule(CodeDataModule):
    """MBPP: functions of a few lines, judged by three asserts each.

    Args:
        style: ``docstring``: signature and docstring with the tests as examples, the layout of MBXP and the
            paper's; ``asserts``: the original prompt in words.
        division: ``halves``: the first half by id trains, the second tests, as in the paper, and a tenth of the
            training half is validated on; ``own``: MBPP's own splits.
        num_shots: Solved problems in the original prompt, up to three: 2, 3 and 4, as published. They are
            among the training half of ``halves``.
        path: Hub id, or a folder in that layout.
        **kwargs: See :class:`~lopa_lightning.data.code.base.CodeDataModule`.

    Raises:
        LoPAError: If an option is not one of its choices.
    """

    def __init__(
        self,
        style: Style = "docstring",
        division: Division = "halves",
        num_shots: int = 0,
        path: str = "google-research-datasets/mbpp",
        **kwargs: Any,
    ) -> None:
        one_of("style", style, get_args(Style))
        one_of("division", division, get_args(Division))
        if not 0 <= num_shots <= 3 or (num_shots and style == "docstring"):
            raise LoPAError(f"num_shots must be from 0 to 3, and 0 with style: docstring; got {num_shots}")
        super().__init__(path=path, name="full", **kwargs)
        self.style, self.division, self.num_shots = style, division, num_shots

    @property
    def instance_source(self) -> str | None:
        """``question``; None where the instance encoder reads the whole prompt, as of a docstring always."""
        return None if self.style == "docstring" else super().instance_source

    def load(self) -> DatasetDict:
        """Reads the problems and divides them."""
        from datasets import concatenate_datasets

        stored = checked(super().load(), _COLUMNS, ["prompt"] if self.num_shots else [])
        self._solved = {row["task_id"]: row for row in stored["prompt"]} if self.num_shots else {}
        if self.division == "own":
            return stored
        return halves(concatenate_datasets(list(stored.values())).sort("task_id"))

    def layout(self, role: Role) -> Layout:
        """Returns the layout of the chosen style."""
        if self.style == "docstring":
            return DocstringLayout()
        self.raw()
        shots = [self._solved[task] for task in range(2, 2 + self.num_shots)]
        solved = tuple((row["text"], row["code"], tuple(row["test_list"])) for row in shots)
        return AssertsLayout(solved, self.instance_reads)

    def answer(self, completion: str) -> str:
        """Returns the function's body; in the original prompt's style, the code up to ``[DONE]``."""
        return first_function(completion) if self.style == "docstring" else code_block(completion)

    def program(self, row: dict[str, Any], completion: str) -> str:
        """Joins the function, its tests and the imports that these need."""
        code = self.answer(completion)
        if self.style == "docstring":
            code = self.layout("test")(row).prompt + code
        setup = filter(None, [*_imports_of_tests(row), row["test_setup_code"]])
        return mbpp_program(code, row["test_list"], "\n".join(setup))


def _imports_of_tests(row: Mapping[str, Any]) -> list[str]:
    """Returns the reference solution's imports whose names its tests use, such as ``sys`` in problem 596."""
    needed = _names([*row["test_list"], row["test_setup_code"]])
    imports = [node for node in _parsed(row["code"]).body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [{(alias.asname or alias.name).partition(".")[0] for alias in node.names} for node in imports]
    return [ast.unparse(node) for node, bound in zip(imports, names) if needed & bound]

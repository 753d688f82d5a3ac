"""Prompts whose completion is judged by running a program."""

from __future__ import annotations

import ast
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal, get_args

from lightning.pytorch.utilities import rank_zero_info

from lopa_lightning.data.columns import ColumnError, check_columns
from lopa_lightning.data.completion import CompletionDataModule, samples
from lopa_lightning.data.types import Dataset, DatasetDict
from lopa_lightning.errors import LoPAError, one_of
from lopa_lightning.sandbox.run import Limits, isolation, isolation_line, require_permission, run_programs

InstanceReads = Literal["question", "prompt"]


class CodeDataModule(CompletionDataModule):
    """A benchmark of code: a subclass gives the layout of its prompts, and the program that judges a completion.

    Args:
        allow_code_execution: Whether code that the model generated may be run on this machine, in a sandbox.
        limits: What one program may use.
        workers: Programs that run at once; by default one for each core.
        instance_reads: What the instance encoder reads: the ``question`` without task description and solved examples,
            or the whole ``prompt``, as in the paper's released code.
        **kwargs: See :class:`~lopa_lightning.data.text.TextDataModule`.
    """

    _isolation_told = False

    def __init__(
        self,
        allow_code_execution: bool = False,
        limits: Limits = Limits(),
        workers: int | None = None,
        instance_reads: InstanceReads = "question",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        usual = {"prompt_column": "prompt", "completion_column": "completion"}
        for name in (*usual, "messages_column", "instance_column"):
            if getattr(self, name) != usual.get(name):
                raise LoPAError(f"{type(self).__name__} makes prompts by the benchmark's own layout, without {name}")
        one_of("instance_reads", instance_reads, get_args(InstanceReads))
        self.instance_reads = instance_reads
        self.allow_code_execution, self.limits, self.workers = allow_code_execution, limits, workers

    @property
    def instance_source(self) -> str | None:
        """``question``, or None where the instance encoder reads the whole prompt."""
        return "question" if self.instance_reads == "question" else None

    @abstractmethod
    def program(self, row: dict[str, Any], completion: str) -> str:
        """Returns the program that passes if a completion is right.

        Args:
            row: The problem, as it is stored.
            completion: What the model generated.
        """

    def skips(self, row: dict[str, Any], completion: str) -> bool:
        """Returns whether the benchmark's own harness passes over a completion, so that it is no sample of its problem.

        Args:
            row: The problem, as it is stored.
            completion: What the model generated.
        """
        return False

    def check_scoring(self) -> None:
        """Refuses to run code without the user's permission, and says what isolates it."""
        require_permission(self.allow_code_execution)
        if not self._isolation_told:  # a run is checked before its data are read, and again by Lightning
            rank_zero_info(isolation_line())
        self._isolation_told = True

    def scoring_identity(self) -> dict[str, Any]:
        """Returns also what a program may use, and where it is run."""
        return {**super().scoring_identity(), "limits": asdict(self.limits), "isolation": list(isolation())}

    def score(self, indices: Sequence[int], completions: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
        """Runs every completion's program in the sandbox."""
        require_permission(self.allow_code_execution)
        rows = self.rows("test")
        records = samples(indices, completions)
        for record in records:
            row, text = rows[record["index"]], record["completion"]
            record |= {"program": self.program(row, text), "skipped": self.skips(row, text)}
        outcomes = run_programs([record["program"] for record in records], self.limits, self.workers)
        return [
            {**record, "passed": outcome.passed, **asdict(outcome), "isolation": list(outcome.isolation)}
            for record, outcome in zip(records, outcomes)
        ]


def _is_python(text: Any) -> bool:
    try:
        return isinstance(text, str) and bool(ast.parse(text.replace("\r\n", "\n")))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


_KINDS: dict[str, Callable[[Any], bool]] = {
    "texts": lambda value: isinstance(value, str),
    "whole numbers": lambda value: type(value) is int,
    "Python code": _is_python,
    "lists of Python code": lambda value: isinstance(value, list) and value != [] and all(map(_is_python, value)),
}


def checked(stored: DatasetDict, columns: Mapping[str, str], splits: Sequence[str] = ()) -> DatasetDict:
    """Returns a benchmark's rows as they are, once it is seen that they hold what they must.

    Args:
        stored: The rows.
        columns: What each column must hold: ``texts``, ``whole numbers``, ``Python code`` or ``lists of Python code``.
        splits: Those that must be there.

    Raises:
        LoPAError: If they do not.
    """
    if missing := [split for split in splits if split not in stored]:
        raise LoPAError(f"no split {', '.join(missing)}; there are {', '.join(map(str, stored))}")
    for split, rows in stored.items():
        for column, kind in columns.items():
            check_columns(rows, [column], split)
            _check_column(rows, column, kind, split)
    return stored


def _check_column(rows: Dataset, column: str, kind: str, split: str) -> None:
    is_right = _KINDS[kind]
    if not all(map(is_right, rows[column][:])):
        raise ColumnError(column, f"must hold {kind}", lambda value: not is_right(value)).named(split, rows)


def halves(data: Dataset) -> DatasetDict:
    """Divides rows as the paper does: the first half to train on, the second to test."""
    from datasets import DatasetDict

    middle = len(data) // 2
    return DatasetDict({"train": data.select(range(middle)), "test": data.select(range(middle, len(data)))})

"""What is wrong with columns and rows, said with the rows' numbers in their file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from lopa_lightning.data.types import Dataset
from lopa_lightning.errors import LoPAError, shown

_MARKS = {";": '";"', "\t": r'"\t"', "|": '"|"', ",": '","'}  # that columns are parted by, as YAML has them


class ColumnError(Exception):
    """Values of a column cannot be used.

    Attributes:
        column: The column.
        fault: What is wrong, as in "is empty"; where it "must hold" something, the first value is shown.
        is_faulty: Returns whether a value has that fault.
    """

    def __init__(self, column: str, fault: str, is_faulty: Callable[[Any], bool]) -> None:
        super().__init__(column, fault)
        self.column, self.fault, self.is_faulty = column, fault, is_faulty

    def named(self, what: str, whole: Dataset) -> LoPAError:
        """Returns the error with the numbers of the first rows.

        Args:
            what: Name of the split, for messages.
            whole: All of it: of the rows at hand some may have been left out before.
        """
        values = whole[self.column][:]
        rows = [row for row, value in enumerate(values) if self.is_faulty(value)]
        but = f", got {shown(values[rows[0]])}" if self.fault.startswith("must hold") else ""
        return LoPAError(f"{what}: column {self.column!r} {self.fault}{but} in {row_names(rows)}")


class RowError(Exception):
    """A row cannot be used.

    Attributes:
        row: Its values, by column.
        fault: What is wrong.
    """

    def __init__(self, row: Mapping[str, Any], fault: str) -> None:
        super().__init__(fault)
        self.row, self.fault = dict(row), fault

    def named(self, what: str, whole: Dataset) -> LoPAError:
        """Returns the error with the row's number.

        Args:
            what: Name of the split, for messages.
            whole: All of it: of the rows at hand some may have been left out before.
        """
        return LoPAError(f"{what}: {row_names([self.position(whole)])}: {self.fault}")

    def position(self, whole: Dataset) -> int:
        """Returns the row's position in a split, counted from 0."""
        rows = whole.select_columns(list(self.row))
        return next(position for position, row in enumerate(rows) if row == self.row)


def row_names(rows: Iterable[int]) -> str:
    """Returns the first few of rows as a person counts them in a file: without its header, the first is 1.

    Args:
        rows: Their positions, counted from 0.

    Example:
        >>> row_names([0, 6])
        'row 1, 7 (counted from 1)'
    """
    numbers = [str(row + 1) for row in rows]
    return f"row {', '.join(numbers[:5])}{' ...' if len(numbers) > 5 else ''} (counted from 1)"


def is_empty(cell: Any) -> bool:
    """Returns whether a cell is missing, an empty list, or has white space alone."""
    return cell is None or cell == [] or (isinstance(cell, str) and not cell.strip())


def check_columns(data: Dataset, names: Sequence[str], what: str, kind: str = "") -> None:
    """Refuses rows without a column.

    Args:
        data: The rows.
        names: Of the columns.
        what: Name of the split, for messages.
        kind: What the columns are to hold, as in " with labels".

    Raises:
        LoPAError: If there is no such column.
    """
    if missing := [name for name in names if name not in data.column_names]:
        there = data.column_names
        advice = ""
        if len(there) == 1 and (mark := next((mark for mark in _MARKS if mark in there[0]), None)):
            advice = f"; of a file whose columns are parted otherwise, set reader: {{sep: {_MARKS[mark]}}}"
        named = f"{missing[0]!r}{kind}" if kind else ", ".join(missing)
        raise LoPAError(f"{what}: no column {named}; there are {', '.join(there)}{advice}")


def whole_rows(data: Dataset, columns: Sequence[str], what: str, list_column: str | None = None) -> list[int] | None:
    """Returns the rows without an empty cell, and says how many have one; None where all are whole.

    Args:
        data: The rows.
        columns: In which a cell must not be empty.
        what: Name of the split, for messages.
        list_column: The one of them in which an empty list is no empty cell.

    Raises:
        LoPAError: If there is no such column, or no whole row.
    """
    check_columns(data, columns, what)
    empty: set[int] = set()
    for name in columns:
        cells = enumerate(data[name][:])
        empty |= {row for row, cell in cells if is_empty(cell) and not (cell == [] and name == list_column)}
    kept = [row for row in range(len(data)) if row not in empty]
    if dropped := len(data) - len(kept):
        rank_zero_warn(f"{what}: {dropped} of {len(data)} rows were dropped: they have an empty cell")
    if not kept:
        raise LoPAError(f"{what}: each of the {len(data)} rows has an empty cell")
    return kept if dropped else None


def some(values: Sequence[Any]) -> str:
    """Returns the first few of many values, for a message."""
    return ", ".join(repr(value) for value in list(values)[:5]) + (" ..." if len(values) > 5 else "")

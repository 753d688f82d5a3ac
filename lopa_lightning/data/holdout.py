"""Rows that are held out for validation, and rows that stand in training as well."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray

from lopa_lightning.data.columns import is_empty
from lopa_lightning.data.types import Dataset
from lopa_lightning.errors import shown

Rows = NDArray[np.int64]

_AT_ONCE = 10_000  # rows that are in memory


def held_out(count: int, share: float, seed: int, classes: Sequence[Any] | None = None) -> tuple[Rows, Rows]:
    """Divides rows into those to train on and those to validate on, at random.

    Args:
        count: Number of rows, at least 2.
        share: Of them that is held out, rounded up, but never all.
        seed: Of the draw.
        classes: Each row's class: each is held out by its share, one row at least of a class of two or more as far as
            there is room, and all of it only where the others do not suffice. None to draw from all rows alike.

    Returns:
        The rows of both, in the order drawn.
    """
    drawn = np.random.default_rng(seed).permutation(count)
    wanted = min(math.ceil(share * count), count - 1)
    if classes is None:
        return drawn[wanted:], drawn[:wanted]
    _, class_of, sizes = np.unique(np.array(list(map(str, classes))), return_inverse=True, return_counts=True)
    exact = share * sizes
    taken = np.minimum(np.floor(exact), sizes - 1).astype(np.int64)
    # Classes without a row come first, then those that lost most by rounding.
    order = np.lexsort((taken - exact, taken > 0))
    for most in (sizes - 1, sizes):
        for index in [*order, *order]:
            taken[index] += int(taken.sum() < wanted and taken[index] < most[index])
    # The first rows of each class, in the order drawn.
    rank = np.empty(count, np.int64)
    for index in range(len(sizes)):
        members = np.flatnonzero(class_of[drawn] == index)
        rank[members] = np.arange(len(members))
    is_held_out = rank < taken[class_of[drawn]]
    return drawn[~is_held_out], drawn[is_held_out]


def warn_of_duplicates(training: Dataset, other: Dataset, columns: Sequence[str], what: str) -> None:
    """Warns of examples that stand in the training data, too.

    Args:
        training: The training data.
        other: What is validated or tested on.
        columns: What is compared.
        what: The set's name.
    """
    if not columns or not {*columns} <= {*training.column_names} & {*other.column_names}:
        return
    keys = list(_keys(other, columns))
    common = set(keys).intersection(_keys(training, columns)) - {None}
    if found := [row for row, key in enumerate(keys) if key in common]:
        example = ", ".join(shown(other[found[0]][name]) for name in columns)
        count = f"{len(found)} of {len(other)} examples"
        rank_zero_warn(f"{what}: {count} are in the training data, too, such as {example}")


def _keys(data: Dataset, columns: Sequence[str]) -> Iterator[int | None]:
    """Yields a hash of each row, which is the same within a process; None of a row with an empty cell."""
    for rows in data.select_columns(list(columns)).iter(_AT_ONCE):
        for values in zip(*(rows[name] for name in columns)):
            yield None if any(map(is_empty, values)) else hash(repr(values))

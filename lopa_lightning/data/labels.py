"""Labels: their names in a config, and their values in a column."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lopa_lightning.errors import LoPAError, listed, shown

if TYPE_CHECKING:
    from datasets import Dataset

LabelLookup = tuple[str, dict[Any, int | float]]
"""The label column, and what each value in it means: an index or a number."""


def label_names(argument: str, values: Sequence[Any]) -> list[str]:
    """Returns labels of a config as names.

    Raises:
        LoPAError: If they are no list, or one is no name and no number.
    """
    for value in listed(argument, values):
        if not isinstance(value, (str, int, float)):
            raise LoPAError(f"{argument} must be names or numbers, got {value!r}")
    return [_spelled(value) for value in values]


def values_of_labels(names: Sequence[str], values: Sequence[Any] | None) -> list[str]:
    """Returns what stands in the label column for each label: by default its name.

    Raises:
        LoPAError: If there is not one value for each label.
    """
    if values is None:
        return list(names)
    spelled = label_names("label_values", values)
    if len(spelled) != len(names) or len(set(spelled)) < len(spelled):
        raise LoPAError(f"there must be one label value for each label, got {list(values)} for {list(names)}")
    return spelled


def unique_labels(data: Dataset, column: str, what: str, several: bool = False) -> list[Any]:
    """Returns the values of a label column, each once.

    Args:
        data: The split.
        column: With the labels.
        what: The split's name, for messages.
        several: Whether a row has a list of labels.

    Raises:
        LoPAError: If there is no such column, or a row has several labels where one is wanted, or one for several, or
            some other structure.
    """
    if column not in data.column_names:
        raise LoPAError(f"{what}: no column {column!r} with labels; there are {', '.join(data.column_names)}")
    values: list[Any] = data.select_columns([column])[column][:]
    wanted = "a list of labels in each row" if several else "one label in each row (multi_label: true takes lists)"
    for value in values:
        inner = value if several and isinstance(value, list) else [value]
        if several is not isinstance(value, list) or any(isinstance(label, (list, dict)) for label in inner):
            raise LoPAError(f"{what}: column {column!r} must hold {wanted}, got {shown(value)}")
    return list(dict.fromkeys([label for row in values for label in row] if several else values))


def class_lookup(data: Dataset, column: str, known: Sequence[str], what: str, several: bool = False) -> LabelLookup:
    """Returns the label column, and the index of each value in it.

    Args:
        data: The split.
        column: With the labels.
        known: What may stand there, in the order of the indices.
        what: The split's name, for messages.
        several: Whether a row has a list of labels.

    Raises:
        LoPAError: If there is a label that must not be there.
    """
    values = unique_labels(data, column, what, several)
    index = {name: number for number, name in enumerate(known)}
    feature = data.features[column].feature if several else data.features[column]
    names = {value: _class_name(feature, value) for value in values}
    if unknown := sorted({name for name in names.values() if name not in index}):
        allowed = ", ".join(map(repr, known))
        raise LoPAError(f"{what}: column {column!r} has labels {some(unknown)} beside the allowed {allowed}")
    return column, {value: index[name] for value, name in names.items()}


def encoded_labels(values: Sequence[Any], lookup: dict[Any, int | float], several: int) -> list[Any]:
    """Returns rows' labels as indices or numbers.

    Args:
        values: Of the label column.
        lookup: What each means.
        several: Number of labels where a row has a list of them, which becomes 0s and 1s; 0 where it has one.
    """
    if not several:
        return [lookup[value] for value in values]
    chosen = [{lookup[value] for value in row} for row in values]
    return [[int(index in row) for index in range(several)] for row in chosen]


def drawn_per_label(
    data: Dataset, found: LabelLookup, names: Sequence[str], count: int, seed: int
) -> list[NDArray[np.int64]]:
    """Draws so many examples of each label.

    Args:
        data: The split.
        found: Its label column, and the index of each value in it.
        names: Of the labels, by index.
        count: Of examples of each label.
        seed: Of the draws.

    Returns:
        Rows of each label.

    Raises:
        LoPAError: If a label has fewer.
    """
    column, lookup = found
    labels = np.array([lookup[value] for value in data.select_columns([column])[column][:]])
    random, chosen = np.random.default_rng(seed), []
    for index, label in enumerate(names):
        rows = np.flatnonzero(labels == index)
        if len(rows) < count:
            raise LoPAError(f"shots_per_label asks for {count} of {label!r}, there are {len(rows)}")
        chosen.append(random.permutation(rows)[:count])
    return chosen


def some(values: Sequence[Any]) -> str:
    """Returns the first few of many values, for a message."""
    return ", ".join(repr(value) for value in list(values)[:5]) + (" ..." if len(values) > 5 else "")


def _class_name(feature: Any, value: Any) -> str:
    from datasets import ClassLabel

    if isinstance(feature, ClassLabel) and value is not None and 0 <= value < len(feature.names):
        return str(feature.names[value])
    return _spelled(value)


def _spelled(value: Any) -> str:
    """Returns a label as a config and a column both spell it: 1 and 1.0 are the same, true and True too."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return "a missing label" if value is None else str(value)

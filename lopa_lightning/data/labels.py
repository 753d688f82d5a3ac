"""Labels: their names in a config, and their values in a column."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lopa_lightning.data.columns import ColumnError, check_columns, some
from lopa_lightning.data.types import Dataset
from lopa_lightning.errors import LoPAError, at_least, listed

if TYPE_CHECKING:
    from lopa_lightning.data.splits import SplitsDataModule

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


def names_in_data(data: SplitsDataModule, column: str, several: bool) -> list[str] | None:
    """Returns the names that the data itself has for the classes in a column, such as the folders of an image folder.

    Args:
        data: The data module.
        column: With the labels.
        several: Whether a row has a list of labels.

    Returns:
        None to predict where nothing names them: the model knows them.

    Raises:
        LoPAError: If nothing names them.
    """
    from datasets import ClassLabel, List

    splits = data.raw()
    for split in splits.values():
        feature = split.features.get(column)
        feature = feature.feature if several and isinstance(feature, List) else feature
        if isinstance(feature, ClassLabel):
            return list(feature.names)
    if data.trainer is not None and data.trainer.state.fn == "predict":
        return None
    raise LoPAError(
        f"labels must name the classes: nothing in the data names those of column {column!r}; there are columns "
        f"{', '.join(next(iter(splits.values())).column_names)}"
    )


def check_shots(shots_per_label: int | None, max_train_examples: int | None, one_each: bool) -> None:
    """Refuses a number of examples of each label that cannot be, or not beside other options.

    Args:
        shots_per_label: The number; None for no such draw.
        max_train_examples: Most examples in all.
        one_each: Whether each row has one class.

    Raises:
        LoPAError: If it cannot be.
    """
    at_least(1, shots_per_label=shots_per_label)
    if shots_per_label is not None and max_train_examples is not None:
        raise LoPAError("give max_train_examples or shots_per_label, not both")
    if shots_per_label is not None and not one_each:
        raise LoPAError("shots_per_label needs rows with one label each")


def values_of_labels(names: Sequence[str] | None, values: Sequence[Any] | None) -> list[str] | None:
    """Returns what stands in the label column for each label: by default its name; None where no names are given.

    Raises:
        LoPAError: If there is not one value for each label.
    """
    if values is None:
        return None if names is None else list(names)
    if names is None:
        raise LoPAError("label_values needs labels, which they stand for")
    spelled = label_names("label_values", values)
    if len(spelled) != len(names) or len(set(spelled)) < len(spelled):
        raise LoPAError(f"there must be one label value for each label, got {list(values)} for {list(names)}")
    return spelled


def unique_labels(data: Dataset, column: str, what: str, several: bool = False, may_miss: bool = False) -> list[Any]:
    """Returns the values of a label column, each once.

    Args:
        data: The split.
        column: With the labels.
        what: The split's name, for messages.
        several: Whether a row has a list of labels.
        may_miss: Whether a row may have none, which is not returned.

    Raises:
        LoPAError: If there is no such column.
        ColumnError: If a row has several labels where one is wanted, or one for several, or some other structure.
    """
    check_columns(data, [column], what, " with labels")
    values: list[Any] = [
        value for value in data.select_columns([column])[column][:] if value is not None or not may_miss
    ]

    def is_faulty(value: Any) -> bool:
        inner = value if several and isinstance(value, list) else [value]
        return several is not isinstance(value, list) or any(isinstance(label, (list, dict)) for label in inner)

    if any(map(is_faulty, values)):
        wanted = "a list of labels in each row" if several else "one label in each row (multi_label: true takes lists)"
        raise ColumnError(column, f"must hold {wanted}", is_faulty)
    return list(dict.fromkeys([label for row in values for label in row] if several else values))


def class_lookup(
    data: Dataset, column: str, known: Sequence[str], what: str, several: bool = False, may_miss: bool = False
) -> LabelLookup:
    """Returns the label column, and the index of each value in it.

    Args:
        data: The split.
        column: With the labels.
        known: What may stand there, in the order of the indices.
        what: The split's name, for messages.
        several: Whether a row has a list of labels.
        may_miss: Whether a row may have none.

    Raises:
        ColumnError: If there is a label that must not be there.
    """
    values = unique_labels(data, column, what, several, may_miss)
    index = {name: number for number, name in enumerate(known)}
    feature = data.features[column].feature if several else data.features[column]
    names = {value: _class_name(feature, value) for value in values}
    if unknown := sorted({name for name in names.values() if name not in index}):
        wrong = {value for value, name in names.items() if name not in index}
        allowed = ", ".join(map(repr, known))
        raise ColumnError(
            column,
            f"has labels {some(unknown)} beside the allowed {allowed}",
            lambda value: bool(wrong & set(value)) if several else value in wrong,
        )
    none = {None: -1} if may_miss else {}
    return column, {**none, **{value: index[name] for value, name in names.items()}}


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


def drawn_per_label(data: Dataset, found: LabelLookup, names: Sequence[str], count: int, seed: int) -> Dataset:
    """Draws so many examples of each label, in their order.

    Args:
        data: The split.
        found: Its label column, and the index of each value in it.
        names: Of the labels, by index.
        count: Of examples of each label.
        seed: Of the draws.

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
    drawn: Dataset = data.select(np.sort(np.concatenate(chosen)))
    return drawn


def label_of(feature: Any, value: Any) -> Any:
    """Returns the label, or the list of labels, that a row of a data set has, as a config spells it.

    Args:
        feature: Of the label column.
        value: In that column.

    Returns:
        None where there is none, such as the -1 of a test set.
    """
    if isinstance(value, list):
        return [label_of(feature.feature, each) for each in value]
    value = named_class(feature, value)
    return None if value is None else _spelled(value)


def named_class(feature: Any, value: Any) -> Any:
    """Returns the name of a class of a data set on the hub, None for its -1; any other value as it is."""
    from datasets import ClassLabel

    if not isinstance(feature, ClassLabel):
        return value
    return None if value is None or value < 0 else _class_name(feature, value)


def number_lookup(data: Dataset, column: str, what: str, may_miss: bool = False) -> LabelLookup:
    """Returns the label column, and the number that each value in it is.

    Args:
        data: The split.
        column: With numbers.
        what: The split's name, for messages.
        may_miss: Whether a row may have none.

    Raises:
        ColumnError: If one is no number, or not finite.
    """

    def is_faulty(value: Any) -> bool:
        try:
            return not np.isfinite(float(value))
        except (TypeError, ValueError):
            return value is not None or not may_miss

    values = unique_labels(data, column, what, may_miss=may_miss)
    if any(map(is_faulty, values)):
        raise ColumnError(column, "must hold numbers", is_faulty)
    return column, {**({None: 0.0} if may_miss else {}), **{value: float(value) for value in values}}


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

"""A user's own texts and labels: CSV, JSON lines, Parquet, or a data set on the hub."""

from __future__ import annotations

import functools
import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetsError
from numpy.typing import NDArray

from lopa_lightning.data.base import LabelLookup, Role, TextDataModule
from lopa_lightning.data.template import Template, plain_template
from lopa_lightning.errors import LoPAError
from lopa_lightning.task import TextTask

_READERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


class TextClassificationDataModule(TextDataModule):
    """Texts with a class or a number each.

    Args:
        path: Hub id, or a folder in the layout of a hub data set; None if ``data_files`` says all.
        name: Config of the data set.
        revision: Branch, tag or commit on the hub.
        data_files: Split name to file or files, such as ``{train: train.csv, validation: dev.csv}``.
        text_columns: Columns with the text; two are read as a pair.
        label_column: Column with the label.
        labels: Names of the classes, in the order of their indices; ``[]`` for regression.
        label_values: What stands in the label column for each label, where that is not its name.
        words: The verbalizer, one word for each label, for the objectives that answer with words.
        template: Text with ``{column}`` fields and ``{mask}``, one piece or two; by default the columns alone.
        causal_template: Its wording for causal LMs.
        metrics: Official metrics, whose mean is the score.
        splits: Role (``train``, ``val``, ``test``, ``predict``) to the split that serves it. By default
            ``train``, ``validation``, ``test`` and again ``test``.
        validation_fraction: Share of the training split to validate on, where there is no validation split.
        max_train_examples: Train on at most that many examples, drawn at random.
        shots_per_label: Train on that many examples of each label, drawn at random.
        subset_seed: Of these draws.
        validation_from_train: Share of the training examples (after these draws) that is validated on in place
            of the validation split: to choose settings without a look at the split that is reported.
        **kwargs: See :class:`~lopa_lightning.data.base.TextDataModule`.

    Raises:
        LoPAError: If arguments contradict each other.
    """

    def __init__(
        self,
        path: str | None = None,
        name: str | None = None,
        revision: str | None = None,
        data_files: dict[str, str | list[str]] | None = None,
        text_columns: Sequence[str] = ("text",),
        label_column: str = "label",
        labels: Sequence[str | int | bool] | None = None,
        label_values: Sequence[str | int | bool] | None = None,
        words: Sequence[str] | None = None,
        template: Sequence[str] | None = None,
        causal_template: str | None = None,
        metrics: Sequence[str] | None = None,
        splits: dict[str, str] | None = None,
        validation_fraction: float = 0.1,
        max_train_examples: int | None = None,
        shots_per_label: int | None = None,
        subset_seed: int = 0,
        validation_from_train: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if (path is None) == (data_files is None):
            raise LoPAError(f"give either path or data_files, got path={path!r} and data_files={data_files!r}")
        if labels is None:
            raise LoPAError("labels must name the classes, as they stand in the label column; [] for regression")
        _check_subset(max_train_examples, shots_per_label, bool(labels))
        if not 0 < validation_fraction < 1:
            raise LoPAError(f"validation_fraction must be between 0 and 1, got {validation_fraction}")
        if not 0 <= validation_from_train < 1:
            raise LoPAError(f"validation_from_train must be a share below 1, got {validation_from_train}")
        if label_values is not None and (len(label_values) != len(labels) or len(set(label_values)) < len(labels)):
            raise LoPAError(
                f"there must be one label value for each label, got {list(label_values)} for {list(labels)}"
            )
        roles = {"train": "train", "val": "validation", "test": "test", "predict": "test"}
        if unknown := set(splits or {}) - set(roles):
            raise LoPAError(f"splits names {', '.join(sorted(unknown))}; the roles are {', '.join(roles)}")
        self.path, self.config_name, self.revision, self.data_files = path, name, revision, data_files
        self.label_column = label_column
        self.label_values = [_written(value) for value in (label_values if label_values is not None else labels)]
        self.template = Template(tuple(template)) if template is not None else plain_template(list(text_columns))
        self.causal_template = Template((causal_template,)) if causal_template is not None else None
        self.task = TextTask(
            labels=[_written(label) for label in labels],
            words=None if words is None else list(words),
            metrics=None if metrics is None else list(metrics),
            template=list(self.template.pieces),
            causal_template=causal_template,
        )
        self.splits = {**roles, **(splits or {})}
        self.named_splits = set(splits or {})
        self.validation_fraction = validation_fraction
        self.validation_from_train = validation_from_train
        self.max_train_examples, self.shots_per_label, self.subset_seed = (
            max_train_examples,
            shots_per_label,
            subset_seed,
        )

    def raw(self) -> DatasetDict:
        """All splits as they are stored.

        Raises:
            LoPAError: If the data is not found or cannot be read.
        """
        return self._raw

    @functools.cached_property
    def _raw(self) -> DatasetDict:
        if self.data_files is None:
            what: Any = self.path
            arguments: dict[str, Any] = {"path": self.path, "name": self.config_name, "revision": self.revision}
        else:
            what = self.data_files
            arguments = _reader_of(self.data_files)
        try:
            loaded = load_dataset(**arguments)
        except (OSError, ValueError, StopIteration, DatasetsError) as error:
            reason = str(error.__cause__ or error).strip() or "it is empty"
            raise LoPAError(f"no data found for {what!r}: {reason.splitlines()[0]}") from error
        assert isinstance(loaded, DatasetDict)
        return loaded

    def splits_of(self, role: Role) -> list[str]:
        """The split of that role; ``train`` again for a validation set that must be cut from it."""
        if role == "val" and self.validation_from_train:
            role = "train"
        split = self.splits[role]
        if split in self.raw():
            return [split]
        if role == "val" and role not in self.named_splits:
            return [self.splits["train"]]
        raise LoPAError(f"no split {split!r} for {role}; there are {', '.join(map(str, self.raw()))}")

    def load_split(self, split: str, role: Role) -> Dataset:
        """Loads a split; of the training split the part that was asked for."""
        data: Dataset = self.raw()[split]
        if role not in ("train", "val"):
            return data
        if self.validation_from_train:
            return self._part(self._training_subset(data), split, role, self.validation_from_train)
        if self.splits_of("val") == [self.splits["train"]]:
            data = self._part(data, split, role, self.validation_fraction)
        return self._training_subset(data) if role == "train" else data

    def _part(self, data: Dataset, split: str, role: Role, validation_share: float) -> Dataset:
        if len(data) < 2:
            raise LoPAError(f"{split}: {len(data)} example is too few to cut a validation split from")
        parts = data.train_test_split(test_size=validation_share, seed=self.subset_seed)
        part: Dataset = parts["train" if role == "train" else "test"]
        return part

    def label_lookup(self, data: Dataset, what: str) -> LabelLookup:
        """From what stands in the label column to index or number."""
        assert self.task is not None
        column = self.label_column
        if column not in data.column_names:
            raise LoPAError(f"{what}: no column {column!r} with labels; there are {', '.join(data.column_names)}")
        values = data.unique(column)
        if self.task.is_regression:
            try:
                numbers = {value: float(value) for value in values}
            except (TypeError, ValueError):
                numbers = {}
            if not numbers or not np.isfinite(list(numbers.values())).all():
                raise LoPAError(f"{what}: column {column!r} must hold numbers, got {_some(values)}")
            return column, numbers
        known = {value: index for index, value in enumerate(self.label_values)}
        shown = {value: _class_name(data.features[column], value) for value in values}
        if unknown := sorted({name for name in shown.values() if name not in known}):
            allowed = ", ".join(map(repr, known))
            raise LoPAError(f"{what}: column {column!r} has labels {_some(unknown)} beside the allowed {allowed}")
        return column, {value: known[name] for value, name in shown.items()}

    def _training_subset(self, data: Dataset) -> Dataset:
        random = np.random.default_rng(self.subset_seed)
        if self.max_train_examples is not None:
            chosen = [random.permutation(len(data))[: self.max_train_examples]]
            return _select(data, chosen)
        if self.shots_per_label is None:
            return data
        assert self.task is not None
        column, lookup = self.label_lookup(data, "train")
        labels = np.array([lookup[value] for value in data[column]])
        chosen = []
        for index, label in enumerate(self.task.labels):
            rows = np.flatnonzero(labels == index)
            if len(rows) < self.shots_per_label:
                raise LoPAError(f"shots_per_label asks for {self.shots_per_label} of {label!r}, there are {len(rows)}")
            chosen.append(random.permutation(rows)[: self.shots_per_label])
        return _select(data, chosen)


def _check_subset(max_train_examples: int | None, shots_per_label: int | None, has_labels: bool) -> None:
    if max_train_examples is not None and shots_per_label is not None:
        raise LoPAError("give max_train_examples or shots_per_label, not both")
    for option, value in {"max_train_examples": max_train_examples, "shots_per_label": shots_per_label}.items():
        if value is not None and value < 1:
            raise LoPAError(f"{option} must be at least 1, got {value}")
    if shots_per_label is not None and not has_labels:
        raise LoPAError("shots_per_label needs labels; regression has none")


def _select(data: Dataset, rows: list[NDArray[np.int64]]) -> Dataset:
    chosen: Dataset = data.select(np.sort(np.concatenate(rows)))
    return chosen


def _class_name(feature: Any, value: Any) -> str:
    if isinstance(feature, ClassLabel) and value is not None and 0 <= value < len(feature.names):
        return str(feature.names[value])
    return _written(value)


def _written(value: Any) -> str:
    """A label as a config and a column both write it: 1 and 1.0 are the same, true and True too."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return "a missing label" if value is None else str(value)


def _some(values: Sequence[Any]) -> str:
    return ", ".join(repr(value) for value in list(values)[:5]) + (" ..." if len(values) > 5 else "")


def _reader_of(data_files: dict[str, str | list[str]]) -> dict[str, Any]:
    """Arguments of ``load_dataset`` for files, by their endings.

    Raises:
        LoPAError: If a file is not there, or endings are unknown or mixed.
    """
    files = [file for entry in data_files.values() for file in ([entry] if isinstance(entry, str) else entry)]
    if missing := [file for file in files if "://" not in file and not glob.glob(file)]:
        raise LoPAError(f"no such file: {', '.join(missing)}")
    endings = {Path(file).suffix for file in files}
    readers = {_READERS.get(ending) for ending in endings}
    if len(readers) != 1 or None in readers or {".csv", ".tsv"} <= endings:
        raise LoPAError(f"data_files must all be of one of {', '.join(_READERS)}; got {', '.join(sorted(endings))}")
    options: dict[str, Any] = {"sep": "\t"} if endings == {".tsv"} else {}
    if readers == {"csv"}:  # a text may well be "None" or "NA"; only an empty cell is missing
        options |= {"keep_default_na": False, "na_values": [""]}
    return {"path": readers.pop(), "data_files": data_files, **options}

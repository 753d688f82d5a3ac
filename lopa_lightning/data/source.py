"""Rows of a user's own: CSV, JSON lines, Parquet, or a data set on the hub, and which of them serve what."""

from __future__ import annotations

import functools
import glob
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lopa_lightning.data.base import Role, TextDataModule
from lopa_lightning.errors import LoPAError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

_READERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


class SourceDataModule(TextDataModule):
    """Rows from files or the hub, with splits and subsets.

    Args:
        path: Hub id, or a folder in the layout of a hub data set; None if ``data_files`` says all.
        name: Config of the data set.
        revision: Branch, tag or commit on the hub.
        data_files: Split name to file or files, such as ``{train: train.csv, validation: dev.csv}``.
        splits: Role (``train``, ``val``, ``test``, ``predict``) to the split that serves it. By default
            ``train``, ``validation``, ``test`` and again ``test``.
        validation_fraction: Share of the training split to validate on, where there is no validation split.
        max_train_examples: Train on at most that many examples, drawn at random.
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
        splits: dict[str, str] | None = None,
        validation_fraction: float = 0.1,
        max_train_examples: int | None = None,
        subset_seed: int = 0,
        validation_from_train: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if (path is None) == (data_files is None):
            raise LoPAError(f"give either path or data_files, got path={path!r} and data_files={data_files!r}")
        if max_train_examples is not None and max_train_examples < 1:
            raise LoPAError(f"max_train_examples must be at least 1, got {max_train_examples}")
        if not 0 < validation_fraction < 1:
            raise LoPAError(f"validation_fraction must be between 0 and 1, got {validation_fraction}")
        if not 0 <= validation_from_train < 1:
            raise LoPAError(f"validation_from_train must be a share below 1, got {validation_from_train}")
        roles = {"train": "train", "val": "validation", "test": "test", "predict": "test"}
        if unknown := set(splits or {}) - set(roles):
            raise LoPAError(f"splits names {', '.join(sorted(unknown))}; the roles are {', '.join(roles)}")
        self.path, self.config_name, self.revision, self.data_files = path, name, revision, data_files
        self.splits = {**roles, **(splits or {})}
        self.named_splits = set(splits or {})
        self.validation_fraction = validation_fraction
        self.validation_from_train = validation_from_train
        self.max_train_examples, self.subset_seed = max_train_examples, subset_seed

    def raw(self) -> DatasetDict:
        """All splits as they are stored.

        Raises:
            LoPAError: If the data is not found or cannot be read.
        """
        return self._raw

    @functools.cached_property
    def _raw(self) -> DatasetDict:
        return self._stored()

    def _stored(self) -> DatasetDict:
        from datasets import DatasetDict, load_dataset
        from datasets.exceptions import DatasetsError

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

    def _training_subset(self, data: Dataset) -> Dataset:
        if self.max_train_examples is None:
            return data
        random = np.random.default_rng(self.subset_seed)
        return select(data, [random.permutation(len(data))[: self.max_train_examples]])


def select(data: Dataset, rows: list[NDArray[np.int64]]) -> Dataset:
    """The rows of a data set, in their order, from groups of indices."""
    chosen: Dataset = data.select(np.sort(np.concatenate(rows)))
    return chosen


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

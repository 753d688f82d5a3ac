"""Rows of a user's own: CSV, JSON lines, Parquet, or a data set on the hub, and which of them serve what."""

from __future__ import annotations

import csv
import functools
import glob
import gzip
import itertools
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lopa_lightning.data.base import Role, TextDataModule
from lopa_lightning.errors import LoPAError, one_line

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

_CHUNK = 2**20  # characters
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
        if subset_seed < 0:
            raise LoPAError(f"subset_seed must be at least 0, got {subset_seed}")
        if unknown := set(splits or {}) - set(roles):
            raise LoPAError(f"splits names {', '.join(sorted(unknown))}; the roles are {', '.join(roles)}")
        self.path, self.config_name, self.revision, self.data_files = path, name, revision, data_files
        self.splits = {**roles, **(splits or {})}
        self.named_splits = set(splits or {})
        self.validation_fraction = validation_fraction
        self.validation_from_train = validation_from_train
        self.max_train_examples, self.subset_seed = max_train_examples, subset_seed

    @property
    def text_columns(self) -> Sequence[str]:
        """Columns of text, which are read from CSV as they are written there: ``007`` is no number."""
        return self.template.columns

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
        from datasets import DatasetDict, load_dataset_builder

        if self.data_files is None:
            what, path = repr(self.path), os.path.expanduser(str(self.path))
            if (is_there := os.path.exists(path)) and not os.path.isdir(path):
                raise LoPAError(f"path {path!r} is a file; name it in data_files, such as {{train: {path}}}")
            arguments: dict[str, Any] = {"path": path, "name": self.config_name, "revision": self.revision}
        else:
            what, is_there = repr(self.data_files), True
            arguments = _reader_of(self.data_files, self.text_columns)
        try:
            if is_there and self.data_files is None:
                arguments |= _escaped(path, self.config_name)
            builder = load_dataset_builder(**arguments)
            _check_texts(builder.config)
            builder.download_and_prepare()
            loaded = builder.as_dataset()
        except LoPAError:
            raise
        except Exception as error:  # pandas, pyarrow and datasets raise whatever a foreign file makes them stumble over
            cause = error.__cause__ or error
            reason = "it has no rows" if isinstance(cause, StopIteration) else one_line(cause)
            problem = f"the data in {what} cannot be read" if is_there else f"no data found for {what}"
            raise LoPAError(f"{problem}: {reason}") from error
        assert isinstance(loaded, DatasetDict)
        if any("__index_level_0__" in names for names in loaded.column_names.values()):
            raise LoPAError(f"the data in {what} cannot be read: a row has more cells than the header")
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


def _escaped(folder: str, name: str | None) -> dict[str, Any]:
    """Returns what ``load_dataset_builder`` needs beside a folder whose path it would take for a pattern.

    Raises:
        LoPAError: If the folder has configs, and not that one.
    """
    from datasets.data_files import get_data_patterns, sanitize_patterns
    from datasets.info import DatasetInfosDict
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard

    root = glob.escape(os.path.realpath(folder))
    if root == os.path.realpath(folder):
        return {}
    card = os.path.join(folder, "README.md")
    said = DatasetCard.load(card).data if os.path.exists(card) else {}
    configs = MetadataConfigs.from_dataset_card_data(said)
    name = name or (configs.get_default_config_name() if configs else "default")
    if configs and name not in configs:
        raise LoPAError(f"path {folder!r}: name must be one of {', '.join(configs)}, got {name}")
    config, info = configs.get(name, {}), DatasetInfosDict.from_dataset_card_data(said).get(name)
    root = os.path.join(root, config.get("data_dir") or "")
    patterns = sanitize_patterns(config["data_files"]) if "data_files" in config else get_data_patterns(root)
    files = {split: [os.path.join(root, pattern) for pattern in parts] for split, parts in patterns.items()}
    return {"data_files": files, "features": info.features if info is not None else None}


def _named(data_files: Mapping[str, str | list[str]]) -> list[str]:
    return [file for entry in data_files.values() for file in ([entry] if isinstance(entry, str) else entry)]


def _pattern(file: str) -> str:
    """Returns an absolute pattern, ``~`` expanded. A file or folder that is there is meant, whatever its name."""
    if "://" in file:
        return file
    path = Path(os.path.abspath(os.path.expanduser(file)))
    there = next(part for part in (path, *path.parents) if os.path.exists(part))
    return os.path.normpath(os.path.join(glob.escape(str(there)), path.relative_to(there)))


def _is_found(file: str) -> bool:
    return "://" in file or any(map(os.path.isfile, glob.iglob(_pattern(file), recursive=True)))


def _reader_of(data_files: Mapping[str, str | list[str]], text_columns: Sequence[str]) -> dict[str, Any]:
    """Returns arguments of ``load_dataset`` for files, by their endings.

    Raises:
        LoPAError: If a file is not there, or endings are unknown or mixed.
    """
    files = _named(data_files)
    if missing := [file for file in files if not _is_found(file)]:
        raise LoPAError(f"no such file: {', '.join(missing)}")
    endings = {Path(file).suffix or file for file in files}
    readers = {_READERS.get(ending) for ending in endings}
    if len(readers) != 1 or None in readers or {".csv", ".tsv"} <= endings:
        got = ", ".join(sorted(endings)) or "none"
        raise LoPAError(f"data_files must all be of one of {', '.join(_READERS)}; got {got}")
    options: dict[str, Any] = {}
    if readers == {"csv"}:
        # A text may well be "None", "NA" or "007"; only an empty cell is missing.
        converters = dict.fromkeys(text_columns, _cell)
        separator = "\t" if endings == {".tsv"} else ","
        options = {"sep": separator, "keep_default_na": False, "na_values": [""], "converters": converters}
    patterns = {
        split: [_pattern(file) for file in ([entry] if isinstance(entry, str) else entry)]
        for split, entry in data_files.items()
    }
    return {"path": readers.pop(), "data_files": patterns, **options}


def _cell(written: str) -> str | None:
    return written or None


def _check_texts(config: Any) -> None:
    """Refuses files of CSV or JSON that would be read as something else than was written.

    Args:
        config: Of their reader: which files it reads, and how.
    """
    from datasets.packaged_modules.csv.csv import CsvConfig
    from datasets.packaged_modules.json.json import JsonConfig

    if not isinstance(config, CsvConfig | JsonConfig):
        return
    # A folder's README may say that there is no header.
    has_header = isinstance(config, CsvConfig) and config.header == "infer" and not (config.names or config.skiprows)
    # What of the hub lies in the cache alone names no files.
    for path in itertools.chain(*(config.data_files or {}).values()):
        if "://" not in path and Path(path.removesuffix(".gz")).suffix in _READERS:
            _check_text(path, config.encoding or "utf-8-sig", config.sep if has_header else None)


def _check_text(path: str, encoding: str, separator: str | None) -> None:
    """Refuses a file that is not text, or a CSV of that separator whose columns cannot be told apart."""
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding=encoding, newline="") as text:
            while chunk := text.read(_CHUNK):
                if "\0" in chunk:
                    raise LoPAError(f"the data in {path!r} cannot be read: it has NUL characters; save it in UTF-8")
            text.seek(0)
            names = next(csv.reader(text, delimiter=separator), []) if separator is not None else []
    except UnicodeDecodeError as error:
        fault = f"it has a byte {error.object[error.start]:#x} that is not {error.encoding.upper()}"
        raise LoPAError(f"the data in {path!r} cannot be read: {fault}") from error
    except (OSError, EOFError, LookupError, zlib.error, csv.Error) as error:
        raise LoPAError(f"the data in {path!r} cannot be read: {one_line(error)}") from error
    if repeated := sorted({name for name in names if names.count(name) > 1 and name}):
        raise LoPAError(f"the data in {path!r} has two columns of one name: {', '.join(repeated)}")

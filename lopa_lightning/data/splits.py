"""The LightningDataModule under all data: rows, splits, loaders. It knows no kind of input."""

from __future__ import annotations

import functools
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from lopa_lightning.backbones.base import InputSpec, ReadsInputs
from lopa_lightning.data.cache import cache_faults_named, check_cached
from lopa_lightning.data.collate import Rows
from lopa_lightning.data.columns import ColumnError, RowError
from lopa_lightning.data.holdout import held_out, warn_of_duplicates
from lopa_lightning.data.instance_vectors import StoredVectors, agrees_with, reads_all, stored_vectors
from lopa_lightning.data.labels import LabelLookup, drawn_per_label
from lopa_lightning.data.limits import check_batch_limits
from lopa_lightning.data.loader import ResumableLoader
from lopa_lightning.data.sampler import LengthGroupedSampler
from lopa_lightning.data.stored import read_rows
from lopa_lightning.data.types import Dataset, DatasetDict
from lopa_lightning.errors import LoPAError, at_least
from lopa_lightning.task import Side, Task

Role = Literal["train", "val", "test", "predict"]
Loader = DataLoader[dict[str, Any]]

ROLES: dict[str, list[Role]] = {"fit": ["train", "val"], "validate": ["val"], "test": ["test"], "predict": ["predict"]}


class SplitsDataModule(LightningDataModule, ABC):
    """Rows from files or the hub, with splits, subsets and batches.

    A kind of input is a subclass with :meth:`encode` and :meth:`collate`; a data set is a subclass of that, which may
    have its own :meth:`load` and :meth:`splits_of`. A module's ``input_spec`` says how inputs are encoded.

    Args:
        path: Hub id, or a folder in the layout of a hub data set; None if ``data_files`` says all.
        name: Config of the data set.
        revision: Branch, tag or commit on the hub.
        data_files: Split name to file or files, such as ``{train: train.csv, validation: dev.csv}``.
        splits: Role (``train``, ``val``, ``test``, ``predict``) to the split that serves it. By default
            ``train``, ``validation``, ``test``, and for ``predict`` the split of that name, or else again ``test``.
        validation_fraction: Share of the training split to validate on, where there is no validation split.
        max_train_examples: Train on at most that many examples, drawn at random.
        subset_seed: Of these draws.
        validation_from_train: Share of the training examples (after these draws) that is validated on in place
            of the validation set: to choose settings without a look at what is reported. Where that is itself a part
            of the training split, it is left out before, and neither trained on nor chosen by.
        batch_size: Examples in a training batch of one process.
        eval_batch_size: Most examples in a batch otherwise; by default twice as many.
        num_workers: Processes that load batches; by default none on a CPU, which they would take from the model,
            and two for each GPU.
        reader: How files are read, such as ``{sep: ";", encoding: latin-1}``; of CSV also ``quotechar``,
            ``escapechar``, ``skiprows`` and ``names``, of JSON ``field``.

    Raises:
        LoPAError: If arguments are out of range or contradict each other.
    """

    task: Task | None = None

    padding_side: Side = "right"
    """Where inputs of unlike lengths are padded."""

    shots_per_label: int | None = None
    """Train on that many examples of each label."""

    class_column: str | None = None
    """Column with the one class of each row, from all of which validation rows are drawn; None where there is none."""

    varies = False
    """Whether training examples look different in each epoch, so that batches are made by epoch."""

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
        batch_size: int = 16,
        eval_batch_size: int | None = None,
        num_workers: int | None = None,
        reader: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        at_least(1, batch_size=batch_size, eval_batch_size=eval_batch_size, max_train_examples=max_train_examples)
        at_least(0, num_workers=num_workers, subset_seed=subset_seed)
        reads_files = type(self).load is SplitsDataModule.load
        if (path is not None and data_files is not None) or (path is None and data_files is None and reads_files):
            raise LoPAError(f"give either path or data_files, got path={path!r} and data_files={data_files!r}")
        if data_files is not None and (name is not None or revision is not None):
            raise LoPAError(f"name and revision are of a path, not of data_files; got {name!r} and {revision!r}")
        if not 0 < validation_fraction < 1:
            raise LoPAError(f"validation_fraction must be between 0 and 1, got {validation_fraction}")
        if not 0 <= validation_from_train < 1:
            raise LoPAError(f"validation_from_train must be a share below 1, got {validation_from_train}")
        roles = {"train": "train", "val": "validation", "test": "test", "predict": "test"}
        self.named_splits = splits or {}
        if unknown := set(self.named_splits) - set(roles):
            raise LoPAError(f"splits names {', '.join(sorted(unknown))}; the roles are {', '.join(roles)}")
        self.path, self.config_name, self.revision = path, name, revision
        self.data_files, self.reader = data_files, reader
        self.splits = {**roles, **self.named_splits}
        self.validation_fraction, self.validation_from_train = validation_fraction, validation_from_train
        self.max_train_examples, self.subset_seed = max_train_examples, subset_seed
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size or 2 * batch_size
        self.num_workers = num_workers
        self.batch_tokens: int | None = None
        self.eval_batch_tokens: int | None = None
        self.input_spec: InputSpec | None = None
        self.datasets: dict[Role, list[Dataset]] = {}
        self.vectors: dict[str, StoredVectors] = {}

    @abstractmethod
    def encode(self, data: Dataset, split: str, role: Role) -> Dataset:
        """Encodes the rows of a split, for batches to be made of.

        Args:
            data: The rows.
            split: The split's name.
            role: What it serves.

        Returns:
            Columns of numbers: ``index``, the row's number; ``labels`` where there are any; the input; perhaps
            ``length``, its number of tokens.

        Raises:
            LoPAError: If a row is not what it must be.
            ColumnError: If values of a column are not.
            RowError: If a row is not.
        """

    @abstractmethod
    def collate(self) -> Callable[[Any], dict[str, Tensor]]:
        """Returns the function that makes a batch of encoded rows."""

    def load(self) -> DatasetDict:
        """Reads all splits, as they are stored.

        Raises:
            LoPAError: If the data is not found or cannot be read.
        """
        return read_rows(self.path, self.config_name, self.revision, self.data_files, self.string_columns, self.reader)

    @property
    def input_columns(self) -> Sequence[str]:
        """Columns of text that tell one example from another."""
        return []

    @property
    def string_columns(self) -> Sequence[str]:
        """Columns of text, which are read from CSV as they stand there: ``007`` stays a text."""
        return self.input_columns

    def splits_of(self, role: Role) -> list[str]:
        """Returns the splits that serve a role; several for several evaluation sets.

        That is one split; ``train`` again for a validation set that must be cut from it.

        Raises:
            LoPAError: If there is none, or another split has the name of a validation set.
        """
        if role == "val" and self.validation_from_train:
            role = "train"
        split = self.splits[role]
        if role == "predict" and role not in self.named_splits and role in self.raw():
            split = role
        if split in self.raw():
            return [split]
        if role == "val" and role not in self.named_splits:
            unread = {*map(str, self.raw())} - {*self.splits.values()}
            if alike := sorted(name for name in unread if re.match("val|dev|eval", name)):
                raise LoPAError(
                    f"no split {split!r}, and {', '.join(alike)} would not be read: say splits: {{val: {alike[0]}}}, "
                    f"or splits: {{val: {self.splits['train']}}} for a part of it"
                )
            return [self.splits["train"]]
        raise LoPAError(f"no split {split!r} for {role}; there are {', '.join(map(str, self.raw()))}")

    def submission(self, set_index: int, rows: list[dict[str, Any]]) -> tuple[str, str] | None:
        """Returns the name and content of the file that a benchmark's server takes; None where there is none.

        Args:
            set_index: Which of the sets to predict.
            rows: Predictions in the input's order.
        """
        return None

    def named(self, set_index: int, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Adds to predictions what tells a reader which examples they are of, beside their ``index``.

        Args:
            set_index: Which of the sets to predict.
            rows: Predictions in the input's order.
        """
        return rows

    def training_subset(self, data: Dataset) -> Dataset:
        """Draws the examples to train on, so many of each label or in all."""
        if self.shots_per_label is not None:
            assert self.task is not None
            found = self.label_lookup(data, "train")
            return drawn_per_label(data, found, self.task.labels, self.shots_per_label, self.subset_seed)
        if self.max_train_examples is None:
            return data
        random = np.random.default_rng(self.subset_seed)
        chosen: Dataset = data.select(np.sort(random.permutation(len(data))[: self.max_train_examples]))
        return chosen

    def label_lookup(self, data: Dataset, what: str) -> LabelLookup:
        """Returns the label column of a split, and the index or number of each value in it.

        Raises:
            LoPAError: If there is no such column.
            ColumnError: If there is a label that must not be there.
        """
        raise LoPAError(f"shots_per_label needs a label column, which {type(self).__name__} has not")

    def raw(self) -> DatasetDict:
        """Returns all splits as they are stored, read once."""
        return self._raw

    @functools.cached_property
    def _raw(self) -> DatasetDict:
        return self.load()

    def load_split(self, split: str, role: Role) -> Dataset:
        """Returns the rows of a split as they are used in a role: of the training split the part that was asked for."""
        data: Dataset = self.raw()[split]
        if role not in ("train", "val"):
            return data
        chooses = self.validation_from_train > 0
        if self._reported() == [self.splits["train"]]:
            data = self._part(data, split, "train" if chooses else role, self.validation_fraction)
        data = self.training_subset(data) if chooses or role == "train" else data
        return self._part(data, split, role, self.validation_from_train) if chooses else data

    def _reported(self) -> list[str]:
        """Returns the splits of the validation set that is reported, also where another one is chosen on."""
        share, self.validation_from_train = self.validation_from_train, 0.0
        try:
            return self.splits_of("val")  # a subclass may have its own
        finally:
            self.validation_from_train = share

    def _part(self, data: Dataset, split: str, role: Role, share: float) -> Dataset:
        if len(data) < 2:
            raise LoPAError(f"{split}: {len(data)} example is too few to cut a validation split from")
        column = self.class_column
        classes = None if column not in data.column_names else data.select_columns([column])[column][:]
        training, validation = held_out(len(data), share, self.subset_seed, classes)
        part: Dataset = data.select(training if role == "train" else validation)
        return part

    def _warn_of_duplicates(self, training: Dataset) -> None:
        """Warns of examples to validate or test on that are trained on as well."""
        roles: dict[str, Role] = dict.fromkeys(self.splits_of("val"), "val")
        if (split := self.splits["test"]) in self.raw() and split != self.splits["train"]:
            roles.setdefault(split, "test")
        for split, role in roles.items():
            warn_of_duplicates(training, self.load_split(split, role), self.input_columns, f"{role} ({split})")

    @classmethod
    def load_from_checkpoint(cls, *args: Any, **kwargs: Any) -> Any:
        """Refuses: a checkpoint holds no data module, and Lightning would call what a stranger's says it holds.

        Raises:
            LoPAError: Always.
        """
        raise LoPAError(f"a checkpoint holds no data; build {cls.__name__} from its own arguments")

    def connect(self, input_spec: InputSpec) -> None:
        """Says how inputs are encoded, where no Trainer brings a module.

        Args:
            input_spec: A module's.
        """
        if input_spec is not self.input_spec:
            self.input_spec = input_spec
            self.datasets, self.vectors = {}, {}  # made for another module

    def prepare_data(self) -> None:
        """Encodes into the data sets' cache, once on each node, after the module's settings are checked."""
        assert self.trainer is not None
        assert self.trainer.state.fn is not None
        stage = str(self.trainer.state.fn.value)
        self.trainer.lightning_module.setup(stage)  # Lightning calls it only once the data is there
        self.setup(stage)

    @cache_faults_named()
    def setup(self, stage: str) -> None:
        """Loads and encodes what a stage needs, from the cache where it is there.

        Args:
            stage: ``fit``, ``validate``, ``test`` or ``predict``.

        Raises:
            LoPAError: If the data is not what the configuration says.
        """
        if self.trainer is not None and isinstance(module := self.trainer.lightning_module, ReadsInputs):
            self.connect(module.input_spec)
        if self.input_spec is None:
            raise LoPAError("a data module needs a module's input_spec: use a Trainer, or connect(module.input_spec)")
        for role in ROLES[stage]:
            if role not in self.datasets:
                self.datasets[role] = [self._encoded(split, role) for split in self.splits_of(role)]
                for data in self.datasets[role]:
                    self._sampler(data, role)  # refuses sizes of batches that cannot be, before weights are read
                if role == "train" and (self.trainer is None or self.trainer.is_global_zero):
                    self._warn_of_duplicates(self.load_split(self.splits_of(role)[0], role))
        if self.trainer is not None:
            check_batch_limits(self.trainer, ROLES[stage])
        for role in ROLES[stage]:
            for data in self.datasets[role]:
                self._keep_vectors(data, role)

    def _encoded(self, split: str, role: Role) -> Dataset:
        try:
            data = self.load_split(split, role)
            if len(data) == 0:
                raise LoPAError(f"{role} ({split}): the split has no rows")
            check_cached(data)
            return self.encode(data, split, role)
        except (ColumnError, RowError) as error:
            raise error.named(f"{role} ({split})", self.raw()[split]) from None

    def _keep_vectors(self, data: Dataset, role: Role) -> None:
        assert self.input_spec is not None
        cache, trainer = self.input_spec.instance_vectors, self.trainer
        if cache is None or data._fingerprint in self.vectors or not agrees_with(cache, trainer):
            return
        batch_size = self.batch_size if role == "train" else self.eval_batch_size
        device = torch.device("cpu") if trainer is None else trainer.strategy.root_device
        make = trainer is None or reads_all(trainer, role, batch_size, len(data))
        if vectors := stored_vectors(cache, data, f"the {role} set", device, self.collate(), make):
            self.vectors[data._fingerprint] = vectors

    def train_dataloader(self) -> Loader:
        """Returns a loader of shuffled batches of like lengths."""
        return self._loader(self.datasets["train"][0], "train")

    def val_dataloader(self) -> list[Loader]:
        """Returns a loader for each evaluation set."""
        return [self._loader(data, "val") for data in self.datasets["val"]]

    def test_dataloader(self) -> list[Loader]:
        """Returns a loader for each evaluation set."""
        return [self._loader(data, "test") for data in self.datasets["test"]]

    def predict_dataloader(self) -> list[Loader]:
        """Returns a loader for each set to predict."""
        return [self._loader(data, "predict") for data in self.datasets["predict"]]

    def _sampler(self, data: Dataset, role: Role) -> LengthGroupedSampler:
        is_training = role == "train"
        world_size = self.trainer.world_size if self.trainer is not None else 1
        if not is_training and len(data) < world_size:
            raise LoPAError(f"{role}: {len(data)} examples are fewer than the {world_size} processes")
        assert self.input_spec is not None
        has_lengths = "length" in data.column_names
        lengths = data.with_format("numpy")["length"][:] if has_lengths else np.ones(len(data), np.int64)
        return LengthGroupedSampler(
            lengths + self.input_spec.virtual_tokens,
            self.batch_size if is_training else self.eval_batch_size,
            shuffle=is_training,
            num_replicas=world_size,
            rank=self.trainer.global_rank if self.trainer is not None else 0,
            seed=self.seed,
            batch_tokens=self.batch_tokens if is_training else self.eval_batch_tokens,
            with_epoch=is_training and self.varies,
        )

    @property
    def seed(self) -> int:
        """The run's seed."""
        return int(os.environ.get("PL_GLOBAL_SEED", 0))

    def _loader(self, data: Dataset, role: Role) -> Loader:
        assert self.input_spec is not None
        sampler, shuffle = self._sampler(data, role), role == "train"
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        workers = (2 if on_gpu else 0) if self.num_workers is None else self.num_workers
        columns = [name for name in data.column_names if name != "length"]
        return ResumableLoader(
            Rows(data.select_columns(columns), self.vectors.get(data._fingerprint)),
            sampler=sampler,
            batch_size=sampler.batch_size,
            virtual_tokens=self.input_spec.virtual_tokens,
            collate_fn=self.collate(),
            share=self.trainer.limit_train_batches if shuffle and self.trainer is not None else 1.0,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=on_gpu,
        )

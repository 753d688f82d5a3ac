"""The LightningDataModule under all text data: tokenise once, batch by length, pad little."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from lopa_lightning.backbones.text_spec import TextSpec
from lopa_lightning.data.cache import cache_faults_named, check_cached
from lopa_lightning.data.collate import Collate, Rows
from lopa_lightning.data.instance_vectors import StoredVectors, agrees_with, reads_all, stored_vectors
from lopa_lightning.data.loader import ResumableLoader
from lopa_lightning.data.rows import EncodeRows, LabelLookup, RowEncoder, TextError, fault_of
from lopa_lightning.data.sampler import LengthGroupedSampler
from lopa_lightning.data.template import Side, Template, Tokenize, backbone_template, plain_template
from lopa_lightning.errors import LoPAError, shown
from lopa_lightning.task import TextTask

if TYPE_CHECKING:  # takes a second to import, and a command that reads no data does without
    from datasets import Dataset

Role = Literal["train", "val", "test", "predict"]
Loader = DataLoader[dict[str, Any]]

_ROLES: dict[str, list[Role]] = {
    "fit": ["train", "val"],
    "validate": ["val"],
    "test": ["test"],
    "predict": ["predict"],
}
_FORMAT = 3  # of tokenised data; a new number makes cached data stale


class TextDataModule(LightningDataModule, ABC):
    """Turns rows of text into batches for a module's frozen models.

    A subclass says what the rows are: ``task``, ``template``, ``splits_of`` and ``load_split``. What
    tokenizers to use, and to what length, the module says; a Trainer brings the two together.

    Args:
        batch_size: Examples in a training batch of one process.
        eval_batch_size: Most examples in a batch otherwise; by default twice as many.
        max_length: Tokens of a text for the backbone, virtual tokens not counted; None for as many as fit.
        truncation_side: Which end of a text too long is cut.
        padding_side: Where the backbone's padding goes.
        num_workers: Processes that load batches; by default none on a CPU, which they would take from the model,
            and two for each GPU.
        batch_tokens: Most tokens in a batch of one process, padding and virtual tokens included, in place of
            ``batch_size``; batches then differ in size, and each counts by its examples. Evaluation keeps to it as
            well, unless there is an ``eval_batch_size``.
    """

    task: TextTask | None = None
    template: Template
    causal_template: Template | None = None

    def __init__(
        self,
        batch_size: int = 16,
        eval_batch_size: int | None = None,
        max_length: int | None = None,
        truncation_side: Side = "right",
        padding_side: Side = "right",
        num_workers: int | None = None,
        batch_tokens: int | None = None,
    ) -> None:
        super().__init__()
        sizes = {"batch_size": batch_size, "eval_batch_size": eval_batch_size, "batch_tokens": batch_tokens}
        for name, value in {**sizes, "max_length": max_length}.items():
            if value is not None and value < 1:
                raise LoPAError(f"{name} must be at least 1, got {value}")
        if num_workers is not None and num_workers < 0:
            raise LoPAError(f"num_workers must be at least 0, got {num_workers}")
        for name, side in {"truncation_side": truncation_side, "padding_side": padding_side}.items():
            if side not in get_args(Side):
                raise LoPAError(f"{name} must be one of {', '.join(get_args(Side))}, got {side!r}")
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or 2 * batch_size
        self.batch_tokens = batch_tokens
        self.eval_batch_tokens = None if eval_batch_size is not None else batch_tokens
        self.max_length = max_length
        self.truncation_side = truncation_side
        self.padding_side = padding_side
        self.num_workers = num_workers
        self.text_spec: TextSpec | None = None
        self.datasets: dict[Role, list[Dataset]] = {}
        self.vectors: dict[str, StoredVectors] = {}

    # What a data set defines

    @abstractmethod
    def splits_of(self, role: Role) -> list[str]:
        """The splits that serve a role; several for several evaluation sets.

        Raises:
            LoPAError: If there is none.
        """

    @abstractmethod
    def load_split(self, split: str, role: Role) -> Dataset:
        """Loads a split as it is to be used in a role."""

    def label_lookup(self, data: Dataset, what: str) -> LabelLookup | None:
        """Says what the labels of a split mean; None if there are none.

        Args:
            data: The split.
            what: Its name, for messages.

        Raises:
            LoPAError: If there is a label that must not be there.
        """
        return None

    allow_empty_text = False
    """Whether rows may have an empty text."""

    @classmethod
    def load_from_checkpoint(cls, *args: Any, **kwargs: Any) -> Any:
        """Refuses: a checkpoint holds no data module, and Lightning would call what a stranger's says it holds.

        Raises:
            LoPAError: Always.
        """
        raise LoPAError(f"a checkpoint holds no data; build {cls.__name__} from its own arguments")

    # Preparing

    def connect(self, text_spec: TextSpec) -> None:
        """Sets the tokenizers to use, where no Trainer brings a module.

        Args:
            text_spec: A module's ``input_spec``.
        """
        self.text_spec = text_spec
        self.datasets, self.vectors = {}, {}  # what was made for another module

    def prepare_data(self) -> None:
        """Tokenises into the data sets' cache, once on each node, after the module's settings are checked."""
        assert self.trainer is not None
        assert self.trainer.state.fn is not None
        stage = str(self.trainer.state.fn.value)
        self.trainer.lightning_module.setup(stage)  # Lightning calls it only once the data is there
        self.setup(stage)

    @cache_faults_named()
    def setup(self, stage: str) -> None:
        """Loads and tokenises what a stage needs, from the cache where it is there.

        Args:
            stage: ``fit``, ``validate``, ``test`` or ``predict``.

        Raises:
            LoPAError: If the data is not what the configuration says.
        """
        self._spec()
        for role in _ROLES[stage]:
            if role not in self.datasets:
                loaded = {split: self.load_split(split, role) for split in self.splits_of(role)}
                self.datasets[role] = [self._tokenise(data, split, role) for split, data in loaded.items()]
                for data in self.datasets[role]:
                    self._sampler(data, role)  # refuses sizes of batches that cannot be, before weights are read
            for data in self.datasets[role]:
                self._keep_vectors(data, role)

    def _keep_vectors(self, data: Dataset, role: Role) -> None:
        cache, trainer = self._spec().instance_vectors, self.trainer
        if cache is None or data._fingerprint in self.vectors or not agrees_with(cache, trainer):
            return
        batch_size = self.batch_size if role == "train" else self.eval_batch_size
        device = torch.device("cpu") if trainer is None else trainer.strategy.root_device
        make = trainer is None or reads_all(trainer, role, batch_size, len(data))
        if (vectors := stored_vectors(cache, data, f"the {role} set", device, make)) is not None:
            self.vectors[data._fingerprint] = vectors

    def _spec(self) -> TextSpec:
        module: Any = self.trainer.lightning_module if self.trainer is not None else None
        spec = getattr(module, "input_spec", self.text_spec)
        if spec is not self.text_spec or spec is None:
            if not isinstance(spec, TextSpec):
                raise LoPAError(
                    "a data module needs a module's input_spec: use a Trainer, or call connect(module.input_spec)"
                )
            self.connect(spec)
        return spec

    def row_encoder(self, data: Dataset, what: str, role: Role) -> RowEncoder:
        """What turns a split's rows into token ids.

        Args:
            data: The split.
            what: Its name, for messages.
            role: What it serves.

        Raises:
            LoPAError: If the rows are not what they must be.
        """
        labels = None if role == "predict" else self.label_lookup(data, what)
        spec, columns = self._spec(), self.template.columns
        template = backbone_template(self.template, self.causal_template, spec)
        to_backbone = Tokenize(spec.tokenizer, template, self._max_tokens(), self.truncation_side)
        to_instance = None
        if spec.instance_tokenizer is not None:
            reads_template = self.task is not None and self.task.instance_reads == "template"
            instance = self.template if reads_template else plain_template(columns)
            if instance.has_mask and spec.instance_tokenizer.mask_token is None:
                raise LoPAError("instance_reads: template needs an instance encoder whose tokenizer has a mask token")
            to_instance = Tokenize(spec.instance_tokenizer, instance, spec.instance_max_tokens, self.truncation_side)
        return EncodeRows(to_backbone, to_instance, columns, labels, self.allow_empty_text)

    def _max_tokens(self) -> int | None:
        return min((n for n in (self._spec().max_tokens, self.max_length) if n is not None), default=None)

    def _tokenise(self, data: Dataset, split: str, role: Role) -> Dataset:
        from datasets.fingerprint import Hasher

        what = f"{role} ({split})"
        if len(data) == 0:
            raise LoPAError(f"{what}: the split has no rows")
        check_cached(data)
        encoder = self.row_encoder(data, what, role)
        if missing := [name for name in encoder.columns if name not in data.column_names]:
            raise LoPAError(f"{what}: no column {', '.join(missing)}; there are {', '.join(data.column_names)}")
        # Named by what it depends on: datasets' own hash of a tokenizer changes when the tokenizer is used.
        key = Hasher.hash([_FORMAT, data._fingerprint, *encoder.key()])
        try:
            tokenised = data.map(
                encoder,
                batched=True,
                with_indices=True,
                remove_columns=data.column_names,
                new_fingerprint=key,
                desc=f"Tokenising {what}",
            )
        except TextError as error:
            raise self._refused(what, split, error) from None
        check_cached(tokenised, len(data))
        for column, message in self.warnings_of(encoder).items():
            if column in tokenised.column_names:
                if count := int(np.sum(tokenised.with_format("numpy")[column][:])):
                    rank_zero_warn(f"{what}: {count} of {len(tokenised)} {message}")
                if column == "left_out":
                    tokenised = self._without_left_out(tokenised, what)
                tokenised = tokenised.remove_columns(column)
        return tokenised

    def _refused(self, what: str, split: str, error: TextError) -> LoPAError:
        """Names the rows with a fault, counted in the whole split: of the rows at hand some were left out before."""
        texts = self.load_split(split, "test")[error.column][:]
        rows = [row for row, text in enumerate(texts) if fault_of(text, self.allow_empty_text) == error.fault]
        named = ", ".join(map(str, rows[:5])) + (" ..." if len(rows) > 5 else "")
        got = "" if texts[rows[0]] is None or isinstance(texts[rows[0]], str) else f", got {shown(texts[rows[0]])}"
        return LoPAError(f"{what}: column {error.column!r} {error.fault}{got} in row {named} (counted from 0)")

    @staticmethod
    def _without_left_out(data: Dataset, what: str) -> Dataset:
        kept = np.flatnonzero(~data.with_format("numpy")["left_out"][:])
        if len(kept) == 0:
            raise LoPAError(f"{what}: none of the {len(data)} rows fits; raise max_length")
        chosen: Dataset = data.select(kept)
        return chosen

    def warnings_of(self, encoder: RowEncoder) -> dict[str, str]:
        """What is said, once, of the rows for which a column of the encoder's is true."""
        spec = self._spec()
        return {
            "truncated": f"texts were cut to {encoder.max_tokens} tokens",
            "instance_truncated": f"texts were cut to {spec.instance_max_tokens} tokens for the instance encoder",
        }

    # Loading

    def train_dataloader(self) -> Loader:
        """Shuffled batches of like lengths."""
        return self._loader(self.datasets["train"][0], "train")

    def val_dataloader(self) -> list[Loader]:
        """One loader for each evaluation set."""
        return self._eval_loaders("val")

    def test_dataloader(self) -> list[Loader]:
        """One loader for each evaluation set."""
        return self._eval_loaders("test")

    def predict_dataloader(self) -> list[Loader]:
        """One loader for each set to predict."""
        return self._eval_loaders("predict")

    def _eval_loaders(self, role: Role) -> list[Loader]:
        return [self._loader(data, role) for data in self.datasets[role]]

    def _sampler(self, data: Dataset, role: Role) -> LengthGroupedSampler:
        is_training = role == "train"
        world_size = self.trainer.world_size if self.trainer is not None else 1
        if not is_training and len(data) < world_size:
            raise LoPAError(f"{role}: {len(data)} examples are fewer than the {world_size} processes")
        return LengthGroupedSampler(
            data.with_format("numpy")["length"][:] + self._spec().virtual_tokens,
            self.batch_size if is_training else self.eval_batch_size,
            shuffle=is_training,
            num_replicas=world_size,
            rank=self.trainer.global_rank if self.trainer is not None else 0,
            seed=int(os.environ.get("PL_GLOBAL_SEED", 0)),
            batch_tokens=self.batch_tokens if is_training else self.eval_batch_tokens,
        )

    def _loader(self, data: Dataset, role: Role) -> Loader:
        spec, sampler, shuffle = self._spec(), self._sampler(data, role), role == "train"
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        workers = (2 if on_gpu else 0) if self.num_workers is None else self.num_workers
        instance_pad = _pad_id(spec.instance_tokenizer) if spec.instance_tokenizer is not None else 0
        return ResumableLoader(
            Rows(data.remove_columns("length"), self.vectors.get(data._fingerprint)),
            sampler=sampler,
            batch_size=sampler.batch_size,
            virtual_tokens=spec.virtual_tokens,
            collate_fn=Collate(_pad_id(spec.tokenizer), instance_pad, self.padding_side),
            share=self.trainer.limit_train_batches if shuffle and self.trainer is not None else 1.0,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=on_gpu,
        )


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    # Without a padding token any id will do: the attention mask hides it.
    pad_id: int | None = tokenizer.pad_token_id
    return 0 if pad_id is None else pad_id

"""Instance vectors in the data sets' cache: each input is encoded once on a machine, and its vector read ever after."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from filelock import FileLock
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from numpy.typing import NDArray
from torch import Tensor

from lopa_lightning.data.cache import check_cached
from lopa_lightning.data.types import Dataset
from lopa_lightning.errors import LoPAError
from lopa_lightning.instances.vectors import VectorCache

_log = logging.getLogger(__name__)

_COLUMNS = ("instance_input_ids", "instance_token_type_ids")
_PIXELS = ("instance_pixels", "pixels")  # the first that there is
_ROWS = 1024  # read, and written, together
_TOKENS = 8192  # of a batch, padding included
_IMAGE = 256  # the tokens that an image counts for

Collate = Callable[[pa.Table], dict[str, Tensor]]


@dataclass(frozen=True)
class StoredVectors:
    """Vectors of rows: of each distinct input one, memory-mapped.

    Args:
        inputs: ``instance [e]`` of each input, in Arrow format.
        input_of_row: The number of each row's input, ``[N]``.
    """

    inputs: Dataset
    input_of_row: NDArray[np.int64]

    def at(self, rows: list[int]) -> pa.ChunkedArray:
        """Returns the vectors of some rows."""
        # Not by `Dataset.select`, which looks rows up one by one.
        return self.inputs[self.input_of_row[rows]]["instance"]


def stored_vectors(
    cache: VectorCache, data: Dataset, what: str, device: torch.device, collate: Collate, make: bool = True
) -> StoredVectors | None:
    """Returns the vectors of all rows, from the disk; while one process encodes their inputs, the others wait.

    Args:
        cache: Of the encoder.
        data: With ``instance_input_ids`` and perhaps ``instance_token_type_ids``, or with ``instance_pixels`` or
            ``pixels`` and their digests. These name the file.
        what: Its name, for messages.
        device: Where to encode.
        collate: Makes a batch of these columns.
        make: Whether to encode inputs whose vectors are not there.

    Returns:
        Float32 vectors; None if they are not there and were not to be made, or the input is of another kind.

    Raises:
        LoPAError: If they cannot be written.
    """
    columns = [name for name in _COLUMNS if name in data.column_names]
    columns = columns or [name for name in _PIXELS if name in data.column_names][:1]
    if not columns:
        return None
    rows = data.select_columns(columns)
    digests, lengths = _digests(rows) if columns[0] not in _PIXELS else _pixel_digests(data, columns[0])
    inputs = digests.dictionary_encode()
    input_of_row = inputs.indices.to_numpy()
    _, first = np.unique(input_of_row, return_index=True)
    # The longest first: little is padded, and a batch that does not fit into memory is met at once.
    order = np.argsort(-lengths[first], kind="stable")
    key = hashlib.sha256(b"".join([repr(columns).encode(), *inputs.dictionary.to_pylist()]))
    path = cache.folder() / key.hexdigest()[:32] / "vectors.arrow"
    vectors = _opened(path, len(order))
    if vectors is None and make:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_suffix(".lock")):  # another process may make them meanwhile
                vectors = _opened(path, len(order)) or _made(
                    cache, rows.select(first[order]), path, what, device, collate
                )
        except OSError as error:
            raise LoPAError(
                f"instance vectors of {what} cannot be kept at {str(path)!r} ({error.strerror or error}); make room, "
                "set HF_DATASETS_CACHE to another folder, or set instance_encoder.cache: false"
            ) from error
    return None if vectors is None else StoredVectors(vectors.with_format("arrow"), np.argsort(order)[input_of_row])


def _digests(tokens: Dataset) -> tuple[pa.Array, NDArray[np.int64]]:
    """Returns a digest of each row's tokens, whatever integers they are kept as, and how many they are."""
    digests, lengths = [], []
    for table in tokens.with_format("arrow").iter(_ROWS):
        lists = [column.combine_chunks() for column in table.columns]
        sizes = lists[0].value_lengths().to_numpy()
        numbers = np.stack([each.flatten().to_numpy() for each in lists], axis=1).astype(np.int64)
        content, ends = numbers.tobytes(), (np.cumsum(sizes) * numbers.itemsize * len(lists)).tolist()
        found = [hashlib.blake2b(content[a:b], digest_size=16).digest() for a, b in zip([0, *ends], ends)]
        digests.append(pa.array(found, pa.binary(16)))
        lengths.append(sizes)
    return pa.concat_arrays(digests), np.concatenate(lengths)


def _pixel_digests(data: Dataset, column: str) -> tuple[pa.Array, NDArray[np.int64]]:
    """Returns the digests that were stored with images, and an image's tokens."""
    digests = data.with_format("arrow")[column.replace("pixels", "digest")][:].combine_chunks()
    return digests, np.full(len(digests), _IMAGE)


def _opened(path: Path, inputs: int) -> Dataset | None:
    """Returns the vectors in a file, memory-mapped; None if it is not there, damaged, or of other inputs."""
    from datasets import Dataset

    try:
        vectors = Dataset.from_file(str(path))
        check_cached(vectors, inputs)
    except (OSError, ValueError):  # LoPAErrors, and those of Arrow, are ValueErrors
        return None
    return vectors


def _made(cache: VectorCache, rows: Dataset, path: Path, what: str, device: torch.device, collate: Collate) -> Dataset:
    """Encodes inputs, the longest first, into a file."""
    if path.exists():
        _log.warning("instance vectors of %s are rebuilt: %s is damaged", what, path)
    for left in path.parent.glob("tmp*"):  # by a process that was killed
        left.unlink()

    def encode(table: pa.Table) -> pa.Table:
        is_text, vectors, start = table.column_names[0] not in _PIXELS, [], 0
        while start < len(table):
            size = max(1, _TOKENS // max(1, len(table[0][start]) if is_text else _IMAGE))
            batch = collate(table.slice(start, size))
            vectors.append(cache.encoder({name: value.to(device) for name, value in batch.items()}).cpu())
            start += size
        values = torch.cat(vectors).numpy()
        return pa.table({"instance": pa.FixedSizeListArray.from_arrays(values.ravel(), values.shape[1])})

    cache.facts()  # while the model is there
    with torch.inference_mode():
        vectors: Dataset = rows.with_format("arrow").map(
            encode,
            batched=True,
            batch_size=_ROWS,
            remove_columns=rows.column_names,
            load_from_cache_file=False,
            cache_file_name=str(path),
            new_fingerprint=path.parent.name,
            desc=f"Encoding {what}",
        )
    cache.encoder.release()
    return vectors


def agrees_with(cache: VectorCache, trainer: Trainer | None) -> bool:
    """Returns whether vectors may be read in a run: not those of a backbone that is sharded.

    One process could not hold it to make them, and a process that lacks them would wait for the others to run it.

    Args:
        cache: Where the vectors would be kept.
        trainer: Of the run; None outside of one.
    """
    is_sharded = trainer is not None and isinstance(trainer.strategy, ModelParallelStrategy)
    return not (cache.encoder.spec.is_backbone and is_sharded)


def reads_all(trainer: Trainer, role: str, batch_size: int, rows: int) -> bool:
    """Returns whether a run reads as many rows as a set has, in all its epochs.

    If not, as with ``fast_dev_run`` or ``limit_train_batches``, vectors of all cost more than they save.

    Args:
        trainer: Of the run.
        role: What the rows serve: ``train``, ``val``, ``test`` or ``predict``.
        batch_size: Of one process.
        rows: Number of rows.
    """
    limit: int | float = getattr(trainer, f"limit_{role}_batches")
    step = batch_size * trainer.world_size
    share = min(1.0, limit * step / rows) if isinstance(limit, int) else limit
    if trainer.state.fn == TrainerFn.FITTING:
        share *= trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs >= 0 else float("inf")
    if role == "train" and trainer.max_steps >= 0:
        share = min(share, trainer.max_steps * trainer.accumulate_grad_batches * step / rows)
    return share >= 1

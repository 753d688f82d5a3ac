"""Vectors of a frozen instance encoder: made once on a machine, and read from its disk ever after."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from filelock import FileLock
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from lopa_lightning.backbones.pretrained import PretrainedSpec, load_config
from lopa_lightning.backbones.text_spec import instance_inputs
from lopa_lightning.errors import LoPAError
from lopa_lightning.files import replacing, write_whole
from lopa_lightning.instances.encoder import InstanceEncoder

if TYPE_CHECKING:  # neither data sets nor their library are needed to load a model
    from datasets import Dataset

_log = logging.getLogger(__name__)

_FORMAT = 1  # of the files; a new number makes the old ones stale
_COLUMNS = ("instance_input_ids", "instance_token_type_ids")
_BLOCK = 8192  # rows looked at together
_TOKENS = 8192  # of a batch, padding included
_CONTENT = {".safetensors", ".bin", ".json", ".py"}  # endings of what a pretrained model is loaded from
_SAMPLES, _SAMPLE = 64, 4096  # looks into a large file, and bytes of each

Numbers = NDArray[np.int64]


class StoredVectors:
    """Vectors ``[N, e]`` in a ``.npy`` file, of which memory holds what was lately read.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mapped: NDArray[np.float32] = np.load(path, mmap_mode="r")

    def __len__(self) -> int:
        return len(self._mapped)

    def __reduce__(self) -> tuple[Any, ...]:
        return StoredVectors, (self.path,)  # a mapping would be sent to workers with all its content

    def at(self, rows: Sequence[int] | Numbers) -> NDArray[np.float32]:
        """The vectors of some rows.

        Args:
            rows: Their numbers, ``[n]``.

        Returns:
            A copy, ``[n, e]``.
        """
        return np.array(self._mapped[np.asarray(rows)])


class VectorCache:
    """The vectors of one frozen instance encoder, beside the data sets' cache.

    A vector depends on the encoder's files, on how hidden states are pooled, and on the tokens that are
    read: the first two name a folder, the tokens of all rows a file in it. Tokenizer and length are
    in the tokens. Files come into being whole, under a lock. One whose size or time has changed is checked, and
    rebuilt if its content is not what was written; bytes that change under an unchanged time are not looked for.

    Args:
        source: Where the encoder's weights are.
        encoder: Loads them when it is needed.
        describe: Says of a loaded model which one it is, as plain data.
    """

    def __init__(
        self,
        source: PretrainedSpec,
        encoder: InstanceEncoder,
        describe: Callable[[PreTrainedModel], dict[str, Any]],
    ) -> None:
        self.source = source
        self.encoder = encoder
        self._describe = describe

    def folder(self) -> Path:
        """Where the vectors of this encoder are, as its files are now."""
        from datasets import config

        spec = self.encoder.spec
        name = f"{source_key(self.source)}-{spec.pooling}{'-normalized' if spec.normalize else ''}"
        return Path(config.HF_DATASETS_CACHE, "lopa_lightning", "instance_vectors", name)

    def facts(self) -> dict[str, Any]:
        """What ``describe`` says of the encoder, without loading it where that was done before."""
        path = self.folder() / "encoder.json"
        with suppress(OSError, ValueError):
            known = json.loads(path.read_text())
            if isinstance(known, dict) and known:
                return known
        facts = self._describe(self.encoder.loaded())
        with suppress(OSError):  # it costs time alone
            write_whole(path, json.dumps(facts))
        return facts

    def stored(self, data: Dataset, what: str, device: torch.device, make: bool = True) -> StoredVectors | None:
        """The vectors of all rows of a data set; while one process makes them, the others wait.

        Args:
            data: With ``instance_input_ids`` and perhaps ``instance_token_type_ids``.
            what: Its name, for messages.
            device: Where to encode.
            make: Whether to make them if they are not there.

        Returns:
            None if they are not there, and were not to be made.

        Raises:
            LoPAError: If they cannot be written.
        """
        columns = data.select_columns([name for name in _COLUMNS if name in data.column_names])
        path = self.folder() / f"{_content_key(columns)}.npy"
        if _fault(path, len(data)) is None:
            return StoredVectors(path)
        if not make:
            return None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_suffix(".lock")):
                if (fault := _fault(path, len(data))) is not None:  # or another process has made them meanwhile
                    if path.exists():
                        _log.warning("instance vectors of %s are rebuilt: %s %s", what, path, fault)
                    self._make(columns, path, what, device)
        except OSError as error:
            raise LoPAError(
                f"instance vectors of {what} cannot be kept at {str(path)!r} ({error.strerror or error}); make room, "
                "set HF_DATASETS_CACHE to another folder, or set instance_encoder.cache: false"
            ) from error
        return StoredVectors(path)

    def _make(self, data: Dataset, path: Path, what: str, device: torch.device) -> None:
        for left in path.parent.glob(f".{path.name}.*"):  # by a process that was killed
            left.unlink(missing_ok=True)
        groups, start = _Groups(data), 0
        progress = transformers_logging.tqdm(total=len(groups), desc=f"Encoding {what}", unit=" texts", delay=2)
        self.facts()  # while the model is there
        with replacing(path) as file, progress, torch.inference_mode():
            for texts in groups.batches(_TOKENS):
                vectors = self._encode(data, groups.first[texts], device)
                start = start or _write_head(file, len(data), vectors.shape[1])
                for text, vector in zip(texts, vectors):
                    for row in groups.rows(text):
                        file.seek(start + int(row) * vector.nbytes)
                        file.write(vector.tobytes())
                progress.update(len(texts))
        self.encoder.release()
        _write_record(path, _digest(path))

    def _encode(self, data: Dataset, rows: Numbers, device: torch.device) -> NDArray[np.float32]:
        table = data.with_format("arrow")[rows]
        columns = [_padded(table[name].to_pylist(), device) for name in data.column_names]
        ids, types = columns[0], columns[1] if len(columns) > 1 else None
        lengths = torch.tensor(table[_COLUMNS[0]].combine_chunks().value_lengths().to_pylist(), device=device)
        mask = (torch.arange(ids.shape[1], device=device) < lengths[:, None]).long()
        vectors: NDArray[np.float32] = self.encoder(instance_inputs(ids, mask, types)).cpu().numpy()
        return vectors.astype("<f4", copy=False)


class _Groups:
    """Rows in groups of one text each.

    Args:
        data: With the columns that the encoder reads, and no others.
    """

    def __init__(self, data: Dataset) -> None:
        digests, lengths = np.empty(len(data), "S16"), np.empty(len(data), np.int64)
        row = 0
        for columns in _blocks(data):
            for parts in zip(*(np.split(values, np.cumsum(sizes)[:-1]) for values, sizes in columns)):
                digests[row] = hashlib.blake2b(b"".join(part.tobytes() for part in parts), digest_size=16).digest()
                lengths[row] = len(parts[0])
                row += 1
        _, self.first, group = np.unique(digests, return_index=True, return_inverse=True)
        self._sorted, self._ends = np.argsort(group, kind="stable"), np.cumsum(np.bincount(group))
        self._lengths = lengths[self.first]

    def __len__(self) -> int:
        return len(self.first)

    def rows(self, text: int) -> Numbers:
        """The rows that have a text."""
        return self._sorted[self._ends[text - 1] if text else 0 : self._ends[text]]

    def batches(self, tokens: int) -> Iterator[Numbers]:
        """Texts of like length, the longest first: a batch that does not fit into memory is met at once."""
        order, start = np.argsort(-self._lengths, kind="stable"), 0
        while start < len(order):
            end = start + max(1, tokens // max(1, self._lengths[order[start]]))
            yield order[start:end]
            start = end


def source_key(source: PretrainedSpec) -> str:
    """Names what a pretrained model computes by the files that it is loaded from, without reading them whole.

    Args:
        source: Of the hub, it is the commit; of a folder, each file's size, time and a sample of its content.

    Raises:
        LoPAError: If the hub names no commit.
    """
    how = [_FORMAT, source.dtype, source.attn_implementation, transformers.__version__]
    digest, folder = hashlib.sha256(repr(how).encode()), Path(source.location())
    if folder.is_dir():
        for path in sorted(folder.iterdir()):
            if path.suffix in _CONTENT and path.is_file():
                digest.update(path.name.encode())
                _update_with_sample(digest, path)
    else:
        commit = getattr(load_config(source), "_commit_hash", None)
        if commit is None:
            raise LoPAError(f"{source.name!r} has no commit to know its weights by; set instance_encoder.cache: false")
        digest.update(f"{source.name}@{commit}".encode())
    return digest.hexdigest()[:16]


def _update_with_sample(digest: Any, path: Path) -> None:
    with path.open("rb") as file:
        stat = os.fstat(file.fileno())
        digest.update(f"{stat.st_size} {stat.st_mtime_ns}".encode())
        for start in np.linspace(0, max(0, stat.st_size - _SAMPLE), _SAMPLES, dtype=np.int64):
            file.seek(int(start))
            digest.update(file.read(_SAMPLE))


def _blocks(data: Dataset) -> Iterator[list[tuple[Numbers, Numbers]]]:
    """For each column of some rows at a time, all their numbers in a row, and how many each row has."""
    table = data.with_format("arrow")
    for start in range(0, len(data), _BLOCK):
        lists = [column.combine_chunks() for column in table[start : start + _BLOCK].columns]
        yield [
            (column.flatten().to_numpy(zero_copy_only=False).astype(np.int64), column.value_lengths().to_numpy())
            for column in lists
        ]


def _content_key(data: Dataset) -> str:
    digest = hashlib.sha256(repr([_FORMAT, len(data), data.column_names]).encode())
    for columns in _blocks(data):
        for values, sizes in columns:
            digest.update(values.tobytes())
            digest.update(sizes.tobytes())
    return digest.hexdigest()[:32]


def _padded(rows: list[list[int]], device: torch.device) -> Tensor:
    # With any id: the mask hides it.
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(device)


def _write_head(file: IO[bytes], rows: int, width: int) -> int:
    """Writes what stands before the numbers, and says where they start.

    What is written is not mapped: it would fill the memory while it waits for the disk.
    """
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (rows, width)})
    return file.tell()


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 22):
            digest.update(part)
    return digest.hexdigest()


def _write_record(path: Path, digest: str) -> None:
    """Writes down what a file was like when it was known to be whole."""
    stat = path.stat()
    record = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": digest}
    write_whole(path.with_suffix(".json"), json.dumps(record))


def _fault(path: Path, rows: int) -> str | None:
    """What keeps a file from being used; None if nothing does.

    It is read whole only where its time has changed since that was last done.
    """
    try:
        record, stat = json.loads(path.with_suffix(".json").read_text()), path.stat()
        if stat.st_size != record["size"]:
            return f"has {stat.st_size} bytes, not {record['size']}"
        if stat.st_mtime_ns != record["mtime_ns"]:
            if (digest := _digest(path)) != record["sha256"]:
                return "has other content than was written"
            with suppress(OSError):
                _write_record(path, digest)
        shape = np.load(path, mmap_mode="r").shape
    except FileNotFoundError:
        return "has no record of what it was like"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"cannot be read ({error})"
    return None if len(shape) == 2 and shape[0] == rows else f"has the shape {shape}, for {rows} rows"

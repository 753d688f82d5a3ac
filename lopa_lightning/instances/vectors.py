"""The identity of a frozen instance encoder whose vectors are kept: the folder they are in, and its model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from transformers import PreTrainedModel
from transformers.utils import cached_file, extract_commit_hash

from lopa_lightning.backbones.pretrained import PretrainedSpec, load_config
from lopa_lightning.errors import LoPAError
from lopa_lightning.files import write_whole
from lopa_lightning.instances.encoder import InstanceEncoder

_FORMAT = 2  # of the files; a new number makes the old ones stale
_CONTENT = {".safetensors", ".bin", ".json", ".py"}  # endings of what a pretrained model is loaded from
_SAMPLES, _SAMPLE = 64, 4096  # looks into a large file, and bytes of each


@dataclass(frozen=True, eq=False)
class VectorCache:
    """Knows where the vectors of one frozen instance encoder are kept: beside the data sets' cache.

    Args:
        source: Where the encoder's weights are.
        encoder: Loads them when they are needed.
        describe: Says of a loaded model which one it is, as plain data.
    """

    source: PretrainedSpec
    encoder: InstanceEncoder
    describe: Callable[[PreTrainedModel], dict[str, Any]]

    def folder(self) -> Path:
        """Returns the folder of these vectors, named by the encoder's files as they are now, its pooling and scale."""
        from datasets import config

        spec = self.encoder.spec
        name = f"{source_key(self.source)}-{spec.pooling}{'-normalized' if spec.normalize else ''}"
        return Path(config.HF_DATASETS_CACHE, "lopa_lightning", "instance_vectors", name)

    def facts(self) -> dict[str, Any]:
        """Returns what ``describe`` says of the encoder, without loading it where that was done before."""
        path = self.folder() / "encoder.json"
        with suppress(OSError, ValueError):
            known = json.loads(path.read_text())
            if isinstance(known, dict) and known:
                return known
        facts = self.describe(self.encoder.loaded())
        with suppress(OSError):  # it costs time alone
            write_whole(path, json.dumps(facts))
        return facts


def source_key(source: PretrainedSpec) -> str:
    """Names what a pretrained model computes by the files that it is loaded from, without reading them whole.

    Args:
        source: Of the hub, it is the commit; of a folder, each file's size, time and a sample of its content.

    Raises:
        LoPAError: If the hub names no commit.
    """
    how: list[Any] = [_FORMAT, source.dtype, source.attn_implementation, transformers.__version__]
    how += [source.quantization] if source.quantization else []
    folder = Path(source.location())
    if not folder.is_dir():
        how += [source.name, commit_of(source)]
        if how[-1] is None:
            raise LoPAError(f"{source.name!r} has no commit to know its weights by; set instance_encoder.cache: false")
    digest = hashlib.sha256(repr(how).encode())
    for path in sorted(folder.glob("*")):
        if path.suffix in _CONTENT and path.is_file():
            stat = path.stat()
            digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}".encode())
            with path.open("rb") as file:
                for start in np.linspace(0, max(0, stat.st_size - _SAMPLE), _SAMPLES, dtype=np.int64):
                    file.seek(int(start))
                    digest.update(file.read(_SAMPLE))
    return digest.hexdigest()[:16]


def commit_of(spec: PretrainedSpec) -> str | None:
    """Returns the commit of the hub that a model's files are from; None of a folder, or where none is known.

    Raises:
        LoPAError: If there is no such model.
    """
    if Path(spec.location()).is_dir():
        return None
    load_config(spec)  # says what is wrong with a name; the file is in the hub's cache then
    commit: str | None = extract_commit_hash(cached_file(spec.location(), "config.json", revision=spec.revision), None)
    return commit

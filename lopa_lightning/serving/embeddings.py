"""Rows of a backbone's embedding table, for requests that carry whole texts as embeddings. No other weight is read."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_url
from huggingface_hub import utils as hub_utils
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from lopa_lightning.backbones.headers import SINGLE, indexed, shapes_in, sources_of, weight_file
from lopa_lightning.backbones.pretrained import PretrainedSpec
from lopa_lightning.errors import LoPAError, one_line

_NAMES = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings")  # of tables, before ".weight"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_AT_ONCE = 16  # requests to the hub
_LONGEST_HEADER = 10**8  # bytes, as safetensors allows

_BY_LAYER = "every layer reads the tokens' ids, which a soft prompt does not have"
_SCALES = "transformers and servers multiply given embeddings differently"
_UNSERVED = {
    **dict.fromkeys(("gemma3n", "gemma4", "qwen4_exp", "deepseek_v4"), _BY_LAYER),
    **dict.fromkeys(("falcon_h1", "minicpm"), _SCALES),
}


def check_architecture(model: PreTrainedModel) -> None:
    """Refuses a backbone with whose given embeddings a server does something else than transformers.

    Args:
        model: On any device.

    Raises:
        LoPAError: If it is of such an architecture.
    """
    config: PretrainedConfig = model.config
    kind, why = config.model_type, _UNSERVED.get(config.model_type.removesuffix("_text"))
    if why is None and getattr(config, "hidden_size_per_layer_input", None):
        why = _BY_LAYER
    if why is None and kind in ("gemma", "gemma2") and type(model.get_input_embeddings()) is nn.Embedding:
        why = f"{_SCALES} in this version of transformers; update it to 5.4 or later"
    if why is not None:
        raise LoPAError(f"a server cannot be sent soft prompts for {kind!r} models: {why}")


class EmbeddingTable:
    """What the token ids of a text stand for at a backbone's input, read row by row.

    Files of a folder, or in the hub's cache, are mapped. Of others a row is a range of bytes over HTTP, kept in memory.
    Learned positions are not added, and Granite's multiplier is not applied: a server does both by itself.

    Args:
        spec: The backbone.
        model: It, on the ``meta`` device.
        dtype: Of the backbone in training.

    Raises:
        LoPAError: If no table is found, it is not the config's, or its layer does more than to scale.
    """

    def __init__(self, spec: PretrainedSpec, model: PreTrainedModel, dtype: torch.dtype) -> None:
        layer: Any = model.get_input_embeddings()
        self._scale, self._dtype = _scale(layer), dtype
        self._rows: Any
        location, options = spec.location(), spec.source_options()
        local = {**options, "local_files_only": True}
        try:
            files: Mapping[str, str] = indexed(location, options)
            if not files:
                path = weight_file(location, SINGLE, local)
                names = shapes_in(path) if path is not None else _HubFile(location, SINGLE, spec.revision).header
                files = dict.fromkeys(names, SINGLE)
            key = _key(spec.name, model, files)
            path = weight_file(location, files[key], local)
            if path is not None:
                opened: Any = safe_open(path, "pt")
                self._rows = opened.get_slice(key)
            else:
                self._rows = _HubRows(_HubFile(location, files[key], spec.revision), key)
        except LoPAError:
            raise
        except Exception as error:  # of a damaged file
            raise LoPAError(f"the embedding table of {spec.name!r} cannot be read: {one_line(error)}") from error
        found, wanted = self._rows.get_shape(), list(layer.weight.shape)
        if found != wanted or self._rows.get_dtype() not in _DTYPES:
            got = f"{found} {self._rows.get_dtype()}"
            raise LoPAError(f"the embedding table {key} of {spec.name!r} must be {wanted} and not quantised, got {got}")

    def __call__(self, ids: Sequence[int]) -> Tensor:
        """Returns the embeddings of tokens, as the backbone's own embedding layer does, ``[T, d]``.

        Args:
            ids: Of the tokens.

        Raises:
            LoPAError: If the hub does not send a row.
        """
        if isinstance(self._rows, _HubRows):
            self._rows.fetch(ids)
        rows = torch.cat([self._rows[index : index + 1] for index in ids]).to(self._dtype)
        return rows if self._scale is None else rows * torch.tensor(self._scale).to(self._dtype)


def _scale(layer: Any) -> float | None:
    """What an embedding layer multiplies a row by, as Gemma's; None for nothing."""
    if type(layer) is nn.Embedding:
        return None
    scale = getattr(layer, "scalar_embed_scale", None)
    if not isinstance(layer, nn.Embedding) or scale is None:
        raise LoPAError(f"the backbone's embedding layer is a {type(layer).__name__}, of which a row is not all")
    return float(scale)


def _key(name: str, model: PreTrainedModel, saved: Mapping[str, Any]) -> str:
    """What the table is called in the files; tied ones may have the name of the head."""
    weight: Any = model.get_input_embeddings().weight
    own = next(each for each, parameter in model.named_parameters() if parameter is weight)
    if own in (sources := sources_of(model, saved)[0]):
        return sources[own]
    found = [key for key in saved if key.split(".")[-2:-1] in [[each] for each in _NAMES] and key.endswith(".weight")]
    if len(found) != 1:
        raise LoPAError(f"the embedding table of {name!r} is not found in its files: {', '.join(found) or own}")
    return found[0]


class _HubFile:
    """A safetensors file of the hub, of which ranges are read."""

    def __init__(self, repository: str, file: str, revision: str | None) -> None:
        if Path(repository).is_dir():
            raise LoPAError(f"no {file} in {repository!r}, of which the embeddings of texts are read")
        self._url = hf_hub_url(repository, file, revision=revision)
        length = int.from_bytes(self.read(0, 8), "little")
        if length > _LONGEST_HEADER:
            raise LoPAError(f"{self._url} is no safetensors file: its header would have {length} bytes")
        self.start = 8 + length
        self.header: dict[str, Any] = json.loads(self.read(8, self.start))
        self.header.pop("__metadata__", None)

    def read(self, start: int, end: int) -> bytes:
        """Returns the bytes of a range.

        Raises:
            LoPAError: If the hub does not send them.
        """
        hub: Any = hub_utils  # which names what it exports in no way that types know
        headers = {**hub.build_hf_headers(), "Range": f"bytes={start}-{end - 1}"}
        try:
            with hub.get_session().stream("GET", self._url, headers=headers) as response:
                hub.hf_raise_for_status(response)
                if response.status_code == 206:  # else the whole file would come
                    return bytes(response.read())
        except Exception as error:  # of the hub or the network
            raise LoPAError(f"rows of embeddings cannot be read from {self._url}: {one_line(error)}") from error
        raise LoPAError(f"{self._url}: no ranges of bytes are sent; download the backbone's files")


class _HubRows:
    """The rows of a table of the hub, sliced as those of ``safe_open``, once they are fetched."""

    def __init__(self, file: _HubFile, key: str) -> None:
        facts = file.header[key]
        self._file, self._dtype, self._shape = file, str(facts["dtype"]), list(facts["shape"])
        self._first, self._known = file.start + int(facts["data_offsets"][0]), dict[int, Tensor]()

    def get_shape(self) -> list[int]:
        return self._shape

    def get_dtype(self) -> str:
        return self._dtype

    def fetch(self, ids: Iterable[int]) -> None:
        missing = sorted(set(ids) - set(self._known))
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            self._known.update(zip(missing, pool.map(self._row, missing)))

    def __getitem__(self, rows: slice) -> Tensor:
        return self._known[rows.start]

    def _row(self, index: int) -> Tensor:
        dtype, width = _DTYPES[self._dtype], math.prod(self._shape[1:])
        start = self._first + index * width * dtype.itemsize
        read = self._file.read(start, start + width * dtype.itemsize)
        return torch.frombuffer(bytearray(read), dtype=dtype).view(1, width)

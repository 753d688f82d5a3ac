"""Reads bundles, which may be anybody's: folders of JSON and safetensors, or an error.

Nothing that a file names is imported or called. A bundle holds what a checkpoint does but for the state of training,
and goes through the same checks.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import safetensors.torch
import torch
from torch import Tensor

from lopa_lightning.checkpoint_file import check_content
from lopa_lightning.errors import LoPAError, one_line, shown
from lopa_lightning.migrations import HYPERPARAMETERS, IDENTITY_KEY
from lopa_lightning.plain import built

FORMAT_VERSION = 1
CONFIG, TENSORS = "config.json", "model.safetensors"
_MOST_JSON = 2**24  # bytes
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class PromptFacts:
    """Holds the shape and place of a soft prompt.

    Attributes:
        num_virtual_tokens: m.
        embedding_dim: Width d of a virtual token.
        instance_dim: Width e of an instance vector.
        placement: Where virtual tokens go.
        dtype: The backbone's, in which it reads virtual tokens.
        layers: Number L of layers that a virtual token has a part of d for each: of images, with ``every_layer``.
    """

    num_virtual_tokens: int
    embedding_dim: int
    instance_dim: int
    placement: str
    dtype: str
    layers: int = 1


@dataclass(frozen=True)
class TokenizerFacts:
    """Tells which tokenizer it is.

    Attributes:
        sha256: Of its vocabulary, and of how it encodes a few texts.
        chat_template_sha256: Of its chat template; None if it has none.
    """

    sha256: str
    chat_template_sha256: str | None = None


@dataclass(frozen=True)
class BundleConfig:
    """Holds what ``config.json`` of a bundle says.

    Attributes:
        format_version: Of the file.
        made_with: Version of this package.
        module: ``class_path``, a short name, and ``init_args``, those that differ from their defaults.
        prompt: Shape and place of the soft prompt.
        identity: Which frozen models, method and task it belongs to, as in a checkpoint.
        tokenizers: Of ``backbone`` and ``instance_encoder``; None for an encoder that is not there or reads images,
            whose processing is in ``identity``.
        answer: ``objective``; of classes ``labels``, their ``words`` and ``word_ids``.
        metrics: Of the run's best validation; empty where they are not known.
    """

    format_version: int
    made_with: str
    module: dict[str, Any]
    prompt: PromptFacts
    identity: dict[str, Any]
    tokenizers: dict[str, TokenizerFacts | None]
    answer: dict[str, Any]
    metrics: dict[str, float]


def is_bundle(path: Any) -> bool:
    """Returns whether a path is a folder that may be a bundle."""
    return isinstance(path, str | os.PathLike) and os.path.isfile(os.path.join(path, CONFIG))


def read(folder: Any) -> tuple[BundleConfig, dict[str, Tensor]]:
    """Reads a bundle's config and its trained tensors.

    Args:
        folder: Of the bundle.

    Raises:
        LoPAError: If it is not there, is damaged, or is no bundle.
    """
    path, name = Path(folder), shown(str(folder))
    try:
        config = _config(read_json(path / CONFIG))
        tensors = read_tensors(path / TENSORS)
        as_checkpoint(config, tensors)
    except LoPAError as error:
        raise LoPAError(f"{name} cannot be read as a bundle: {error}") from None
    return config, tensors


def as_checkpoint(config: BundleConfig, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Returns a bundle as a checkpoint without the state of training, in the present format.

    Raises:
        LoPAError: If it holds what no checkpoint has.
    """
    if set(config.module) != {"class_path", "init_args"} or not isinstance(config.module["init_args"], dict):
        raise LoPAError(f"its module must have class_path and init_args, got {shown(config.module)}")
    arguments = {**config.module["init_args"], "_class_path": config.module["class_path"]}
    saved = {
        "state_dict": dict(tensors),
        HYPERPARAMETERS: copy.deepcopy(arguments),  # an older format is brought to the present one in place
        IDENTITY_KEY: copy.deepcopy(config.identity),
        "pytorch-lightning_version": lightning.__version__,
    }
    check_content(saved, sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()))
    return saved


def read_json(path: Path) -> Any:
    """Reads a JSON file of a bundle.

    Raises:
        LoPAError: If it is not there, too large, or no JSON.
    """
    _check_file(path)
    if path.stat().st_size > _MOST_JSON:
        raise LoPAError(f"its {path.name} is longer than {_MOST_JSON} bytes")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise LoPAError(f"its {path.name} is no JSON: {one_line(error)}") from error


def read_tensors(path: Path, pixels: Collection[str] = ()) -> dict[str, Tensor]:
    """Reads a safetensors file of a bundle.

    Args:
        path: The file.
        pixels: Names of tensors in uint8.

    Raises:
        LoPAError: If it is not there or damaged, or holds other than finite real numbers and pixels.
    """
    _check_file(path)
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load_file(path)
    except Exception as error:  # safetensors and torch raise whatever a foreign file makes them stumble over
        raise LoPAError(f"its {path.name} is damaged: {one_line(error)}") from error
    for key, value in tensors.items():
        if value.dtype not in ((torch.uint8,) if key in pixels else _DTYPES):
            wanted = "pixels in uint8" if key in pixels else "tensors of real numbers"
            raise LoPAError(f"its {path.name} must hold {wanted}, {shown(key)} is {value.dtype}")
        if not value.isfinite().all():
            raise LoPAError(f"{shown(key)} in its {path.name} is NaN or infinite in part")
    return tensors


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise LoPAError(f"it has no regular file {path.name}")


def _config(values: Any) -> BundleConfig:
    version = values.get("format_version") if isinstance(values, dict) else None
    if type(version) is not int or version < 1:
        raise LoPAError(f"no bundle of LoPA Lightning: its format_version is {shown(version)}")
    if version > FORMAT_VERSION:
        raise LoPAError(
            f"it has format_version {version}, and this version of LoPA Lightning reads up to {FORMAT_VERSION}; "
            "update it"
        )
    config = built(values, BundleConfig, CONFIG)
    assert isinstance(config, BundleConfig)
    return config


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a safetensors file that whoever may read the folder may read; the library's own is its owner's alone."""
    whole = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    path.write_bytes(safetensors.torch.save(whole, metadata={"format": "pt"}))

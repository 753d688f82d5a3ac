"""Where pretrained models and tokenizers come from: one loader for hub ids, folders and packages."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch.distributed.device_mesh import DeviceMesh
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from lopa_lightning.backbones.headers import check_files, check_layers, missing_weights, unfit_weights, weight_files
from lopa_lightning.backbones.quantization import Quantization, check_quantization, quantization_config
from lopa_lightning.backbones.sharded_weights import read_to_shards
from lopa_lightning.errors import LoPAError, one_line

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Family = Literal["encoder", "masked_lm", "causal_lm"]

_AUTO_CLASSES: dict[Family, Any] = {
    "encoder": AutoModel,
    "masked_lm": AutoModelForMaskedLM,
    "causal_lm": AutoModelForCausalLM,
}
_PACKAGE = "package:"


@dataclass(frozen=True)
class PretrainedSpec:
    """A pretrained model and how to load it.

    Args:
        name: Hub id, folder, or ``package:NAME/FOLDER`` for weights inside an installed Python package.
        revision: Branch, tag or commit on the hub.
        dtype: Number format of the weights; ``auto`` takes the one they were saved in.
        attn_implementation: ``sdpa``, ``eager``, ``flash_attention_2``, ...; None lets transformers choose.
        trust_remote_code: Whether Python code that comes with the model may run.
        gradient_checkpointing: Whether layers are computed a second time in the backward pass instead of
            keeping what they computed: about a third more time, a small part of the memory.
        compile: Whether torch compiles the layers at the first training step, which takes a minute and a C++ compiler.
        quantization: How the frozen matrices of the layers are kept, see
            :mod:`~lopa_lightning.backbones.quantization`; None for as ``dtype`` says.

    Raises:
        LoPAError: If ``quantization`` is unknown.
    """

    name: str
    revision: str | None = None
    dtype: Dtype = "auto"
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    gradient_checkpointing: bool = False
    compile: bool = False
    quantization: Quantization | None = None

    def __post_init__(self) -> None:
        check_quantization(self.quantization)
        check_dtype(self.dtype)

    def location(self) -> str:
        """The hub id or folder that ``name`` stands for, ``~`` expanded.

        Raises:
            LoPAError: If ``name`` is a package that is not installed, or has no such folder.
        """
        if not self.name.startswith(_PACKAGE):
            return os.path.expanduser(self.name)
        package, _, folder = self.name.removeprefix(_PACKAGE).partition("/")
        top, *inner = package.split(".")
        # Found without an import: of a dotted name even looking it up would import the first part.
        found = None
        with contextlib.suppress(ValueError):  # of a module without a spec, such as __main__
            found = importlib.util.find_spec(top) if top.isidentifier() else None
        if found is None or not found.submodule_search_locations:
            raise LoPAError(f"{self.name!r}: the Python package {package!r} is not installed (pip install it first)")
        parts = [*inner, *folder.split("/")]
        path = Path(found.submodule_search_locations[0], *parts)
        if ".." in parts or "\0" in folder or folder.startswith("/") or not path.is_dir():
            raise LoPAError(f"{self.name!r}: the Python package {package!r} has no folder {folder!r}")
        return str(path)

    def source_options(self) -> dict[str, Any]:
        """What every ``from_pretrained`` is told of where the files come from."""
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}


def check_dtype(dtype: str) -> None:
    """Raises a LoPAError if ``dtype`` is not one that weights can have here."""
    if dtype not in get_args(Dtype):
        raise LoPAError(f"dtype must be one of {', '.join(get_args(Dtype))}, got {dtype!r}")


def load_config(spec: PretrainedSpec) -> PretrainedConfig:
    """Reads a model's config.

    Raises:
        LoPAError: If there is no such model.
    """
    location = spec.location()
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(location, **spec.source_options())
    except Exception as error:  # transformers raises whatever a foreign file makes it stumble over, here and below
        raise _not_found("model", spec, error) from error
    if (layers := getattr(config, "num_hidden_layers", 1)) < 1:
        raise LoPAError(f"the config of {spec.name!r} has {layers} layers; there must be at least 1")
    return config


def load_tokenizer(spec: PretrainedSpec) -> PreTrainedTokenizerBase:
    """Reads a model's tokenizer.

    Raises:
        LoPAError: If there is no such tokenizer, it knows special tokens alone, or it has no fast (Rust) version,
            which truncation by characters needs.
    """
    location = spec.location()
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(location, **spec.source_options())
    except Exception as error:
        raise _not_found("tokenizer", spec, error) from error
    if not tokenizer.is_fast:
        raise LoPAError(f"{spec.name!r} has no fast tokenizer (tokenizer.json), which is needed here")
    # Where its files are not there, transformers makes one of the kind that goes with the config.
    if set(tokenizer.get_vocab().values()) <= {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}:
        raise LoPAError(
            f"no tokenizer found for {spec.name!r}: its files (tokenizer.json) are missing, or name no words; save the "
            "tokenizer beside the model"
        )
    return tokenizer


def load_model(spec: PretrainedSpec, family: Family, mesh: DeviceMesh | None = None) -> PreTrainedModel:
    """Loads pretrained weights.

    Args:
        spec: The model.
        family: Which head it is to have: ``encoder`` none, ``masked_lm`` or ``causal_lm`` a language model's.
        mesh: The processes that the layers are sharded over; None for whole ones.

    Returns:
        The model in eval mode, every parameter without gradient.

    Raises:
        LoPAError: If there is no such model, its architecture has no such head, or the files lack
            weights, which transformers would otherwise fill with random numbers; or if it is to be quantised,
            and that cannot be done here.
    """
    config = load_config(spec)
    options = {"dtype": spec.dtype, **_class_options(config, family)}
    if spec.attn_implementation is not None:
        options["attn_implementation"] = spec.attn_implementation
    if spec.quantization is not None:
        if mesh is not None:
            raise LoPAError(
                f"a backbone with quantization {spec.quantization!r} cannot be sharded: its weights are no plain "
                "tensors; use strategy: ddp, or quantization: null"
            )
        options["quantization_config"] = quantization_config(spec.quantization, _dtype(spec, config))
    if mesh is not None and (sharded := _load_sharded(spec, family, config, mesh)) is not None:
        return freeze(sharded)
    try:
        with _quiet():
            model, report = _AUTO_CLASSES[family].from_pretrained(
                spec.location(),
                config=config,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # these are refused below, by name
                **options,
                **spec.source_options(),
            )
    except OSError as error:
        raise _not_found("model weights", spec, error) from error
    except Exception as error:
        raise LoPAError(f"the weights of {spec.name!r} cannot be loaded: {one_line(error)}") from error
    if missing := sorted(report["missing_keys"]):
        raise missing_weights(spec.name, model, missing)
    for tensor, saved, wanted in report["mismatched_keys"]:
        raise unfit_weights(spec.name, tensor, saved, wanted)
    check_layers(spec.name, model, set(report["unexpected_keys"]), set(model.state_dict()))
    return freeze(model)


def unloaded_model(spec: PretrainedSpec, family: Family) -> PreTrainedModel:
    """Builds a model as it will be loaded, in its dtype, with initial values in place of weights.

    Args:
        spec: The model.
        family: Which head it is to have.

    Raises:
        LoPAError: If there is no such model, or its architecture has no such head.
    """
    return _built(spec, family, load_config(spec))


def _built(spec: PretrainedSpec, family: Family, config: PretrainedConfig) -> PreTrainedModel:
    options = _class_options(config, family)
    if spec.attn_implementation is not None:
        options["attn_implementation"] = spec.attn_implementation
    try:
        model: PreTrainedModel = _AUTO_CLASSES[family].from_config(
            config, trust_remote_code=spec.trust_remote_code, dtype=_dtype(spec, config), **options
        )
    except Exception as error:
        how = f" with attn_implementation {spec.attn_implementation!r}" if spec.attn_implementation else ""
        raise LoPAError(f"the config of {spec.name!r} makes no model{how}: {one_line(error)}") from error
    return freeze(model)


def _dtype(spec: PretrainedSpec, config: PretrainedConfig) -> torch.dtype:
    """Returns the dtype that weights will have."""
    found: Any = (config.dtype if spec.dtype == "auto" else spec.dtype) or torch.float32
    dtype: torch.dtype = getattr(torch, found) if isinstance(found, str) else found
    return dtype


def _load_sharded(spec: PretrainedSpec, family: Family, config: PretrainedConfig, mesh: DeviceMesh) -> Any:
    """Reads each process's part alone; None where that cannot be done, and the whole must be read to be sharded."""
    files = weight_files(spec.location(), spec.source_options())
    if not files or (spec.dtype == "auto" and config.dtype is None):
        return None
    return read_to_shards(functools.partial(unloaded_model, spec, family), files, mesh)


def meta_model(spec: PretrainedSpec, family: Family) -> PreTrainedModel:
    """Builds a model without weights, on the ``meta`` device: its shapes at no cost.

    Args:
        spec: The model.
        family: Which head it is to have.

    Raises:
        LoPAError: If there is no such model, or its architecture has no such head.
    """
    with torch.device("meta"):
        return _built(spec, family, load_config(spec))


def checked_shapes(spec: PretrainedSpec, family: Family) -> PreTrainedModel:
    """Builds a model on the ``meta`` device, and refuses weights that cannot be its own before one is read.

    Args:
        spec: The model.
        family: Which head it is to have.

    Raises:
        LoPAError: As :func:`meta_model` and :func:`~lopa_lightning.backbones.headers.check_files`.
    """
    model = meta_model(spec, family)
    check_files(spec.name, model, spec.location(), spec.source_options())
    return model


def accepted_inputs(model: PreTrainedModel) -> frozenset[str]:
    """What a model's ``forward`` takes by name."""
    return frozenset(inspect.signature(model.forward).parameters)


def has_token_types(model: PreTrainedModel) -> bool:
    """Whether a model tells the two texts of a pair apart by token types."""
    return "token_type_ids" in accepted_inputs(model) and getattr(model.config, "type_vocab_size", 0) > 1


def is_causal(model: PreTrainedModel) -> bool:
    """Whether no token sees a later one, as all of a model's attention says of itself.

    False where it says nothing, as in some old architectures.
    """
    own = [bool(part.is_causal) for part in model.modules() if hasattr(part, "is_causal")]
    return bool(own) and all(own)


def hidden_size(config: PretrainedConfig) -> int:
    """Width of a model's last hidden states."""
    # OPT's smaller models project them back to the embeddings' width.
    return int(getattr(config, "word_embed_proj_dim", None) or config.hidden_size)


def first_position(model: PreTrainedModel) -> int:
    """Position of the first token: RoBERTa and its family count from ``padding_idx + 1``.

    Args:
        model: Without a head.
    """
    positions = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    padding_idx = getattr(positions, "padding_idx", None)
    return 0 if padding_idx is None else int(padding_idx) + 1


def max_positions(model: PreTrainedModel) -> int | None:
    """Returns how many tokens a model has positions for; None if that is not limited.

    Args:
        model: Without a head.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    # DeBERTa and others say -1 for relative positions without a limit.
    return None if limit is None or limit <= 0 else int(limit) - first_position(model)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences transformers' report on unused weights: a head that is left out is left out on purpose."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(transformers_logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def freeze(model: PreTrainedModel) -> PreTrainedModel:
    """Takes the gradient from every parameter and switches dropout off."""
    model.requires_grad_(False)
    model.train(False)
    return model


def _class_options(config: PretrainedConfig, family: Family) -> dict[str, Any]:
    """What the model's class must be told, found before its weights are read.

    An encoder's pooler is left out: nothing here reads it, and most checkpoints lack its weights.
    """
    auto_class = _AUTO_CLASSES[family]
    if family == "causal_lm" and type(config) in AutoModelForMaskedLM._model_mapping and not config.is_decoder:
        raise LoPAError(f"{config.model_type!r} reads in both directions; use objective: masked_lm or head")
    if config.is_encoder_decoder:
        raise LoPAError(
            f"{config.model_type!r} is an encoder-decoder model; a soft prompt here needs one stack of layers"
        )
    if type(config) not in auto_class._model_mapping:
        if hasattr(config, "auto_map"):  # code of the model's own, which only trust_remote_code admits
            return {}
        raise LoPAError(
            f"{config.model_type!r} models have no {family} version ({auto_class.__name__}) in transformers"
        )
    model_class = auto_class._model_mapping[type(config)]
    return {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(model_class).parameters else {}


def _not_found(what: str, spec: PretrainedSpec, error: Exception) -> LoPAError:
    at = f" at revision {spec.revision!r}" if spec.revision else ""
    if os.path.exists(spec.location()):
        return LoPAError(f"no usable {what} in {spec.name!r}: {one_line(error)}")
    return LoPAError(f"no {what} found for {spec.name!r}{at}, as a folder or a reachable hub id: {one_line(error)}")

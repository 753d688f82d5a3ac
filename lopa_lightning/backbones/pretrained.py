"""Loads pretrained models and tokenizers from hub ids, folders and packages."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn
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

from lopa_lightning.backbones.headers import check_files, check_weights, weight_files
from lopa_lightning.backbones.quantization import check_quantization, quantization_config
from lopa_lightning.backbones.sharding import read_to_shards
from lopa_lightning.backbones.transformers_internals import class_of
from lopa_lightning.errors import LoPAError, one_line, one_of

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
    """Names a pretrained model, and how to load it.

    Args:
        name: Hub id, folder, or ``package:NAME/FOLDER`` for weights inside an installed Python package.
        revision: Branch, tag or commit on the hub.
        dtype: dtype of the weights; ``auto`` takes the one they were saved in.
        attn_implementation: ``sdpa``, ``eager``, ``flash_attention_2``, ...; None lets transformers choose.
        trust_remote_code: Whether Python code that comes with the model may run.
        gradient_checkpointing: Whether layers are computed a second time in the backward pass and keep their inputs
            alone: about a third more time, a small part of the memory.
        compile: Whether torch compiles the layers at the first training step, which takes a minute and a C++ compiler.
        quantization: transformers' ``quantization_config``, see :mod:`~lopa_lightning.backbones.quantization`.

    Raises:
        LoPAError: If ``dtype`` or the method of ``quantization`` is unknown.
    """

    name: str
    revision: str | None = None
    dtype: Dtype = "auto"
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    gradient_checkpointing: bool = False
    compile: bool = False
    quantization: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        check_quantization(self.quantization)
        one_of("dtype", self.dtype, get_args(Dtype))

    def location(self) -> str:
        """Returns the hub id or folder that ``name`` stands for, ``~`` expanded.

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
        """Returns what every ``from_pretrained`` is told of where the files come from.

        Raises:
            LoPAError: If a revision is given for a folder, which has none.
        """
        if self.revision is not None and os.path.isdir(folder := self.location()):
            raise LoPAError(f"revision is of a model on the hub, and {folder!r} is a folder; got {self.revision!r}")
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}


def load_config(spec: PretrainedSpec) -> PretrainedConfig:
    """Reads a model's config.

    Raises:
        LoPAError: If there is no such model.
    """
    config: PretrainedConfig = _from_pretrained(AutoConfig, "model", spec)
    if config.model_type in ("clip", "siglip"):  # of the two models in it, the one that reads images
        config = config.vision_config
    if (layers := getattr(config, "num_hidden_layers", 1)) < 1:
        raise LoPAError(f"the config of {spec.name!r} has {layers} layers; there must be at least 1")
    return config


def load_tokenizer(spec: PretrainedSpec) -> PreTrainedTokenizerBase:
    """Reads a model's tokenizer.

    Raises:
        LoPAError: If there is no such tokenizer, it knows special tokens alone, or it has no fast (Rust) version,
            which truncation by characters needs.
    """
    tokenizer: PreTrainedTokenizerBase = _from_pretrained(AutoTokenizer, "tokenizer", spec)
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
    options = {"dtype": spec.dtype, **_class_options(spec, family, config)}
    if spec.quantization is not None:
        if mesh is not None:
            raise LoPAError(
                "a quantised backbone cannot be sharded: its weights are no plain tensors; use strategy: ddp, or "
                "quantization: null"
            )
        options["quantization_config"] = quantization_config(spec.quantization)
    # Without a dtype in the config, transformers looks into the weights for one.
    if mesh is not None and (spec.dtype != "auto" or config.dtype is not None):
        files, model = weight_files(spec.location(), spec.source_options()), meta_model(spec, family)
        if files and read_to_shards(model, files, mesh):
            return model
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
    unfit = list(report["mismatched_keys"])
    check_weights(spec.name, model, report["missing_keys"], unfit, report["unexpected_keys"], model.state_dict())
    return freeze(model)


def meta_model(spec: PretrainedSpec, family: Family) -> PreTrainedModel:
    """Builds a model without weights, on the ``meta`` device: its shapes and dtypes at no cost.

    Args:
        spec: The model.
        family: Which head it is to have.

    Raises:
        LoPAError: If there is no such model, or its architecture has no such head.
    """
    config = load_config(spec)
    options = _class_options(spec, family, config)
    dtype = (config.dtype if spec.dtype == "auto" else spec.dtype) or torch.float32
    try:
        with torch.device("meta"):
            model: PreTrainedModel = _AUTO_CLASSES[family].from_config(
                config, trust_remote_code=spec.trust_remote_code, dtype=dtype, **options
            )
    except Exception as error:
        how = f" with attn_implementation {spec.attn_implementation!r}" if spec.attn_implementation else ""
        raise LoPAError(f"the config of {spec.name!r} makes no model{how}: {one_line(error)}") from error
    return freeze(model)


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
    """Returns what a model's ``forward`` takes by name."""
    return frozenset(inspect.signature(model.forward).parameters)


def has_token_types(model: PreTrainedModel) -> bool:
    """Returns whether a model tells the two texts of a pair apart by token types."""
    return "token_type_ids" in accepted_inputs(model) and getattr(model.config, "type_vocab_size", 0) > 1


def is_causal(model: PreTrainedModel) -> bool:
    """Returns whether no token sees a later one, as all of a model's attention says of itself.

    False where it says nothing, as in some old architectures, or where its config says so.
    """
    own = [bool(part.is_causal) for part in model.modules() if hasattr(part, "is_causal")]
    return bool(own) and all(own) and getattr(model.config, "is_causal", True) is not False


def hidden_size(config: PretrainedConfig) -> int:
    """Returns the width of a model's last hidden states."""
    # OPT's smaller models project them back to the embeddings' width.
    return int(getattr(config, "word_embed_proj_dim", None) or config.hidden_size)


def first_position(model: PreTrainedModel) -> int:
    """Returns the position of the first token, which a model that is given positions does not add by itself.

    RoBERTa and its family count from ``padding_idx + 1``; YOSO and others from 2, by which their table is longer.

    Args:
        model: Without a head.
    """
    table = _position_table(model)
    if table is None:
        return 0
    if table.padding_idx is not None:
        return int(table.padding_idx) + 1
    said = getattr(model.config, "max_position_embeddings", None) or table.num_embeddings
    return max(0, table.num_embeddings - int(said))


def max_positions(model: PreTrainedModel) -> int | None:
    """Returns how many tokens a model has positions for; None if that is not limited.

    Args:
        model: Without a head.
    """
    table = _position_table(model)
    limit = getattr(model.config, "max_position_embeddings", None) or getattr(model.config, "max_seq_len", None)
    # DeBERTa and others say -1 for relative positions without a limit.
    if limit is None or limit <= 0:
        return None
    return int(limit if table is None else table.num_embeddings) - first_position(model)


def _position_table(model: PreTrainedModel) -> nn.Embedding | None:
    """Returns the table of learned positions, where a model has it beside its other embeddings."""
    found = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    return found if isinstance(found, nn.Embedding) else None


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


@contextlib.contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Switches dropout off in its block, an adapter's too."""
    training = [part for part in model.modules() if part.training]
    model.train(False)
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _class_options(spec: PretrainedSpec, family: Family, config: PretrainedConfig) -> dict[str, Any]:
    """Returns what the model's class must be told, or refuses a class that cannot serve.

    An encoder's pooler is left out: nothing here reads it, and most checkpoints lack its weights.
    """
    options = {} if spec.attn_implementation is None else {"attn_implementation": spec.attn_implementation}
    auto_class, kind = _AUTO_CLASSES[family], config.model_type
    if family == "causal_lm" and class_of(AutoModelForMaskedLM, config) is not None and not config.is_decoder:
        raise LoPAError(f"{kind!r} reads in both directions; use objective: masked_lm or head")
    if not hasattr(config, "hidden_size"):
        parts = ", ".join(config.sub_configs or {})
        why = f"is several models in one ({parts}); use its model of text alone" if parts else "has no hidden_size"
        raise LoPAError(f"{kind!r} {why}")
    if config.is_encoder_decoder:
        raise LoPAError(f"{kind!r} is an encoder-decoder model; a soft prompt here needs one stack of layers")
    model_class = class_of(auto_class, config)
    if model_class is None:
        if hasattr(config, "auto_map"):  # code of the model's own, which only trust_remote_code admits
            return options
        raise LoPAError(f"{kind!r} models have no {family} version ({auto_class.__name__}) in transformers")
    pooler = "add_pooling_layer" in inspect.signature(model_class).parameters
    return {**options, "add_pooling_layer": False} if pooler else options


def _from_pretrained(auto_class: Any, what: str, spec: PretrainedSpec) -> Any:
    """Reads what is no weights."""
    location = spec.location()
    try:
        return auto_class.from_pretrained(location, **spec.source_options())
    except Exception as error:  # transformers raises whatever a foreign file makes it stumble over
        raise _not_found(what, spec, error) from error


def _not_found(what: str, spec: PretrainedSpec, error: Exception) -> LoPAError:
    """Returns the error for a folder or hub id that has not what is needed."""
    at = f" at revision {spec.revision!r}" if spec.revision else ""
    if os.path.exists(spec.location()):
        return LoPAError(f"no usable {what} in {spec.name!r}: {one_line(error)}")
    return LoPAError(f"no {what} found for {spec.name!r}{at}, as a folder or a reachable hub id: {one_line(error)}")

"""The names of transformers that are not public, each behind one function that says why it is needed."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel, conversion_mapping


def layer_class_names(model: PreTrainedModel) -> set[str]:
    """Returns what a model's layers are called: the classes that, by ``_no_split_modules``, lie on one device whole."""
    parts: list[Any] = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    return {name for part in parts for name in part._no_split_modules or ()}


def class_of(auto_class: Any, config: PretrainedConfig) -> Any:
    """Returns an auto class's model class, whose signature must be known before it is called; None for none."""
    return auto_class._model_mapping.get(type(config), None)


def without_ignored(model: PreTrainedModel, missing: Iterable[str], unused: Iterable[str]) -> tuple[list[str], ...]:
    """Returns the missing and the unused tensors that transformers, too, reports after a load."""
    patterns = model._keys_to_ignore_on_load_missing, model._keys_to_ignore_on_load_unexpected
    return tuple(
        [key for key in sorted(keys) if not any(re.search(pattern, key) for pattern in ignored or ())]
        for keys, ignored in zip((missing, unused), patterns)
    )


def conversions(model: PreTrainedModel) -> list[Any]:
    """Returns what transformers does to saved tensors of this kind of model, renaming included."""
    known: Any = conversion_mapping
    kinds = model.config.model_type, type(model).__name__, type(model.base_model).__name__
    return [change for kind in kinds for change in known.get_checkpoint_conversion_mapping(kind) or []]


def is_converted(model: PreTrainedModel) -> bool:
    """Returns whether transformers does more to saved tensors than to rename them, or keeps some in float32."""
    if model._keep_in_fp32_modules or getattr(model, "_keep_in_fp32_modules_strict", None):
        return True
    return any(type(change).__name__ == "WeightConverter" for change in conversions(model))


def attention_implementation(model: PreTrainedModel) -> str:
    """Returns how a model computes attention, to set it back after a change; it can be set, but not be asked for."""
    name: str = model.config._attn_implementation
    return name

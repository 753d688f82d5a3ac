"""What a checkpoint holds, and what it may be loaded into.

A checkpoint has the trained tensors and nothing of the frozen models but their identity: what their
configs say, and a hash of a sample of their weights. Hyperparameters are plain data, so that a checkpoint
can be read without running code from it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from lopa_lightning.errors import LoPAError
from lopa_lightning.frozen.quantization import dense
from lopa_lightning.frozen.sharding import values_at

IDENTITY_KEY = "lopa_identity"

_SAMPLED_VALUES = 16
# Config entries that say where a model came from or how it is run, not what it computes.
_INCIDENTAL = {
    *("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"),
    *("id2label", "label2id", "problem_type", "pad_token_id", "bos_token_id", "eos_token_id"),
    *("quantization_config",),  # the spec's own entry says it in a word
    *("return_dict", "output_hidden_states", "output_attentions", "chunk_size_feed_forward", "is_encoder_decoder"),
}


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Tells whether two frozen models are the same, whatever they are called and wherever they lie.

    Args:
        model: A transformers model on a real device.

    Returns:
        ``config``: what the config says of the computation. ``weights``: hash of every parameter's
        name, shape and up to 16 evenly spaced values, rounded to bfloat16 so that the same weights
        loaded in float32 and bfloat16 agree.
    """
    config = model.config
    assert isinstance(config, PretrainedConfig)
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        step = max(1, parameter.numel() // _SAMPLED_VALUES)
        places = torch.arange(0, parameter.numel(), step)[:_SAMPLED_VALUES]
        sample = values_at(dense(parameter.detach()), places).to("cpu", torch.bfloat16)
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(sample.view(torch.int16).numpy().tobytes())
    facts = _lasting(json.loads(config.to_json_string(use_diff=False)))
    return {"config": facts, "weights": digest.hexdigest()[:16]}


def _lasting(facts: Any) -> Any:
    if not isinstance(facts, dict):
        return facts
    return {key: _lasting(value) for key, value in facts.items() if key not in _INCIDENTAL}


def _shared_facts(facts: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Entries that both configs have: a release of transformers may add some or drop some."""
    return {
        key: _shared_facts(value, other[key])
        if isinstance(value, Mapping) and isinstance(other[key], Mapping)
        else value
        for key, value in facts.items()
        if key in other
    }


def read(path: Any, map_location: Any = "cpu") -> dict[str, Any]:
    """Reads a checkpoint as plain data; no pickled code runs.

    Raises:
        LoPAError: If it is not there, or is not a checkpoint of this package.
    """
    try:
        saved = torch.load(path, map_location=map_location, weights_only=True)
    except FileNotFoundError:
        raise LoPAError(f"no checkpoint at {path}") from None
    except Exception as error:  # torch raises whatever a foreign file makes it stumble over
        raise LoPAError(f"{path} cannot be read as a checkpoint: {str(error).splitlines()[0]}") from error
    if not isinstance(saved, dict) or IDENTITY_KEY not in saved:
        raise LoPAError(f"{path} is no checkpoint of LoPA Lightning: it names no frozen models that it belongs to")
    return saved


def differences(
    saved: Mapping[str, Any],
    current: Mapping[str, Any],
    path: str = "",
    between: tuple[str, str] = ("the checkpoint", "this run"),
) -> list[str]:
    """Lists where two nested mappings differ.

    Args:
        saved: The checkpoint's.
        current: This run's.
        path: Name of the mapping, for the messages.
        between: Whose the two are, for the messages.

    Returns:
        One line for each difference, empty if there is none.

    Example:
        >>> differences({"prompt": {"m": 5, "r": 4}}, {"prompt": {"m": 10, "r": 4}})
        ['prompt.m: the checkpoint has 5, this run 10']
    """
    lines = []
    for key in [*saved, *(k for k in current if k not in saved)]:
        old, new, name = saved.get(key), current.get(key), f"{path}{key}"
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += differences(old, new, f"{name}.", between)
        elif old != new:
            lines.append(f"{name}: {between[0]} has {old!r}, {between[1]} {new!r}")
    return lines


def check_identity(saved: Mapping[str, Any] | None, current: Mapping[str, Any]) -> None:
    """Refuses a checkpoint that was made with other frozen models, another method or another task.

    Args:
        saved: Identity in the checkpoint, None if it has none.
        current: Identity of the module that is to load it.

    Raises:
        LoPAError: If they differ; the message says in what.
    """
    if saved is None:
        raise LoPAError("this is no checkpoint of LoPA Lightning: it does not say which frozen models it belongs to")
    lines = differences(_comparable(saved, current), _comparable(current, saved))
    if lines:
        names = [
            f"{part}: the checkpoint was made with {saved[part]['name']!r}, this run has {current[part]['name']!r}"
            for part in ("backbone", "instance_encoder")
            if any(line.startswith(f"{part}.") for line in lines)
            and saved.get(part)
            and current.get(part)
            and saved[part]["name"] != current[part]["name"]
        ]
        raise LoPAError("the checkpoint does not fit this model:\n  " + "\n  ".join([*names, *lines]))


def check_tensors(saved: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Refuses trained tensors that are not exactly the ones that are trained here.

    Raises:
        LoPAError: If names are missing, too many, or shapes differ; the message lists them.
    """
    lines = [f"{name}: missing in the checkpoint" for name in wanted if name not in saved]
    lines += [f"{name}: not trained here" for name in saved if name not in wanted]
    lines += [
        f"{name}: the checkpoint has {tuple(saved[name].shape)}, this run {tuple(wanted[name].shape)}"
        for name in wanted
        if name in saved and saved[name].shape != wanted[name].shape
    ]
    if lines:
        raise LoPAError("the checkpoint's trained tensors do not fit this model:\n  " + "\n  ".join(lines))


def factory_spec(factory: Callable[..., Any]) -> dict[str, Any]:
    """Describes a class, or a ``functools.partial`` of one, as ``class_path`` and ``init_args``.

    Args:
        factory: What is called later for an object.

    Returns:
        The class's importable path, and every argument that has a plain value, defaults included.

    Raises:
        TypeError: If it is neither, such as a lambda, and so could not be rebuilt from a checkpoint.
    """
    given: dict[str, Any] = {}
    target: Any = factory
    if isinstance(factory, functools.partial):
        # The CLI's partials call a helper with the class among its arguments.
        classes = [part for part in (factory.func, *factory.args) if isinstance(part, type)]
        target, given = (classes[-1] if classes else None), factory.keywords
    if not isinstance(target, type):
        raise TypeError(f"{factory!r} cannot be stored in a checkpoint; pass a class or a functools.partial of one")
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(target).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    return {"class_path": class_path(target), "init_args": plain({**defaults, **given})}


def class_path(cls: type) -> str:
    """Where a class can be imported from.

    Raises:
        TypeError: If it is defined within a function.
    """
    if "<locals>" in cls.__qualname__:
        raise TypeError(f"{cls.__qualname__} cannot be stored in a checkpoint; define it at the top level of a module")
    return f"{cls.__module__}.{cls.__qualname__}"


def plain(value: Any) -> Any:
    """Turns hyperparameters into plain data, which a checkpoint can hold without pickled code.

    Raises:
        TypeError: If a value has no plain form.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool):
        return value
    for kind in (int, float, str):
        if isinstance(value, kind):
            return kind(value)  # of a subclass, only what is plain
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    if isinstance(value, Iterable):
        return [plain(item) for item in value]
    if callable(value):
        return factory_spec(value)
    raise TypeError(f"hyperparameter {value!r} of type {type(value).__name__} cannot be stored in a checkpoint")


def _comparable(identity: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Identity without what a model is called (a folder and a hub id may hold the same), and with shared facts."""
    parts: dict[str, Any] = {}
    for part, facts in identity.items():
        if isinstance(facts, Mapping):
            facts = {key: value for key, value in facts.items() if key not in ("name", "revision")}
            theirs = other.get(part)
            if isinstance(theirs, Mapping) and "config" in facts and "config" in theirs:
                facts["config"] = _shared_facts(facts["config"], theirs["config"])
        parts[part] = facts
    return parts

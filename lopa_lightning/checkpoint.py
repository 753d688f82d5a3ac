"""Tells what a checkpoint may be loaded into.

A checkpoint has the trained tensors and nothing of the frozen models but their identity: what their
configs say, and a hash of a sample of their weights. Of hyperparameters it holds those that differ from
their defaults, as plain data, so that it can be read without running code from it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from lopa_lightning import bundle_file, checkpoint_file
from lopa_lightning.backbones.quantization import dense
from lopa_lightning.backbones.sharding import whole
from lopa_lightning.errors import LoPAError, shown
from lopa_lightning.migrations import HYPERPARAMETERS as HYPERPARAMETERS
from lopa_lightning.migrations import IDENTITY_KEY as IDENTITY_KEY
from lopa_lightning.plain import with_arguments, with_defaults
from lopa_lightning.prompts.base import PromptEncoder

_MODELS = ("backbone", "instance_encoder")
_LATER = {"instance_template"}  # of a task, which earlier checkpoints do not say
_SAMPLED_VALUES = 16
_SHOWN = 6

OF_TRAINING = "net.instance_readout."
"""How names of tensors begin that serve training alone, and are in no bundle."""
# Config entries that say where a model came from or how it is run, not what it computes.
_INCIDENTAL = {
    *("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"),
    *("id2label", "label2id", "problem_type", "pad_token_id", "bos_token_id", "eos_token_id"),
    *("quantization_config",),  # the spec's own entry says it in a word
    *("return_dict", "output_hidden_states", "output_attentions", "chunk_size_feed_forward", "is_encoder_decoder"),
}


def read(path: Any, map_location: Any = "cpu") -> dict[str, Any]:
    """Reads a checkpoint, or a bundle as one; no code runs.

    Args:
        path: A file, see :func:`lopa_lightning.checkpoint_file.read`, or the folder of a bundle.
        map_location: See ``torch.load``; not asked for a bundle.

    Raises:
        LoPAError: If it is not there, is damaged, or is neither.
    """
    if bundle_file.is_bundle(path):
        config, tensors = bundle_file.read(path)
        return bundle_file.as_checkpoint(config, tensors)
    return checkpoint_file.read(path, map_location)


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Tells whether two frozen models are the same, whatever they are called and wherever they lie.

    Args:
        model: A transformers model on a real device.

    Returns:
        ``config``: what the config says of the computation. ``weights``: hash of every parameter's
        name, shape and up to 16 evenly spaced values, rounded to bfloat16 so that the same weights
        loaded in float32 and bfloat16 agree.
    """
    assert isinstance(model.config, PretrainedConfig)
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        step = max(1, parameter.numel() // _SAMPLED_VALUES)
        places = torch.arange(0, parameter.numel(), step)[:_SAMPLED_VALUES]
        sample = whole(dense(parameter.detach())).flatten()[places.to(parameter.device)].to("cpu", torch.bfloat16)
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return {"config": config_facts(model.config), "weights": digest.hexdigest()[:16]}


def digest(state: Mapping[str, Tensor]) -> str:
    """Returns a hash of trained tensors, which may be spread over processes: names and all values."""
    found = hashlib.sha256()
    for name, value in state.items():
        found.update(name.encode() + whole(value.detach()).cpu().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def config_facts(config: PretrainedConfig) -> Any:
    """Returns what a config says of the computation."""
    return _lasting(json.loads(config.to_json_string(use_diff=False)))


def _lasting(facts: Any) -> Any:
    if not isinstance(facts, dict):
        return facts
    return {key: _lasting(value) for key, value in facts.items() if key not in _INCIDENTAL}


def _shared_facts(facts: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the entries that both configs have: a release of transformers may add some or drop some."""
    return {
        key: _shared_facts(value, other[key])
        if isinstance(value, Mapping) and isinstance(other[key], Mapping)
        else value
        for key, value in facts.items()
        if key in other
    }


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
        old, new, name = saved.get(key), current.get(key), f"{path}{shown(key)[1:-1]}"
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += differences(old, new, f"{name}.", between)
        elif old != new:
            lines.append(f"{name}: {between[0]} has {shown(old)}, {between[1]} {shown(new)}")
    return lines


def check_identity(saved: Mapping[str, Any], current: Mapping[str, Any], weights: bool = True) -> None:
    """Refuses a checkpoint that was made with other frozen models, another method or another task.

    Args:
        saved: Identity in the checkpoint.
        current: Identity of the module that is to load it.
        weights: Whether to compare the frozen weights, which ``current`` lacks before they are loaded.

    Raises:
        LoPAError: If they differ; the message says in what.
    """
    told = {"name", "revision"} if weights else {"name", "revision", "weights"}
    lines = differences(_comparable(saved, current, told), _comparable(current, saved, told))
    if lines:
        names = [
            f"{part}: the checkpoint was made with {shown(old['name'])}, this run has {shown(new['name'])}"
            for part in _MODELS
            if any(line.startswith(f"{part}.") for line in lines)
            and isinstance(old := saved.get(part), Mapping)
            and isinstance(new := current.get(part), Mapping)
            and old.get("name", new["name"]) != new["name"]
        ]
        raise LoPAError(f"the checkpoint does not fit this model: {joined([*names, *lines])}")


def check_tensors(saved: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Refuses trained tensors that are not exactly the ones that are trained here.

    Raises:
        LoPAError: If names are missing, too many, shapes differ, or values are not finite in the dtype here; the
            message lists them. All that is for training alone may be missing, as it is in a bundle.
    """
    is_whole = any(name.startswith(OF_TRAINING) for name in saved)
    needed = [name for name in wanted if is_whole or not name.startswith(OF_TRAINING)]
    lines = [f"{name}: missing in the checkpoint" for name in needed if name not in saved]
    lines += [f"{shown(name)[1:-1]}: not trained here" for name in saved if name not in wanted]
    for name in [name for name in wanted if name in saved]:
        ours, theirs = wanted[name], saved[name]
        if theirs.shape != ours.shape:
            lines.append(f"{name}: the checkpoint has {tuple(theirs.shape)}, this run {tuple(ours.shape)}")
        elif not theirs.to(ours.dtype).isfinite().all():
            lines.append(f"{name}: NaN or infinite as {ours.dtype}")
    if lines:
        raise LoPAError(f"the checkpoint's trained tensors do not fit this model: {joined(lines)}")


def joined(lines: list[str]) -> str:
    """Joins the first few of a list for a message of one line."""
    more = f"; and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    return "; ".join(lines[:_SHOWN]) + more


def _comparable(identity: Mapping[str, Any], other: Mapping[str, Any], told: set[str]) -> dict[str, Any]:
    """Returns an identity without what models are called, since folder and hub id differ, and with shared facts.

    Args:
        identity: Of one side.
        other: Of the other.
        told: What of a part is not compared.
    """
    parts: dict[str, Any] = {}
    for part, facts in identity.items():
        theirs = other.get(part)
        if part in _MODELS and isinstance(facts, Mapping):
            facts = {key: value for key, value in facts.items() if key not in told}
            config, their_config = facts.get("config"), theirs.get("config") if isinstance(theirs, Mapping) else None
            if isinstance(config, Mapping) and isinstance(their_config, Mapping):
                facts["config"] = _shared_facts(config, their_config)
        elif part == "prompt_encoder":
            facts = with_arguments(facts, _lasting_arguments, PromptEncoder)
        elif part == "task" and isinstance(facts, Mapping) and isinstance(theirs, Mapping):
            facts = {key: value for key, value in facts.items() if key in theirs or key not in _LATER}
        parts[part] = facts
    return parts


def _lasting_arguments(method: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Adds defaults, and leaves out what shapes a method's training and not what it computes once it is trained."""
    passing = cast(type[PromptEncoder], method).start_arguments
    return {key: value for key, value in with_defaults(method, values).items() if key not in passing}

"""Turns checkpoints of earlier formats into the present one, when they are read.

For a new format: raise ``FORMAT``, add its step, and write its checkpoints with ``tests/checkpoints/write.py``.
A default that changes is a new format too: files hold only the arguments that differ from the defaults.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lopa_lightning.errors import LoPAError

FORMAT = 3
IDENTITY_KEY, HYPERPARAMETERS = "lopa_identity", "hyper_parameters"

_PATHS_IN_1 = {
    "lopa_lightning.modules.causal_lm.CausalLMModule": "causal_lm",
    "lopa_lightning.modules.classification.ClassificationModule": "classification",
    "lopa_lightning.prompts.dept.DePT": "dept",
    "lopa_lightning.prompts.idpg.IDPG": "idpg",
    "lopa_lightning.prompts.lopa.LoPA": "lopa",
    "lopa_lightning.prompts.none.NoPrompt": "none",
    "lopa_lightning.prompts.peft_prompt.PeftPromptTuning": "peft_prompt_tuning",
    "lopa_lightning.prompts.ptuning.PTuning": "p_tuning",
    "lopa_lightning.prompts.soft.PromptTuning": "prompt_tuning",
}

_QUANTIZATION_IN_1 = {
    "bitsandbytes_8bit": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "bitsandbytes_4bit": {
        **{"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        "bnb_4bit_use_double_quant": True,
    },
    "torchao_int8": {
        "quant_method": "torchao",
        "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {}}},
    },
}


def migrate(checkpoint: dict[str, Any]) -> None:
    """Brings a checkpoint to the present format, in place.

    Args:
        checkpoint: With hyperparameters and an identity.

    Raises:
        LoPAError: If its format is later than the present one, or none.
    """
    identity = checkpoint.get(IDENTITY_KEY)
    found = identity.get("format") if isinstance(identity, dict) else None
    if not isinstance(identity, dict) or type(found) is not int or found < 1:
        raise LoPAError(f"no checkpoint of LoPA Lightning: its format is {found!r}")
    if found > FORMAT:
        raise LoPAError(f"it has format {found}, and this version of LoPA Lightning reads up to {FORMAT}; update it")
    for steps in _STEPS[found - 1 :]:
        for step in steps:
            step(checkpoint[HYPERPARAMETERS], identity)
    identity["format"] = FORMAT


def _name_classes(hparams: dict[str, Any], identity: dict[str, Any]) -> None:
    """Gives modules and methods their short names."""
    for holder, key in [
        (hparams, "_class_path"),
        (hparams.get("prompt_encoder"), "class_path"),
        (identity.get("prompt_encoder"), "class_path"),
    ]:
        if isinstance(holder, dict) and isinstance(path := holder.get(key), str):
            holder[key] = _PATHS_IN_1.get(path, path)


def _nest_method(hparams: dict[str, Any], identity: dict[str, Any]) -> None:
    """Describes the method in an identity as hyperparameters do."""
    if isinstance(method := identity.get("prompt_encoder"), dict):
        identity["prompt_encoder"] = {
            "class_path": method.get("class_path"),
            "init_args": {key: value for key, value in method.items() if key != "class_path"},
        }


def _drop_packing(hparams: dict[str, Any], identity: dict[str, Any]) -> None:
    """Drops ``backbone.pack``: it was how batches are computed, not what."""
    if isinstance(backbone := hparams.get("backbone"), dict):
        backbone.pop("pack", None)


def _spell_quantization(hparams: dict[str, Any], identity: dict[str, Any]) -> None:
    """Writes ``quantization`` as transformers' own config in place of a short name."""
    for holder in (hparams.get("backbone"), identity):
        if isinstance(holder, dict) and isinstance(name := holder.get("quantization"), str):
            holder["quantization"] = _QUANTIZATION_IN_1.get(name, name)


def _split_task(hparams: dict[str, Any], identity: dict[str, Any]) -> None:
    """Puts a task's words and templates into its ``verbalizer``."""
    if isinstance(task := hparams.get("task"), dict):
        names = [name for name in ("words", "template", "causal_template", "instance_reads") if name in task]
        task["verbalizer"] = {name: task.pop(name) for name in names}


_Step = Callable[[dict[str, Any], dict[str, Any]], None]
_STEPS: tuple[tuple[_Step, ...], ...] = (
    (_name_classes, _nest_method, _drop_packing, _spell_quantization),
    (_split_task,),
)
"""The steps from format 1 to 2, from 2 to 3, and so on."""

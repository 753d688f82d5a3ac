"""Writes what PEFT has as PEFT saves it: a soft prompt that all texts share, and LoRA and IA³ adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from lopa_lightning.bundle_file import write_tensors
from lopa_lightning.errors import LoPAError, imported
from lopa_lightning.files import new_folder
from lopa_lightning.modules import LoPALightningModule

_TASK_TYPES = {"causal_lm": "CAUSAL_LM", "masked_lm": "FEATURE_EXTRACTION"}
_ADAPTERS = ("LORA", "IA3")


def write_peft(module: LoPALightningModule, out: Path, backbone: str | None = None) -> None:
    """Writes ``adapter_config.json`` and ``adapter_model.safetensors``.

    Args:
        module: With weights.
        out: The folder, which must not be there or be empty.
        backbone: What the backbone is called in it; by default as in the module.

    Raises:
        LoPAError: See :func:`check_peft`.
    """
    peft, kind = check_peft(module), _kind(module)
    net, name = module._net(), backbone or module.backbone_spec.name
    what = {"base_model_name_or_path": name, "inference_mode": True, "task_type": _TASK_TYPES[module.objective]}
    if module.adapter is not None:
        config = peft.get_peft_config({**module.adapter, **what, "peft_type": kind})
        state: dict[str, Tensor] = peft.get_peft_model_state_dict(net.backbone.model)
        tensors = {f"base_model.model.{key}": value for key, value in state.items()}
    else:
        table = net.prompt_encoder(None)[0].detach()
        tensors = {"prompt_embeddings": table}
        config = peft.PromptTuningConfig(
            num_virtual_tokens=len(table), token_dim=table.shape[1], num_transformer_submodules=1, **what
        )
    with new_folder(out, "OUT") as new:
        config.save_pretrained(str(new))
        write_tensors(new / "adapter_model.safetensors", tensors)


def check_peft(module: LoPALightningModule) -> Any:
    """Returns the package, if it has what a module trains.

    Args:
        module: Which need not have weights.

    Raises:
        LoPAError: If PEFT is not installed, or has no such method.
    """
    peft = imported("peft", "peft", "this needs PEFT")
    prompt, kind = module.shapes.prompt_encoder, _kind(module)
    method = type(prompt).__name__
    if module.objective == "head":
        raise LoPAError("PEFT has no such trained head; --to bundle has all that was trained")
    if module.train_backbone:
        raise LoPAError("all of the backbone was trained, which is no adapter; --to bundle has all that was trained")
    if module.adapter is not None:
        if kind not in _ADAPTERS or prompt.num_virtual_tokens:
            beside = f" beside {method}" if prompt.num_virtual_tokens else ""
            raise LoPAError(f"what can be written for PEFT is {' or '.join(_ADAPTERS)} alone, got {kind}{beside}")
        return peft
    if prompt.uses_instance:
        raise LoPAError(f"PEFT has no soft prompt that depends on the instance, as {method}'s does; use --to bundle")
    if prompt.num_virtual_tokens == 0 or prompt.token_offset() is not None:
        raise LoPAError(f"PEFT's prompt tuning has no {method}; use --to bundle")
    if module.placement != "before":
        raise LoPAError(f"PEFT puts soft prompts before the text, and placement is {module.placement}; use --to bundle")
    return peft


def _kind(module: LoPALightningModule) -> str:
    return str((module.adapter or {}).get("peft_type", "")).upper()

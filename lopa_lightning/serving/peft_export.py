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
        LoPAError: If PEFT is not installed, or has no such method.
    """
    peft = imported("peft", "peft", "this needs PEFT")
    net, name = module._net(), backbone or module.backbone_spec.name
    prompt, kind = net.prompt_encoder, str((module.adapter or {}).get("peft_type", "")).upper()
    if module.objective == "head":
        raise LoPAError("PEFT has no such trained head; --to bundle has all that was trained")
    if module.train_backbone:
        raise LoPAError("all of the backbone was trained, which is no adapter; --to bundle has all that was trained")
    what = {"base_model_name_or_path": name, "inference_mode": True, "task_type": _TASK_TYPES[module.objective]}
    if module.adapter is not None:
        if kind not in _ADAPTERS or prompt.num_virtual_tokens:
            beside = f" beside {type(prompt).__name__}" if prompt.num_virtual_tokens else ""
            raise LoPAError(f"what can be written for PEFT is {' or '.join(_ADAPTERS)} alone, got {kind}{beside}")
        config = peft.get_peft_config({**module.adapter, **what, "peft_type": kind})
        state: dict[str, Tensor] = peft.get_peft_model_state_dict(net.backbone.model)
        tensors = {f"base_model.model.{key}": value for key, value in state.items()}
    else:
        config, tensors = _soft_prompt(peft, module, what)
    with new_folder(out, "OUT") as new:
        config.save_pretrained(str(new))
        write_tensors(new / "adapter_model.safetensors", tensors)


def _soft_prompt(peft: Any, module: LoPALightningModule, what: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    """The config and the tensor of a soft prompt that stands before every text."""
    net = module._net()
    prompt, method = net.prompt_encoder, type(net.prompt_encoder).__name__
    if prompt.uses_instance:
        raise LoPAError(f"PEFT has no soft prompt that depends on the instance, as {method}'s does; use --to bundle")
    if prompt.num_virtual_tokens == 0 or prompt.token_offset() is not None:
        raise LoPAError(f"PEFT's prompt tuning has no {method}; use --to bundle")
    if module.placement != "before":
        raise LoPAError(f"PEFT puts soft prompts before the text, and placement is {module.placement}; use --to bundle")
    table = prompt(None)[0].detach()
    config = peft.PromptTuningConfig(
        num_virtual_tokens=len(table), token_dim=table.shape[1], num_transformer_submodules=1, **what
    )
    return config, {"prompt_embeddings": table}

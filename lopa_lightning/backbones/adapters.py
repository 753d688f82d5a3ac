"""Adapters by PEFT: in the instance encoder, and in the backbone as baselines that soft prompts are compared with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from lopa_lightning.errors import LoPAError, one_line


def adapt(model: PreTrainedModel, config: Mapping[str, Any], name: str = "adapter") -> None:
    """Puts an adapter into a model, in place. Its weights alone are trained, in float32.

    Args:
        model: A frozen model.
        config: As in PEFT's ``adapter_config.json``, such as ``{"peft_type": "LORA", "r": 8}``.
        name: Of the setting, for messages.

    Raises:
        LoPAError: If PEFT is not installed, or does not know such an adapter for this model.
    """
    try:
        import peft
    except ImportError:
        raise LoPAError('adapters come from PEFT: pip install "lopa-lightning[peft]"') from None
    kind = str(config.get("peft_type", "")).upper()
    tuners = peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING
    # AdaLoRA moves its ranks by a call after each step of its own training loop; without that it is a bad LoRA.
    # X-LoRA mixes adapters that it reads from elsewhere.
    if kind not in (known := sorted({entry.value for entry in tuners} - {"ADALORA", "XLORA"})):
        raise LoPAError(f"{name}.peft_type must be one of {', '.join(known)}, got {config.get('peft_type')!r}")
    try:
        peft.inject_adapter_in_model(peft.get_peft_config({**config, "peft_type": kind}), model)
    except (TypeError, ValueError, AttributeError) as error:
        raise LoPAError(f"{name} {dict(config)}: {one_line(error)}") from error
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def adapter_layers(model: nn.Module) -> list[nn.Module]:
    """Returns the layers that an adapter has changed; none without one."""
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError:
        return []
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]

"""What is trained in a pretrained model, as in baselines of soft prompts: an adapter by PEFT, or weights of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel

from lopa_lightning.backbones.transformer_layers import transformer_layers
from lopa_lightning.errors import LoPAError, imported, one_line

TrainedWeights = bool | Literal["bias"] | int


def adapt(model: PreTrainedModel, config: Mapping[str, Any], name: str = "adapter") -> None:
    """Puts an adapter into a model, in place. Its weights alone are trained, in float32.

    Args:
        model: A frozen model.
        config: As in PEFT's ``adapter_config.json``, such as ``{"peft_type": "LORA", "r": 8}``.
        name: Of the setting, for messages.

    Raises:
        LoPAError: If PEFT is not installed, or does not know such an adapter for this model.
    """
    peft = imported("peft", "peft", "adapters come from PEFT")
    kind = str(config.get("peft_type", "")).upper()
    tuners = peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING
    # AdaLoRA moves its ranks by a call after each step of its own training loop; without that it is a bad LoRA.
    # X-LoRA mixes adapters that it reads from elsewhere.
    if kind not in (known := sorted({entry.value for entry in tuners} - {"ADALORA", "XLORA"})):
        raise LoPAError(f"{name}.peft_type must be one of {', '.join(known)}, got {config.get('peft_type')!r}")
    # PEFT draws these initial values, and takes their product off the weights, which no checkpoint holds.
    if str(given := config.get("init_lora_weights")).startswith("pissa_niter"):
        raise LoPAError(f"{name}.init_lora_weights {given} would not be found again in a checkpoint; pissa is, exactly")
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


def trained_weights(model: PreTrainedModel, body: PreTrainedModel, which: TrainedWeights) -> list[nn.Parameter]:
    """Returns the weights of a backbone that are trained, as a baseline.

    Args:
        model: The backbone's.
        body: The same without its head.
        which: All (True) or none (False); ``bias``: all biases (BitFit, Ben Zaken et al. 2022, arXiv 2106.10199); k:
            those of the last k layers and of the norm after them (Partial-k in VPT, Jia et al. 2022, arXiv 2203.12119).

    Raises:
        LoPAError: If the model does not have them.
    """
    if isinstance(which, bool):
        return list(model.parameters()) if which else []
    if which == "bias":
        biases = [parameter for name, parameter in model.named_parameters() if name.rpartition(".")[2] == "bias"]
        if not biases:
            raise LoPAError(f"train_backbone: bias needs a backbone with biases, and {type(model).__name__} has none")
        return biases
    layers, parts = transformer_layers(body), list(body.modules())
    if not isinstance(which, int) or not 1 <= which <= len(layers):
        allowed = f"true, false, bias, or a number of last layers from 1 to {len(layers)}"
        raise LoPAError(f"train_backbone must be {allowed}, got {which!r}")
    after = parts[parts.index(layers[-1]) + len(list(layers[-1].modules())) :]
    norms = [part for part in after if "Norm" in type(part).__name__]
    if not norms:  # OPT's stands before its layers
        inside = {id(part) for layer in layers for part in layer.modules()}
        final = [part for name, part in body.named_modules() if name.rpartition(".")[2].startswith("final_")]
        norms = [part for part in final if id(part) not in inside]
    return [parameter for part in (*layers[-which:], *norms[:1]) for parameter in part.parameters()]

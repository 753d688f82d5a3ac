"""Backbones whose frozen matrices are kept in 8 or 4 bits, by transformers' own ``quantization_config``.

LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339), NF4 (Dettmers et al. 2023, arXiv 2305.14314), and int8 weights by
torchao, which needs no GPU::

    {quant_method: bitsandbytes, load_in_8bit: true}
    {quant_method: bitsandbytes, load_in_4bit: true, bnb_4bit_quant_type: nf4, bnb_4bit_use_double_quant: true}
    {quant_method: torchao, quant_type: {default: {_type: Int8WeightOnlyConfig, _version: 2, _data: {}}}}
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers import AutoHfQuantizer

from lopa_lightning.backbones.transformer_layers import transformer_layers
from lopa_lightning.errors import LoPAError, one_line

_METHODS = ("bitsandbytes", "torchao")  # gradients flow through their matrices


def check_quantization(quantization: Any) -> None:
    """Raises a LoPAError if ``quantization`` is neither None nor a config of a known method."""
    if quantization is None or (isinstance(quantization, Mapping) and quantization.get("quant_method") in _METHODS):
        return
    raise LoPAError(
        "quantization must be a quantization_config of transformers with quant_method "
        f"{' or '.join(_METHODS)}, such as {{quant_method: bitsandbytes, load_in_8bit: true}}; got {quantization!r}"
    )


def quantization_config(quantization: Mapping[str, Any]) -> Any:
    """Returns transformers' object for a config.

    Args:
        quantization: As in a model's ``config.json``.

    Raises:
        LoPAError: If transformers does not know such a config, or a package or device that it needs is not there.
    """
    try:
        quantizer = AutoHfQuantizer.from_config(dict(quantization))
        quantizer.validate_environment()
    except ImportError as error:
        raise LoPAError(f'quantization: {one_line(error)}; pip install "lopa-lightning[quantization]"') from error
    except Exception as error:  # whatever the package of the method raises
        raise LoPAError(f"quantization {dict(quantization)}: {one_line(error)}") from error
    config = quantizer.quantization_config
    known = {"quant_method", *inspect.signature(type(config)).parameters}
    if unknown := sorted(set(quantization) - known):  # transformers passes over them
        raise LoPAError(f"quantization has no {', '.join(unknown)}; see transformers' {type(config).__name__}")
    return config


def saved_bytes(model: PreTrainedModel, quantization: Mapping[str, Any] | None) -> int:
    """Returns how much smaller a model is than its unquantised twin.

    Args:
        model: The twin.
        quantization: How the matrices in its layers are to be kept.
    """
    if quantization is None:
        return 0
    linear = [part for layer in transformer_layers(model) for part in layer.modules() if isinstance(part, nn.Linear)]
    if quantization.get("load_in_4bit") or "Int4" in str(quantization):
        # NF4: half a byte, and a constant of 8 bits, with one of 32 for 256 of these, for 64 weights.
        return int(sum(m.weight.numel() * (m.weight.element_size() - 0.5 - (1 + 4 / 256) / 64) for m in linear))
    return sum(m.weight.numel() * (m.weight.element_size() - 1) - 4 * m.out_features for m in linear)


def dense(tensor: Tensor) -> Tensor:
    """Returns the numbers that a tensor of torchao stands for; any other tensor as it is.

    Args:
        tensor: A weight.
    """
    return tensor.dequantize() if type(tensor).__module__.startswith("torchao.") else tensor

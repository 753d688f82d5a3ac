"""Backbones whose frozen matrices lie in memory in 8 or 4 bits, by transformers' own configurations."""

from __future__ import annotations

import importlib.util
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel, TorchAoConfig

from lopa_lightning.backbones.transformer_layers import transformer_layers
from lopa_lightning.errors import LoPAError

Quantization = Literal["bitsandbytes_8bit", "bitsandbytes_4bit", "torchao_int8"]
"""``bitsandbytes_8bit`` is LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339), ``bitsandbytes_4bit`` NF4 with
quantised constants (Dettmers et al. 2023, arXiv 2305.14314), ``torchao_int8`` keeps weights alone in 8 bits."""

_PACKAGES = {"bitsandbytes": ("bitsandbytes", "accelerate"), "torchao": ("torchao",)}
# Of one weight. NF4: half a byte, and a constant of 8 bits, with one of 32 for 256 of these, for 64 weights.
_BYTES = {"bitsandbytes_8bit": 1.0, "bitsandbytes_4bit": 0.5 + (1 + 4 / 256) / 64, "torchao_int8": 1.0}


def check_quantization(quantization: str | None) -> None:
    """Raises a LoPAError if ``quantization`` is unknown."""
    if quantization is not None and quantization not in get_args(Quantization):
        raise LoPAError(f"quantization must be one of {', '.join(get_args(Quantization))}, got {quantization!r}")


def quantization_config(quantization: Quantization, dtype: torch.dtype) -> Any:
    """What ``from_pretrained`` is told.

    Args:
        quantization: How weights are kept.
        dtype: That is computed in.

    Raises:
        LoPAError: If a package is not installed, or bitsandbytes finds no GPU.
    """
    kind, _, bits = quantization.partition("_")
    if missing := [name for name in _PACKAGES[kind] if importlib.util.find_spec(name) is None]:
        raise LoPAError(
            f'quantization {quantization!r} needs {" and ".join(missing)}: pip install "lopa-lightning[quantization]"'
        )
    if kind == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    if not torch.cuda.is_available():
        raise LoPAError(f"quantization {quantization!r} needs a CUDA GPU; on a CPU use torchao_int8, or none")
    make: Any = BitsAndBytesConfig
    if bits == "8bit":
        return make(load_in_8bit=True)
    return make(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def saved_bytes(model: PreTrainedModel, quantization: Quantization | None) -> int:
    """How much smaller a model is than its unquantised twin.

    Args:
        model: The twin.
        quantization: How the matrices in its layers are to be kept.
    """
    if quantization is None:
        return 0
    linear = [part for layer in transformer_layers(model) for part in layer.modules() if isinstance(part, nn.Linear)]
    each = [(part.weight.numel(), part.weight.element_size(), part.out_features) for part in linear]
    constants = 0 if quantization == "bitsandbytes_4bit" else sum(rows for _, _, rows in each) * 4
    return int(sum(count * (size - _BYTES[quantization]) for count, size, _ in each)) - constants


def dense(tensor: Tensor) -> Tensor:
    """Numbers that a tensor of torchao stands for; any other tensor as it is.

    Args:
        tensor: A weight.
    """
    return tensor.dequantize() if type(tensor).__module__.startswith("torchao.") else tensor

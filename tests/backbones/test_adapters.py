"""PEFT's adapters in the backbone: what they train, and when their dropout is active."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import RobertaConfig, RobertaModel

from lopa_lightning.backbones.adapters import adapt, adapter_layers
from lopa_lightning.backbones.pretrained import freeze
from lopa_lightning.backbones.text import TextBackbone
from lopa_lightning.errors import LoPAError
from tests.backbones.test_architectures import SIZES
from tests.prompts.checks import assert_follows, randomized
from tests.tiny import run


def roberta() -> RobertaModel:
    torch.manual_seed(0)
    return freeze(RobertaModel(RobertaConfig(**SIZES), add_pooling_layer=False))


def test_an_adapter_starts_without_effect_and_alone_has_a_gradient() -> None:
    model, ids = roberta(), torch.arange(5, 12)[None]
    mask, none = torch.ones_like(ids), torch.zeros(1, 0, 32)
    before = run(TextBackbone(model), none, ids, mask).hidden
    adapt(model, {"peft_type": "LORA", "r": 2})
    backbone = TextBackbone(model)
    states = run(backbone, none, ids, mask)
    torch.testing.assert_close(states.hidden, before)
    states.hidden.square().sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        n for n, p in model.named_parameters() if "lora_" in n
    }


def lora(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    """h = W x + (alpha / r) B A x, with alpha 16 and r 2 (Hu et al. 2022, section 4.1)."""
    a, b = parameters["lora_A.default.weight"], parameters["lora_B.default.weight"]
    return x @ parameters["base_layer.weight"].T + parameters["base_layer.bias"] + 16 / 2 * x @ a.T @ b.T


def ia3(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    """h = l * (W x + b): learned factors on keys and values (Liu et al. 2022, section 3.3)."""
    return parameters["ia3_l.default"].T * (x @ parameters["base_layer.weight"].T + parameters["base_layer.bias"])


@pytest.mark.parametrize(
    ("config", "formula"),
    [({"peft_type": "lora", "r": 2, "lora_alpha": 16}, lora), ({"peft_type": "IA3"}, ia3)],
    ids=["lora", "ia3"],
)
def test_an_adapted_layer_computes_its_papers_formula(
    config: dict[str, Any], formula: Callable[[dict[str, Tensor], Tensor], Tensor]
) -> None:
    model = roberta()
    adapt(model, config)
    attention = model.encoder.layer[0].attention.self
    layer = randomized(attention.query if formula is lora else attention.value, seed=0).requires_grad_()
    x = torch.randn(3, 32, dtype=torch.float64, requires_grad=True)
    assert_follows(layer, lambda parameters: formula(parameters, x), lambda: layer(x), x=x)


def test_lora_has_the_published_count() -> None:
    """2.36 M on RoBERTa-large, which rank 24 on query and value gives."""
    with torch.device("meta"):
        model = freeze(
            RobertaModel(RobertaConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, vocab_size=9))
        )
        adapt(model, {"peft_type": "LORA", "r": 24})
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2_359_296


def test_an_adapters_dropout_is_active_in_training_while_the_backbones_own_is_not() -> None:
    model = roberta()
    adapt(model, {"peft_type": "LORA", "r": 2, "lora_dropout": 0.5})
    backbone = TextBackbone(model)
    for mode in (True, False):
        backbone.train(mode)
        assert {layer.lora_dropout["default"].training for layer in adapter_layers(model)} == {mode}
        assert not model.embeddings.dropout.training


def test_all_of_the_backbone_is_trained_where_that_is_asked_for() -> None:
    backbone = TextBackbone(roberta(), trained=True)
    backbone.train()
    assert all(p.requires_grad for p in backbone.parameters())
    assert backbone.model.embeddings.dropout.training


def test_an_adapter_is_trained_in_float32_inside_a_bfloat16_backbone() -> None:
    model = roberta().bfloat16()
    adapt(model, {"peft_type": "LORA", "r": 2})
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    ids = torch.arange(5, 12)[None]
    hidden = run(TextBackbone(model), torch.zeros(1, 0, 32), ids, torch.ones_like(ids)).hidden
    hidden.float().sum().backward()
    assert hidden.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"r": 3}, "peft_type must be one of .*LORA.*, got None"),
        ({"peft_type": "LORRA"}, "got 'LORRA'"),
        ({"peft_type": "ADALORA", "total_step": 10}, "got 'ADALORA'"),
        ({"peft_type": "LORA", "rank": 3}, "unexpected keyword argument 'rank'"),
        ({"peft_type": "LORA", "r": 0}, "positive integer"),
        ({"peft_type": "LORA", "init_lora_weights": "pissa_niter_4"}, "init_lora_weights pissa_niter_4 would not"),
        ({"peft_type": "LORA", "target_modules": ["nope"]}, "nope"),
        ({"peft_type": "PROMPT_TUNING"}, "does not support prompt learning"),
    ],
)
def test_adapters_that_cannot_be_are_refused(config: dict[str, Any], named: str) -> None:
    with pytest.raises(LoPAError, match=named):
        adapt(roberta(), config)

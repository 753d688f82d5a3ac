"""Backbones in 8 and 4 bits: what is refused before weights are read, and torchao's beside what it stands for."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lopa_lightning import ClassificationModule, LoPALightningModule, PretrainedSpec
from lopa_lightning.backbones import pretrained
from lopa_lightning.backbones.pretrained import load_model
from lopa_lightning.backbones.quantization import dense, quantization_config, saved_bytes
from lopa_lightning.backbones.text import TextBackbone
from lopa_lightning.errors import LoPAError
from tests.modules.helpers import LoPATiny, reviews, trainer
from tests.tiny import run

Tiny = Callable[[str], str]


INT8: dict[str, Any] = {
    "quant_method": "torchao",
    "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {}}},
}
EIGHT: dict[str, Any] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
FOUR: dict[str, Any] = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def spec(tiny: Tiny, how: Any = INT8) -> PretrainedSpec:
    return PretrainedSpec(tiny("llama"), quantization=how)


@pytest.mark.parametrize("how", ["torchao_int8", {}, {"load_in_8bit": True}, {"quant_method": "gptq", "bits": 4}])
def test_an_unknown_method_is_refused(tiny: Tiny, how: Any) -> None:
    with pytest.raises(
        LoPAError, match=r"with quant_method bitsandbytes or torchao, such as .*; got " + re.escape(repr(how))
    ):
        spec(tiny, how)


@pytest.mark.parametrize("how", [INT8, FOUR, EIGHT])
def test_what_is_missing_is_said_before_weights_are_read(
    tiny: Tiny, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in ("torchao", "bnb_8bit", "bnb_4bit"):
        for package in ("torchao", "accelerate"):
            name = f"transformers.quantizers.quantizer_{kind}.is_{package}_available"
            monkeypatch.setattr(name, lambda: False, raising=False)
    monkeypatch.setattr("transformers.utils.quantization_config.is_torchao_available", lambda: False)
    monkeypatch.setattr(pretrained._AUTO_CLASSES["causal_lm"], "from_pretrained", None)
    with pytest.raises(LoPAError, match=r"quantization.* (requires|No module named) .?(torchao|accelerate)"):
        load_model(spec(tiny, how), "causal_lm")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"load_in_4bits": True, "load_in_8bit": True}, "quantization has no load_in_4bits; see .* BitsAndBytesConfig"),
        ({}, "quantization {.*Unknown quantization type, got bitsandbytes"),
        ({"load_in_8bit": "yes"}, "quantization {.*load_in_8bit must be a boolean"),
        ({"load_in_8bit": True, "load_in_4bit": True}, "quantization {.*load_in_4bit and load_in_8bit are both True"),
    ],
)
def test_an_entry_that_transformers_passes_over_is_refused(
    entries: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for bits in ("8", "4"):
        name = f"transformers.quantizers.quantizer_bnb_{bits}bit.Bnb{bits}BitHfQuantizer.validate_environment"
        monkeypatch.setattr(name, lambda *_, **__: None)
    with pytest.raises(LoPAError, match=message):
        quantization_config({"quant_method": "bitsandbytes", **entries})


def test_a_mesh_is_refused_before_weights_are_read(tiny: Tiny) -> None:
    mesh: Any = object()
    with pytest.raises(LoPAError, match=r"a quantised backbone cannot be sharded.*use strategy: ddp"):
        load_model(spec(tiny, FOUR), "causal_lm", mesh)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_backbone": True}, "a quantised backbone cannot be trained; leave quantization or train_backbone out"),
        ({"adapter": {"peft_type": "LORA"}}, "adapters go with quantization by bitsandbytes, not by torchao"),
    ],
)
def test_a_quantised_backbone_is_not_changed(tiny: Tiny, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    model = ClassificationModule(backbone=spec(tiny), objective="causal_lm", prompt_encoder=LoPATiny, **options)
    with pytest.raises(LoPAError, match=message):
        trainer(tmp_path).fit(model, reviews(tmp_path))


def test_a_byte_for_each_weight_of_the_layers(tiny: Tiny) -> None:
    model = load_model(PretrainedSpec(tiny("llama")), "causal_lm")
    # Two layers: queries and outputs 32 x 32, keys and values 16 x 32, three of 48 x 32; constants for each row.
    numbers, rows = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32), 2 * (32 + 32 + 16 + 16 + 48 + 48 + 32)
    assert saved_bytes(model, INT8) == saved_bytes(model, EIGHT) == 3 * numbers - 4 * rows
    assert saved_bytes(model, FOUR) == pytest.approx(3.484 * numbers, rel=1e-3)
    assert saved_bytes(model, None) == 0


def hidden_and_gradient(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    prompt = torch.randn(2, 3, 32, requires_grad=True)
    states = run(TextBackbone(model), prompt, torch.tensor([[5, 6, 7], [8, 9, 10]]), torch.ones(2, 3, dtype=torch.long))
    (states.hidden * torch.randn_like(states.hidden)).sum().backward()
    assert prompt.grad is not None
    return states.hidden.detach(), prompt.grad


def test_gradients_flow_through_torchaos_layers(tiny: Tiny) -> None:
    pytest.importorskip("torchao")
    quantised, whole = load_model(spec(tiny), "causal_lm"), load_model(PretrainedSpec(tiny("llama")), "causal_lm")
    found, exact = hidden_and_gradient(quantised), hidden_and_gradient(whole)
    numbers = {name: dense(parameter.detach()) for name, parameter in quantised.named_parameters()}
    changed = [name for name, value in whole.named_parameters() if not torch.equal(value, numbers[name])]
    assert len(changed) == 2 * 7  # every matrix of the layers, and neither embeddings nor head
    whole.load_state_dict(numbers, strict=False)
    for mine, theirs, before in zip(found, hidden_and_gradient(whole), exact):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(mine, before, rtol=1e-4, atol=1e-4)


def test_a_checkpoint_belongs_to_the_quantised_backbone(tiny: Tiny, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    made = ClassificationModule(backbone=spec(tiny), objective="causal_lm", prompt_encoder=LoPATiny)
    trainer(tmp_path).fit(made, reviews(tmp_path))
    again = LoPALightningModule.load_from_checkpoint(tmp_path / "last.ckpt")
    (before,), (after,) = (trainer(tmp_path).validate(each, reviews(tmp_path), verbose=False) for each in (made, again))
    assert before == pytest.approx(after)
    with pytest.raises(LoPAError, match=r"quantization: the checkpoint has {.*torchao.*, this run None"):
        LoPALightningModule.load_from_checkpoint(tmp_path / "last.ckpt", backbone=PretrainedSpec(tiny("llama")))

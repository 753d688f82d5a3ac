"""An adapter in the instance encoder: PEFT's own numbers, and nothing but the adapter is trained and saved."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lightning.pytorch import seed_everything
from torch import Tensor

from lopa_lightning import InstanceEncoderSpec, LoPALightningModule
from lopa_lightning import checkpoint as ckpt
from lopa_lightning.backbones.adapters import adapter_layers
from lopa_lightning.backbones.pretrained import PretrainedSpec, load_model
from lopa_lightning.backbones.text_spec import instance_inputs
from lopa_lightning.errors import LoPAError
from lopa_lightning.instances.encoder import InstanceEncoder
from tests.backbones.conftest import Load
from tests.modules.helpers import LoPATiny, causal, completions, module, reviews, trainer
from tests.tiny import TEXT

Tiny = Callable[[str], str]

LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "lora_dropout": 0.3}
STILL = {**LORA, "lora_dropout": 0.0}
NAMES = {
    f"encoder.layer.{layer}.attention.self.{part}.lora_{side}.default.weight"
    for layer in (0, 1)
    for part in ("query", "value")
    for side in "AB"
}


def encoder(model: Any, adapter: dict[str, Any] = LORA, **options: Any) -> InstanceEncoder:
    return InstanceEncoder(model, InstanceEncoderSpec("own", adapter=adapter, **options), TEXT)


def batch() -> dict[str, Tensor]:
    ids = torch.randint(5, 100, (3, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    return instance_inputs(ids, mask)


@torch.no_grad()
def moved(model: torch.nn.Module) -> None:
    """Gives the factor of LoRA that starts at 0 other values."""
    for name, parameter in sorted(model.named_parameters()):
        if "lora_B" in name:
            parameter.normal_(std=0.3)


def test_vectors_and_gradients_are_those_of_pefts_own_model(load: Load) -> None:
    ours, plain = encoder(load("bert", "encoder"), STILL), load("bert", "encoder")
    theirs = peft.get_peft_model(plain, peft.LoraConfig(r=2, lora_alpha=8, lora_dropout=0.0))
    moved(ours)
    adapted = {name.removeprefix("base_model.model."): p for name, p in theirs.named_parameters() if p.requires_grad}
    mine = {name.removeprefix("model."): p for name, p in ours.named_parameters() if p.requires_grad}
    assert set(mine) == set(adapted) == NAMES
    with torch.no_grad():
        for name, parameter in adapted.items():
            parameter.copy_(mine[name])
    given = batch()
    hidden = theirs(given["instance_input_ids"], given["instance_attention_mask"]).last_hidden_state
    mask = given["instance_attention_mask"].unsqueeze(-1)
    mean = (hidden * mask).sum(1) / mask.sum(1)
    wanted = mean / mean.square().mean(1, keepdim=True).sqrt()
    vectors = ours.train()(given)
    torch.testing.assert_close(vectors, wanted, rtol=0, atol=1e-6)
    weights = torch.randn_like(wanted)
    (vectors * weights).sum().backward()
    (wanted * weights).sum().backward()
    for name in NAMES:
        assert mine[name].grad.abs().max() > 1e-4
        torch.testing.assert_close(mine[name].grad, adapted[name].grad, rtol=1e-5, atol=1e-6)
    frozen = [p for p in ours.parameters() if not p.requires_grad]
    assert {p.grad for p in frozen} == {None}


def test_the_adapters_dropout_is_active_in_training_and_the_encoders_own_is_not(load: Load) -> None:
    ours = encoder(load("bert", "encoder"))
    moved(ours)
    layers = adapter_layers(ours)
    inside = {id(part) for layer in layers for part in layer.modules()}
    ours.train()
    assert {part.training for part in ours.modules() if id(part) not in inside} == {False}
    assert {layer.lora_dropout["default"].training for layer in layers} == {True}
    with warnings.catch_warnings():  # the look at what padding does to a vector must not see dropout
        warnings.simplefilter("error")
        assert not torch.equal(ours(batch()), ours(batch()))
    assert {layer.lora_dropout["default"].training for layer in layers} == {True}
    assert not any(part.training for part in ours.eval().modules())
    assert torch.equal(ours(batch()), ours(batch()))
    assert all(part.training for part in encoder(load("bert", "encoder"), dropout=True).train().modules())


def test_an_adapter_beside_a_wholly_trained_encoder_is_refused() -> None:
    message = "give instance_encoder.adapter or instance_encoder.trainable, not both"
    with pytest.raises(LoPAError, match=message):
        InstanceEncoderSpec(adapter=LORA, trainable=True)


def fit(model: Any, folder: Path, epochs: int = 2, resume: Any = None) -> Any:
    seed_everything(3)
    folder.mkdir(exist_ok=True)
    run = trainer(folder, epochs)
    run.fit(model, reviews(folder.parent), ckpt_path=resume)
    return run


def made(backbone: str, name: str = "backbone", **options: Any) -> Any:
    spec = InstanceEncoderSpec(name, adapter=LORA)
    rates = {"instance_encoder": 3e-2}
    return module(backbone, objective="head", instance_encoder=spec, learning_rates=rates, **options)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("of", ["backbone", "its own"])
def test_a_checkpoint_holds_the_adapter_alone_and_loads(tiny: Tiny, tmp_path: Path, of: str) -> None:
    name = "backbone" if of == "backbone" else tiny("bert")
    trained = made(tiny("bert_base"), name)
    before = copy.deepcopy(load_model(PretrainedSpec(tiny("bert_base")), "encoder").state_dict())
    run = fit(trained, tmp_path / "run")
    (group,) = [group for group in run.optimizers[0].param_groups if group["name"] == "instance_encoder"]
    assert (group["lr"], len(group["params"])) == (3e-2, len(NAMES))
    saved = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)
    prefix = "net.instance_encoder."
    assert {key.removeprefix(f"{prefix}model.") for key in saved["state_dict"] if key.startswith(prefix)} == NAMES
    assert not [key for key in saved["state_dict"] if key.startswith("net.backbone")]
    after = trained.net.backbone.model.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(value, after[key]) for key, value in before.items())

    told = saved["lopa_identity"]["instance_encoder"]
    plain = load_model(PretrainedSpec(tiny("bert_base") if of == "backbone" else name), "encoder")
    assert {key: told[key] for key in ("config", "weights")} == ckpt.fingerprint(plain)
    assert told["adapter"] == LORA

    loaded = LoPALightningModule.load_from_checkpoint(tmp_path / "run" / "last.ckpt")
    data = reviews(tmp_path)
    (alike,) = run.validate(loaded, data, verbose=False)
    assert run.validate(trained, data, verbose=False) == [alike]
    moved = [value for key, value in loaded.state_dict().items() if "lora_B" in key]
    assert all(value.abs().max() > 1e-4 for value in moved)
    assert "instance" not in next(iter(data.val_dataloader()[0]))  # no vector is kept that changes
    with pytest.raises(LoPAError, match=r"instance_encoder\.adapter: the checkpoint has \{.*this run None"):
        LoPALightningModule.load_from_checkpoint(tmp_path / "run" / "last.ckpt", instance_encoder=InstanceEncoderSpec())


@pytest.mark.slow
def test_a_resumed_run_is_the_whole_one_bit_for_bit(tiny: Tiny, tmp_path: Path) -> None:
    prompt = functools.partial(LoPATiny, dropout=0.3)
    whole = made(tiny("bert_base"), prompt_encoder=prompt)
    fit(whole, tmp_path / "whole", 3)
    fit(made(tiny("bert_base"), prompt_encoder=prompt), tmp_path / "parts", 1)
    resumed = made(tiny("bert_base"), prompt_encoder=prompt)
    fit(resumed, tmp_path / "parts", 3, tmp_path / "parts" / "last.ckpt")
    assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in whole.state_dict().items())


def test_a_loaded_module_generates_what_the_trained_one_does(tiny: Tiny, tmp_path: Path) -> None:
    spec = InstanceEncoderSpec(tiny("bert_base"), adapter=LORA)
    trained = causal(tiny("llama"), instance_encoder=spec, generation={"max_new_tokens": 4, "do_sample": False})
    run = trainer(tmp_path)
    run.fit(trained, completions(tmp_path))
    loaded = LoPALightningModule.load_from_checkpoint(tmp_path / "last.ckpt")
    texts = ["the film was", "it was"]
    assert loaded.generate(texts) == trained.eval().generate(texts)

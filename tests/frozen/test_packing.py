"""Texts that are packed into one row: what they are alone, and what the architecture must be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import seed_everything

from lopa_lightning import CausalLMModule, ClassificationModule, PretrainedSpec
from lopa_lightning.errors import LoPAError
from lopa_lightning.frozen import packing as packing_module
from lopa_lightning.frozen.adapters import adapt
from lopa_lightning.frozen.backbone import Backbone
from lopa_lightning.frozen.injection import position_ids
from lopa_lightning.frozen.loading import load_model
from lopa_lightning.frozen.packing import Packing, Rectangle
from tests.frozen.test_architectures import CAUSAL, ITEMS, MASKED, WIDTH, build, own_states, padded
from tests.modules.helpers import LoPATiny, completions, reviews, trainer

Tiny = Callable[[str], str]
REFUSED = {"Bloom", "DebertaV2", "Gemma2", "MobileBert", "MPNet"}
"""Biases of positions, softcaps, attention of their own, and embeddings that see their neighbours."""


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.booleans())
def test_packed_is_what_the_mask_selects_and_comes_back_to_its_places(lengths: list[int], left: bool) -> None:
    width = max(lengths) + 2
    mask = torch.stack([F.pad(torch.ones(n), (width - n, 0) if left else (0, width - n)) for n in lengths])
    rectangle, numbers = Rectangle.of(mask), torch.arange(1.0, mask.numel() + 1).view(mask.shape)
    packed = rectangle.pack(numbers)
    assert packed.tolist() == [numbers[mask == 1].tolist()]
    assert torch.equal(rectangle.unpack(packed), numbers * mask)

    packing = Packing.of(mask)
    assert packing.batch.pack(position_ids(mask, 2))[0].tolist() == [2 + place for n in lengths for place in range(n)]
    assert packing.mask.sum(1).tolist() == lengths
    assert packing.starts.diff().tolist() == lengths


@pytest.mark.parametrize("pack", [True, False])
def test_gradients_of_moves_are_those_of_finite_differences(pack: bool) -> None:
    rectangle = Rectangle.of(torch.tensor([[0, 1, 1], [1, 0, 0]]))
    start = torch.randn(2, 3, 2) if pack else torch.randn(1, 3, 2)
    moved = rectangle.pack if pack else rectangle.unpack
    assert torch.autograd.gradcheck(moved, start.double().requires_grad_())


@pytest.mark.parametrize("name", sorted({*MASKED, *CAUSAL} - REFUSED))
@pytest.mark.parametrize("left", [False, True])
def test_states_and_gradients_are_those_of_padded_texts(name: str, left: bool) -> None:
    model = build(name)
    weights = torch.randn(len(ITEMS), 4 + padded(left)[0].shape[1], 32)
    results = []
    for packed in (False, True):
        backbone = Backbone(model, packed=packed)
        prompt = torch.linspace(-1, 1, len(ITEMS) * 4 * backbone.prompt_dim).view(len(ITEMS), 4, -1).requires_grad_()
        states = backbone(prompt, *padded(left))
        own = [own_states(states, row) for row in range(len(ITEMS))]
        (states.hidden * weights * states.text_mask.unsqueeze(-1)).sum().backward()
        results.append((own, prompt.grad))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_architectures_whose_attention_is_more_are_refused(name: str) -> None:
    def run(packed: bool) -> None:
        model = build(name, **({"embedding_size": 16} if name == "MobileBert" else {}))
        backbone = Backbone(model, packed=packed)
        backbone(torch.randn(len(ITEMS), 4, backbone.prompt_dim), *padded(left=False))

    run(packed=False)
    with pytest.raises(LoPAError, match="pack: false"):
        run(packed=True)


def test_texts_that_may_be_longer_than_a_window_are_padded() -> None:
    rows = []
    for window in (13, 12):  # of 4 virtual tokens and 9 places
        model: Any = build("Mistral", sliding_window=window)
        backbone = Backbone(model, packed=True)
        backbone.body.register_forward_pre_hook(
            lambda model, args, options: rows.append(len(options["inputs_embeds"])), with_kwargs=True
        )
        backbone(torch.randn(len(ITEMS), 4, backbone.prompt_dim), *padded(left=False))
    assert rows == [2, 1, 1, 2, 1, len(ITEMS)]  # each after the check of two short ones


def test_a_window_that_the_config_did_not_name_is_refused() -> None:
    model: Any = build("Mistral")
    backbone = Backbone(model, packed=True)
    model.config.sliding_window = 10
    with pytest.raises(LoPAError, match="MistralAttention sees 10 of 11 tokens, which packed rows do without"):
        backbone(torch.randn(len(ITEMS), 4, backbone.prompt_dim), *padded(left=False))


def test_no_place_of_padding_is_computed(tiny: Tiny) -> None:
    backbone = Backbone(load_model(PretrainedSpec(tiny("llama")), "encoder"), packed=True)
    shapes = []
    backbone.body.register_forward_pre_hook(
        lambda model, args, options: shapes.append(tuple(options["inputs_embeds"].shape)), with_kwargs=True
    )
    ids, mask = padded(left=False)
    backbone(torch.randn(len(ITEMS), 4, 32), ids, mask)
    backbone(torch.randn(len(ITEMS), 4, 32), ids, torch.ones_like(mask))  # nothing to leave out
    check = [(2, 5, 32), (1, 8, 32)]
    assert shapes == [*check, (1, int(mask.sum()) + 4 * len(ITEMS), 32), (len(ITEMS), 4 + ids.shape[1], 32)]


def test_what_mixes_tokens_outside_of_attention_is_refused() -> None:
    for name in ("Qwen3", "XLMRoberta"):
        model: Any = build(name)
        layers = model.base_model.layers if name == "Qwen3" else model.base_model.encoder.layer
        layers[0].register_forward_hook(lambda layer, args, output: output + output.roll(1, dims=1))
        for length in (WIDTH, 3):  # with padding or without: all processes begin together
            backbone = Backbone(model, packed=True)
            ids = padded(left=False)[0][:, :length]
            with pytest.raises(LoPAError, match="does not compute a text in a row with others as it does alone"):
                backbone(torch.randn(len(ITEMS), 4, 32), ids, torch.ones_like(ids))


def test_layers_of_another_kind_are_refused_before_anything_is_computed() -> None:
    model = build("Qwen3")
    model.config.layer_types = ["hybrid", "full_attention"]
    with pytest.raises(LoPAError, match="pack needs layers of attention alone; Qwen3Model has hybrid"):
        Backbone(model, packed=True)


@pytest.mark.parametrize("changed", ["layers computed twice", "all weights trained", "LoRA", "bf16-mixed"])
def test_gradients_are_those_of_padded_texts_where_the_model_is_changed(changed: str, tiny: Tiny) -> None:
    weights, results = torch.randn(len(ITEMS), 4 + WIDTH, 32), []
    for packed in (False, True):
        model = load_model(PretrainedSpec(tiny("llama")), "encoder")
        if changed == "LoRA":
            torch.manual_seed(0)
            adapt(model, {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "init_lora_weights": False})
        twice, trained = changed == "layers computed twice", changed == "all weights trained"
        backbone = Backbone(model, packed=packed, gradient_checkpointing=twice, trained=trained).train()
        prompt = torch.ones(len(ITEMS), 4, 32, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=changed == "bf16-mixed"):
            states = backbone(prompt, *padded(left=False))
            (states.hidden * weights * states.text_mask.unsqueeze(-1)).sum().backward()
        named = {name: each.grad for name, each in backbone.named_parameters() if each.grad is not None}
        results.append({"prompt": prompt.grad, **named})
        assert model.training == trained
    assert (len(results[0]) > 1) == (changed in ("all weights trained", "LoRA"))
    loose = 0.05 if changed == "bf16-mixed" else 1e-4
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, rtol=loose, atol=loose * float(gradient.abs().max()))


@pytest.mark.parametrize("name", ["Electra", "Qwen3", "XLMRoberta"])
def test_kernels_for_texts_of_several_lengths_are_given_each_text(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, by torch's nested tensors; those have no causal kernel on a CPU, so each text goes alone."""
    calls = []

    def one_by_one(query: Any, key: Any, value: Any, **options: Any) -> Any:
        if not query.is_nested:
            return sdpa(query, key, value, **options)
        calls.append(options)
        texts = [sdpa(*(x[None] for x in heads), **options)[0] for heads in zip(query, key, value, strict=True)]
        rows = torch.cat([text.transpose(0, 1) for text in texts])
        lengths = torch.tensor([0, *(text.shape[1] for text in texts)])
        return torch.nested.nested_tensor_from_jagged(rows, lengths.cumsum(0)).transpose(1, 2)

    sdpa = F.scaled_dot_product_attention
    model = build(name)
    plain = Backbone(model)
    prompt = torch.randn(len(ITEMS), 4, plain.prompt_dim)
    expected = plain(prompt, *padded(left=False))
    backbone = Backbone(model, packed=True)
    monkeypatch.setattr(packing_module, "_has_kernels", lambda states: True)
    monkeypatch.setattr(F, "scaled_dot_product_attention", one_by_one)
    got = backbone(prompt, *padded(left=False))
    for row in range(len(ITEMS)):
        torch.testing.assert_close(own_states(got, row), own_states(expected, row), rtol=1e-4, atol=1e-5)
    assert len(calls) == 2 * 2  # layers, and passes: of the check, and this
    assert {options["is_causal"] for options in calls} == {name in CAUSAL}


def test_what_does_not_go_with_packed_rows_is_refused(tiny: Tiny) -> None:
    with pytest.raises(LoPAError, match="pack and compile do not go together"):
        PretrainedSpec("any", pack=True, compile=True)
    with pytest.raises(LoPAError, match="pack needs attn_implementation: sdpa, got 'flash_attention_2'"):
        PretrainedSpec("any", pack=True, attn_implementation="flash_attention_2")
    model = load_model(PretrainedSpec(tiny("llama"), attn_implementation="eager"), "encoder")
    with pytest.raises(LoPAError, match="that of LlamaModel is 'eager'; use another backbone, or pack: false"):
        Backbone(model, packed=True)
    model = load_model(PretrainedSpec(tiny("llama")), "encoder")
    with pytest.raises(LoPAError, match="pack brings texts into one row, and placement 'every_layer'"):
        Backbone(model, placement="every_layer", packed=True)


@pytest.mark.parametrize("kind", ["reviews", "completions"])
def test_a_run_is_that_of_padded_batches(kind: str, tiny: Tiny, tmp_path: Path) -> None:
    values = []
    for pack in (False, True):
        options: Any = {"backbone": PretrainedSpec(tiny("llama"), pack=pack), "prompt_encoder": LoPATiny}
        if kind == "reviews":
            model: Any = ClassificationModule(objective="causal_lm", **options)
            data: Any = reviews(tmp_path)
        else:
            model, data = CausalLMModule(**options), completions(tmp_path / "data")
        seed_everything(3)
        run = trainer(tmp_path, epochs=2, callbacks=[], enable_checkpointing=False)
        run.fit(model, data)
        values.append({name: float(value) for name, value in run.callback_metrics.items()})
    assert values[1]["train/loss"] != 0
    assert values[1] == pytest.approx(values[0], rel=1e-4, abs=1e-5)


def test_generation_is_that_of_a_model_that_takes_no_packed_rows(tiny: Tiny) -> None:
    texts = ["the film was", "the cast and the film was the best of a good"]
    written = []
    for pack in (False, True):
        model = CausalLMModule(
            backbone=PretrainedSpec(tiny("llama"), pack=pack),
            prompt_encoder=LoPATiny,
            generation={"max_new_tokens": 6, "do_sample": False},
        )
        seed_everything(3)
        model.configure_model()
        written.append(model.generate(texts))
    assert written[0] == written[1]

"""Layers that are computed twice: the same gradients, less memory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lopa_lightning import PretrainedSpec
from lopa_lightning.backbones.pretrained import load_model, meta_model
from lopa_lightning.backbones.text import TextBackbone
from lopa_lightning.backbones.transformer_layers import transformer_layers
from lopa_lightning.errors import LoPAError
from tests.tiny import run

Tiny = Callable[[str], str]


def gradient_and_kept(backbone: TextBackbone, prompt: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The gradient of a prompt, and the numbers that were kept for it."""
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    ids = torch.arange(5, 25).view(2, 10)
    prompt = prompt.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = run(backbone, prompt, ids, torch.ones_like(ids)).hidden
    hidden.square().sum().backward()
    assert prompt.grad is not None
    return prompt.grad, sum(kept.values())


@pytest.mark.parametrize("kind", ["bert_base", "roberta", "gpt2", "llama"])
def test_gradients_are_the_same_and_less_is_kept(tiny: Tiny, kind: str) -> None:
    plain, twice = (
        TextBackbone(load_model(PretrainedSpec(tiny(kind)), "encoder"), gradient_checkpointing=again).train()
        for again in (False, True)
    )
    prompt = torch.randn(2, 3, 32)
    expected, kept = gradient_and_kept(plain, prompt)
    got, kept_twice = gradient_and_kept(twice, prompt)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert kept_twice < kept / 2
    assert not any(part.training for part in twice.model.modules())


def test_without_gradients_nothing_changes(tiny: Tiny) -> None:
    ids = torch.arange(5, 15).view(1, 10)
    outputs = []
    for again in (False, True):
        backbone = TextBackbone(load_model(PretrainedSpec(tiny("gpt2")), "encoder"), gradient_checkpointing=again)
        with torch.no_grad():
            outputs.append(run(backbone, torch.zeros(1, 2, 32), ids, torch.ones_like(ids)).hidden)
    assert torch.equal(*outputs)


def test_virtual_tokens_in_every_layer_are_refused(tiny: Tiny) -> None:
    with pytest.raises(LoPAError, match="gradient_checkpointing computes a layer twice, and placement 'every_layer'"):
        TextBackbone(
            load_model(PretrainedSpec(tiny("llama")), "encoder"), placement="every_layer", gradient_checkpointing=True
        )
    with pytest.raises(
        LoPAError, match="compile makes one program of all layers, and placement 'every_layer' one of e"
    ):
        TextBackbone(load_model(PretrainedSpec(tiny("llama")), "encoder"), placement="every_layer", compiled=True)


def test_a_model_that_names_no_layers_is_refused(tiny: Tiny) -> None:
    model: Any = meta_model(PretrainedSpec(tiny("llama")), "encoder")
    assert len(transformer_layers(model)) == 2
    model._no_split_modules = []
    with pytest.raises(LoPAError, match="LlamaModel does not say which layers it is made of"):
        transformer_layers(model)


@pytest.mark.slow
def test_compiled_layers_have_the_same_gradients_at_every_length(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.compile", functools.partial(torch.compile, backend="eager"))  # not to wait for g++
    plain, compiled = (
        TextBackbone(load_model(PretrainedSpec(tiny("llama")), "encoder"), gradient_checkpointing=True, compiled=fast)
        for fast in (False, True)
    )
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for length in (10, 7):
        ids = torch.arange(5, 5 + 2 * length).view(2, length)
        mask = torch.ones_like(ids)
        mask[0, -1] = 0
        results = []
        for backbone in (plain, compiled):
            prompt = torch.ones(2, 3, 32).requires_grad_()
            hidden = run(backbone, prompt, ids, mask).hidden
            hidden.square().sum().backward()
            with torch.no_grad():
                torch.testing.assert_close(run(backbone, prompt, ids, mask).hidden, hidden, rtol=1e-5, atol=1e-5)
            results.append((hidden, prompt.grad))
        torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2  # not one for each layer and length

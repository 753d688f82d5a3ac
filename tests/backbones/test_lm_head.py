"""Cross entropy in chunks through the model's own head, against the whole model's logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from lopa_lightning.backbones.pretrained import freeze
from lopa_lightning.backbones.text import TextBackbone
from lopa_lightning.errors import LoPAError
from tests.backbones.conftest import Load
from tests.backbones.test_architectures import CAUSAL, build
from tests.tiny import run

M, LENGTH = 3, 9


def setting(model: PreTrainedModel) -> tuple[TextBackbone, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    backbone = TextBackbone(model)
    ids = torch.randint(model.config.vocab_size, (2, LENGTH))
    weights = torch.rand(2 * LENGTH)
    return backbone, ids, torch.randn(2, M, backbone.prompt_dim), weights


def ours(backbone: TextBackbone, ids: Tensor, prompt: Tensor, chunk: int | None) -> tuple[Tensor, Tensor | None]:
    hidden = run(backbone, prompt, ids, torch.ones_like(ids)).hidden[:, M - 1 : -1]
    return backbone.token_losses(hidden.flatten(0, 1), ids.flatten(), chunk)


def in_full(model: PreTrainedModel, ids: Tensor, prompt: Tensor) -> tuple[Tensor, Tensor]:
    embedded = torch.cat([prompt, model.get_input_embeddings()(ids)], 1)
    logits = model(inputs_embeds=embedded).logits[:, M - 1 : -1].flatten(0, 1)
    return F.cross_entropy(logits, ids.flatten(), reduction="none"), logits.argmax(-1) == ids.flatten()


@pytest.mark.parametrize("chunk", [1, 5, None])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_losses_hits_and_gradients_are_those_of_all_logits_at_once(kind: str, chunk: int | None, load: Load) -> None:
    model = load(kind).double()
    backbone, ids, prompt, weights = setting(model)
    ours_in, plain_in = (prompt.double().requires_grad_() for _ in range(2))
    losses, hits = ours(backbone, ids, ours_in, chunk)
    wanted, wanted_hits = in_full(model, ids, plain_in)
    torch.testing.assert_close(losses, wanted.float(), rtol=0, atol=1e-6)
    assert hits is None  # not looked for in training
    with torch.no_grad():
        losses_without, hits = ours(backbone, ids, ours_in, chunk)
    assert torch.equal(losses_without, losses)
    assert hits is not None
    assert hits.tolist() == wanted_hits.tolist()
    (losses * weights).sum().backward()
    (wanted * weights).sum().backward()
    torch.testing.assert_close(ours_in.grad, plain_in.grad, rtol=1e-5, atol=1e-6)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", CAUSAL)
def test_every_architectures_head_keeps_its_scales_and_caps(name: str) -> None:
    model = build(name)
    backbone, ids, prompt, _ = setting(model)
    with torch.no_grad():
        losses, hits = ours(backbone, ids, prompt, 4)
        wanted, wanted_hits = in_full(model, ids, prompt)
    torch.testing.assert_close(losses, wanted, rtol=1e-5, atol=1e-5)
    assert hits is not None
    assert hits.tolist() == wanted_hits.tolist()


def test_a_trained_head_has_the_gradients_of_all_logits_at_once(load: Load) -> None:
    gradients = []
    for whole in (False, True):
        model = load("llama").requires_grad_()
        _, ids, prompt, weights = setting(model)
        backbone = TextBackbone(model, trained=True)
        losses, _ = in_full(model, ids, prompt) if whole else ours(backbone, ids, prompt, 4)
        (losses * weights).sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert gradients[0]["lm_head.weight"].abs().max() > 0
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-5)


class _Largest(TorchDispatchMode):
    """The most numbers that any tensor as wide as the vocabulary has."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.numbers = width, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor) and tensor.dim() and tensor.shape[-1] == self.width:
                self.numbers = max(self.numbers, tensor.numel())
        return result


@pytest.mark.parametrize("trained", [False, True])
def test_no_more_than_a_chunks_logits_are_ever_made(trained: bool) -> None:
    sizes = {"hidden_size": 2, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    model = freeze(transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=501, **sizes)))
    backbone = TextBackbone(model, trained=trained)
    hidden, targets = torch.randn(30, 2, requires_grad=True), torch.randint(501, (30,))
    for chunk, most in ((4, 4 * 501), (30, 30 * 501)):
        with _Largest(501) as largest:
            backbone.token_losses(hidden, targets, chunk)[0].sum().backward()
        assert largest.numbers == most


def test_without_a_head_there_are_no_losses(load: Load) -> None:
    with pytest.raises(LoPAError, match="has no language model head"):
        TextBackbone(load("llama", "encoder")).token_losses(torch.randn(2, 32), torch.tensor([1, 2]))

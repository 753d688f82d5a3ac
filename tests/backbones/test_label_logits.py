"""The backbone's language model head on a few tokens, against the whole model's own logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from lopa_lightning.backbones.pretrained import freeze
from lopa_lightning.backbones.text import TextBackbone
from lopa_lightning.errors import LoPAError
from tests.backbones.conftest import FAMILIES, Load, shaken
from tests.tiny import run

KINDS = list(FAMILIES)
M, WIDTH, WORDS = 3, 32, 100
TOKENS = torch.tensor([9, 4, 90, 9])


def prompted(model: PreTrainedModel) -> tuple[TextBackbone, Tensor, Tensor]:
    """A backbone, its hidden states for two prompted texts, and the whole model's logits for the same."""
    torch.manual_seed(0)
    backbone, embeddings = TextBackbone(model), model.get_input_embeddings()
    ids, prompt = torch.randint(WORDS, (2, 6)), torch.randn(2, M, backbone.prompt_dim)
    with torch.no_grad():
        hidden = run(backbone, prompt, ids, torch.ones_like(ids)).hidden
        logits = model(inputs_embeds=torch.cat([prompt, embeddings(ids)], dim=1)).logits
    return backbone, hidden, logits


@pytest.mark.parametrize("place", [0, 4, -1])
@pytest.mark.parametrize("kind", KINDS)
def test_they_are_the_whole_models_logits_of_those_tokens(kind: str, place: int, load: Load) -> None:
    backbone, hidden, logits = prompted(load(kind))
    ours = backbone.label_logits(hidden[:, place], TOKENS)
    torch.testing.assert_close(ours, logits[:, place][:, TOKENS], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_they_have_the_heads_bias(kind: str, load: Load) -> None:
    model = load(kind)
    backbone, hidden, _ = prompted(model)
    before = backbone.label_logits(hidden[:, -1], TOKENS)
    bias = model.get_output_embeddings().bias
    with torch.no_grad():
        bias += torch.arange(len(bias))
    after = backbone.label_logits(hidden[:, -1], TOKENS)
    torch.testing.assert_close(after - before, TOKENS.float().expand(2, -1), atol=1e-4, rtol=0)


SIZES = {"vocab_size": WORDS, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
LAYERS = {**SIZES, "hidden_size": WIDTH, "intermediate_size": 48}
GPT = {"vocab_size": WORDS, "n_positions": 64, "n_embd": WIDTH, "n_layer": 2, "n_head": 4}


@pytest.mark.parametrize(
    ("name", "config", "sizes"),
    [
        ("PhiForCausalLM", "PhiConfig", LAYERS),
        ("CodeGenForCausalLM", "CodeGenConfig", {**GPT, "rotary_dim": 4}),
        ("CohereForCausalLM", "CohereConfig", {**LAYERS, "logit_scale": 0.3}),
        ("DistilBertForMaskedLM", "DistilBertConfig", {**SIZES, "dim": WIDTH}),
    ],
)
def test_other_heads_keep_their_biases_scales_and_transforms(name: str, config: str, sizes: dict[str, int]) -> None:
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**sizes))
    backbone, hidden, logits = prompted(shaken(freeze(model)))
    ours = backbone.label_logits(hidden[:, -1], TOKENS)
    torch.testing.assert_close(ours, logits[:, -1][:, TOKENS], atol=1e-5, rtol=1e-5)


@contextmanager
def recorded_widths() -> Iterator[set[int]]:
    """Last dimension of every tensor that is computed."""
    widths: set[int] = set()

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            tensors = result if isinstance(result, tuple | list) else [result]
            widths.update(t.shape[-1] for t in tensors if isinstance(t, Tensor) and t.dim())
            return result

    with Recorder():
        yield widths


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_the_whole_vocabulary_are_never_made(kind: str, load: Load) -> None:
    model = load(kind)
    backbone, hidden, _ = prompted(model)
    vocabulary = model.config.vocab_size
    with recorded_widths() as widths:
        backbone.label_logits(hidden[:, -1], TOKENS)
    assert vocabulary not in widths
    with recorded_widths() as widths:  # what the check above would have seen
        model(input_ids=torch.tensor([[5, 6]]))
    assert vocabulary in widths


@pytest.mark.parametrize("kind", KINDS)
def test_they_follow_the_weights_to_another_dtype(kind: str, load: Load) -> None:
    model = load(kind)
    backbone, hidden, _ = prompted(model)
    backbone.double()
    ours = backbone.label_logits(hidden[:, -1].double(), TOKENS)
    fresh = TextBackbone(load(kind).double()).label_logits(hidden[:, -1].double(), TOKENS)
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, fresh, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_a_backbone_without_a_head_has_none(kind: str, load: Load) -> None:
    backbone = TextBackbone(load(kind, "encoder"))
    with pytest.raises(LoPAError, match="Model has no language model head"):
        backbone.label_logits(torch.randn(2, WIDTH), TOKENS)

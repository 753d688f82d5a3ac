"""Virtual tokens in every layer: equal to real tokens' keys and values, and to PEFT's prefix tuning."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from torch import Tensor
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel, PreTrainedModel

from lopa_lightning.backbones.prefix import layer_prompts
from lopa_lightning.backbones.pretrained import freeze
from lopa_lightning.backbones.text import TextBackbone
from lopa_lightning.errors import LoPAError
from tests.backbones.conftest import shaken
from tests.backbones.test_architectures import CAUSAL, ITEMS, MASKED, SIZES, build, own_states, padded
from tests.tiny import run

FITTING_CAUSAL = sorted(set(CAUSAL) - {"Gemma2", "Mistral"})
FITTING = ["Electra", "XLMRoberta", *FITTING_CAUSAL]
M = 4
# In float64; some architectures rotate and sum in float32 whatever they are given.
EXACT = {"rtol": 0, "atol": 1e-6}


def grouped_llama() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(**{**SIZES, "num_key_value_heads": 2, "head_dim": 8})
    return shaken(freeze(LlamaModel(config)))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", FITTING)
def test_an_item_is_the_same_alone_and_in_any_batch(name: str) -> None:
    backbone = TextBackbone(build(name).double(), placement="every_layer")
    prompt = torch.randn(len(ITEMS), M, backbone.prompt_dim, dtype=torch.float64)
    for left in (False, True):
        batch = run(backbone, prompt, *padded(left))
        for row, item in enumerate(ITEMS):
            alone = run(backbone, prompt[row : row + 1], item[None], torch.ones(1, len(item), dtype=torch.long))
            torch.testing.assert_close(own_states(batch, row), own_states(alone, 0), **EXACT)


@pytest.mark.parametrize("name", FITTING_CAUSAL)
def test_real_tokens_keys_and_values_stand_for_the_tokens(name: str) -> None:
    """In a causal model a text after real tokens sees of them just their keys and values in every layer."""
    model = build(name).double()
    backbone, before, text = TextBackbone(model, placement="every_layer"), torch.tensor([3, 9, 27]), ITEMS[0]
    mask = torch.ones(1, len(text), dtype=torch.long)
    states = run(backbone, backbone.virtual_tokens(before)[None], text[None], mask)
    whole = model.base_model(input_ids=torch.cat([before, text])[None]).last_hidden_state
    torch.testing.assert_close(states.hidden[0], whole[0, len(before) :], **EXACT)


def bert_with_prefixes(model: BertModel, prompt: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """BERT's equations with learned keys and values before each layer's own (Li & Liang 2021, section 4.2)."""
    (batch, length), heads, width = ids.shape, 4, 8
    real = torch.cat([mask.new_ones(batch, M), mask], dim=1).bool()

    def by_head(states: Tensor) -> Tensor:
        return states.reshape(batch, -1, heads, width).transpose(1, 2)

    parts = iter(prompt.expand(batch, -1, -1).split(heads * width, dim=-1))
    embeddings = model.embeddings
    places = (mask.cumsum(1) - 1).clamp(min=0) + M
    x = embeddings.word_embeddings(ids) + embeddings.position_embeddings(places)
    x = embeddings.LayerNorm(x + embeddings.token_type_embeddings(torch.zeros_like(ids)))
    for layer in model.encoder.layer:
        own = layer.attention.self
        keys = torch.cat([by_head(next(parts)), by_head(own.key(x))], dim=2)
        values = torch.cat([by_head(next(parts)), by_head(own.value(x))], dim=2)
        scores = by_head(own.query(x)) @ keys.mT / width**0.5
        weights = scores.masked_fill(~real[:, None, None], -torch.inf).softmax(-1)
        attended = (weights @ values).transpose(1, 2).reshape(batch, length, -1)
        x = layer.attention.output.LayerNorm(layer.attention.output.dense(attended) + x)
        inner = torch.nn.functional.gelu(layer.intermediate.dense(x))
        x = layer.output.LayerNorm(layer.output.dense(inner) + x)
    return x


@pytest.mark.parametrize("left", [False, True])
def test_states_and_gradients_are_those_of_berts_equations_with_prefixes(left: bool) -> None:
    torch.manual_seed(0)
    model = shaken(freeze(BertModel(BertConfig(**SIZES)))).double()
    backbone, (ids, mask) = TextBackbone(model, placement="every_layer"), padded(left)
    upstream = torch.randn(*ids.shape, 32, dtype=torch.float64) * mask[..., None]
    ours, theirs = (torch.ones(1, M, backbone.prompt_dim, dtype=torch.float64).cumsum(-1).sin() for _ in range(2))
    outputs = (
        run(backbone, ours.requires_grad_(), ids, mask).hidden,
        bert_with_prefixes(model, theirs.requires_grad_(), ids, mask),
    )
    torch.testing.assert_close(*(output * mask[..., None] for output in outputs), rtol=1e-10, atol=1e-10)
    for output in outputs:
        (output * upstream).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_states_and_gradients_are_those_of_pefts_prefix_tuning(kind: str) -> None:
    """With the same numbers: PEFT's table is [m, layers x (key, value) x heads x width], as ours is."""
    model = grouped_llama() if kind == "llama" else shaken(freeze(BertModel(BertConfig(**SIZES))))
    config = PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=M, prefix_projection=False)
    backbone = TextBackbone(model, placement="every_layer")
    ids, mask = padded(left=False)
    prompt = torch.randn(1, M, backbone.prompt_dim, requires_grad=True)
    states = run(backbone, prompt, ids, mask)
    ours = (states.hidden * mask[..., None]).square().sum()
    ours.backward()

    theirs: PeftModel = get_peft_model(model, config)
    table = theirs.prompt_encoder["default"].embedding.weight
    assert tuple(table.shape) == (M, backbone.prompt_dim)
    table.data = prompt.detach()[0].clone()
    hidden = theirs(input_ids=ids, attention_mask=mask).last_hidden_state
    loss = (hidden * mask[..., None]).square().sum()
    loss.backward()
    torch.testing.assert_close(ours, loss)
    torch.testing.assert_close(prompt.grad[0], table.grad, rtol=1e-4, atol=1e-4)


def test_grouped_keys_and_values_make_a_virtual_token_as_narrow_as_they_are() -> None:
    backbone = TextBackbone(grouped_llama(), placement="every_layer")
    assert backbone.prompt_dim == 2 * 2 * 2 * 8  # layers, key and value, heads of keys, width of a head


@pytest.mark.parametrize("name", sorted({*MASKED, *CAUSAL} - set(FITTING)))
def test_models_where_it_cannot_be_right_are_refused_by_name(name: str) -> None:
    model = build(name)
    with pytest.raises(LoPAError, match=f"every_layer.*{type(model.base_model).__name__}.*use 'before'"):
        TextBackbone(model, placement="every_layer")


def test_gradient_checkpointing_is_refused_since_it_drops_the_cache() -> None:
    model = grouped_llama()
    model.gradient_checkpointing_enable()
    with pytest.raises(LoPAError, match="drops the cache under gradient checkpointing"):
        TextBackbone(model, placement="every_layer")


def test_shapes_are_found_without_touching_the_weights() -> None:
    with torch.device("meta"):
        model = LlamaModel(LlamaConfig(**{**SIZES, "num_key_value_heads": 1, "num_hidden_layers": 3}))
    assert layer_prompts(model).shapes == ((1, 8),) * 6

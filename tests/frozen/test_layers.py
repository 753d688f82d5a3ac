"""Virtual tokens in every layer: equal to real tokens' keys and values, and to PEFT's prefix tuning."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel, PreTrainedModel

from lopa_lightning.errors import LoPAError
from lopa_lightning.frozen.backbone import Backbone
from lopa_lightning.frozen.layers import layer_prompts
from lopa_lightning.frozen.loading import freeze
from tests.frozen.conftest import shaken
from tests.frozen.test_architectures import CAUSAL, ITEMS, MASKED, SIZES, build, own_states, padded

FITTING_CAUSAL = sorted(set(CAUSAL) - {"Gemma2", "Mistral"})
FITTING = ["Electra", "XLMRoberta", *FITTING_CAUSAL]
M = 4
# In float64; some architectures rotate and sum in float32 whatever they are given.
EXACT = {"rtol": 0, "atol": 1e-6}


def grouped_llama() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(**{**SIZES, "num_key_value_heads": 2, "head_dim": 8})
    return shaken(freeze(LlamaModel(config)))


@pytest.mark.parametrize("name", FITTING)
def test_an_item_is_the_same_alone_and_in_any_batch(name: str) -> None:
    backbone = Backbone(build(name).double(), placement="every_layer")
    prompt = torch.randn(len(ITEMS), M, backbone.prompt_dim, dtype=torch.float64)
    for left in (False, True):
        batch = backbone(prompt, *padded(left))
        for row, item in enumerate(ITEMS):
            alone = backbone(prompt[row : row + 1], item[None], torch.ones(1, len(item), dtype=torch.long))
            torch.testing.assert_close(own_states(batch, row), own_states(alone, 0), **EXACT)


@pytest.mark.parametrize("name", FITTING_CAUSAL)
def test_real_tokens_keys_and_values_stand_for_the_tokens(name: str) -> None:
    """In a causal model a text after real tokens sees of them just their keys and values in every layer."""
    model = build(name).double()
    backbone, before, text = Backbone(model, placement="every_layer"), torch.tensor([3, 9, 27]), ITEMS[0]
    mask = torch.ones(1, len(text), dtype=torch.long)
    states = backbone(backbone.virtual_tokens(before)[None], text[None], mask)
    whole = model.base_model(input_ids=torch.cat([before, text])[None]).last_hidden_state
    torch.testing.assert_close(states.hidden[0], whole[0, len(before) :], **EXACT)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_states_and_gradients_are_those_of_pefts_prefix_tuning(kind: str) -> None:
    """With the same numbers: PEFT's table is [m, layers x (key, value) x heads x width], as ours is."""
    model = grouped_llama() if kind == "llama" else shaken(freeze(BertModel(BertConfig(**SIZES))))
    config = PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=M, prefix_projection=False)
    backbone = Backbone(model, placement="every_layer")
    ids, mask = padded(left=False)
    prompt = torch.randn(1, M, backbone.prompt_dim, requires_grad=True)
    states = backbone(prompt, ids, mask)
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
    backbone = Backbone(grouped_llama(), placement="every_layer")
    assert backbone.prompt_dim == 2 * 2 * 2 * 8  # layers, key and value, heads of keys, width of a head


@pytest.mark.parametrize("name", sorted({*MASKED, *CAUSAL} - set(FITTING)))
def test_models_where_it_cannot_be_right_are_refused_by_name(name: str) -> None:
    model = build(name)
    with pytest.raises(LoPAError, match=f"every_layer.*{type(model.base_model).__name__}.*use 'before'"):
        Backbone(model, placement="every_layer")


def test_gradient_checkpointing_is_refused_since_it_drops_the_cache() -> None:
    model = grouped_llama()
    model.gradient_checkpointing_enable()
    with pytest.raises(LoPAError, match="drops the cache under gradient checkpointing"):
        Backbone(model, placement="every_layer")


def test_shapes_are_found_without_touching_the_weights() -> None:
    with torch.device("meta"):
        model = LlamaModel(LlamaConfig(**{**SIZES, "num_key_value_heads": 1, "num_hidden_layers": 3}))
    assert layer_prompts(model).shapes == ((1, 8),) * 6

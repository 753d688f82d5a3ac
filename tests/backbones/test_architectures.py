"""The same promises for many architectures: batch invariance, and label words' logits as the model's own."""

from __future__ import annotations

import itertools
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PretrainedConfig

from lopa_lightning.backbones.base import States
from lopa_lightning.backbones.pretrained import freeze, is_causal
from lopa_lightning.backbones.text import TextBackbone
from tests.backbones.conftest import shaken
from tests.tiny import run

SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
GPT: dict[str, Any] = {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
TOKENS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MASKED: dict[str, dict[str, Any]] = {
    "Albert": {**SIZES, "embedding_size": 16},
    "DebertaV2": {**SIZES, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": 64},
    "DistilBert": {
        **{"vocab_size": 99, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
        "max_position_embeddings": 64,
    },
    "Electra": {**SIZES, "embedding_size": 16},
    "ModernBert": {**SIZES, **TOKENS, "cls_token_id": 1, "sep_token_id": 2},
    "MPNet": SIZES,
    "XLMRoberta": {**SIZES, "pad_token_id": 1},
}
CAUSAL: dict[str, dict[str, Any]] = {
    "Bloom": {"vocab_size": 99, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "CTRL": {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "dff": 48},
    "CodeGen": {**GPT, **TOKENS, "rotary_dim": 4},
    "Gemma2": {
        **SIZES,
        **{"num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0},
    },
    "GPTNeoX": SIZES,
    "Granite": {**SIZES, "logits_scaling": 3.0},
    "Mistral": {**SIZES, "num_key_value_heads": 2},
    "OPT": {
        **{"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48},
        **{"max_position_embeddings": 64, "word_embed_proj_dim": 32},
    },
    "Phi": SIZES,
    "Phi3": {**SIZES, **TOKENS},
    "Qwen3": {**SIZES, "num_key_value_heads": 2, "head_dim": 8},
}
ITEMS = [torch.arange(5, 12), torch.arange(20, 23), torch.arange(40, 45)]
WIDTH = 9


def build(name: str, **options: Any) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config: PretrainedConfig = getattr(transformers, f"{name}Config")(
        **{**SIZES, **{**MASKED, **CAUSAL}.get(name, {})}, **options
    )
    model = freeze((AutoModelForCausalLM if name in CAUSAL else AutoModelForMaskedLM).from_config(config))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.tie_weights()
    return shaken(model)


def padded(left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = torch.zeros(len(ITEMS), WIDTH, dtype=torch.long), torch.zeros(len(ITEMS), WIDTH, dtype=torch.long)
    for row, item in enumerate(ITEMS):
        place = slice(WIDTH - len(item), WIDTH) if left else slice(0, len(item))
        ids[row, place], mask[row, place] = item, 1
    return ids, mask


def own_states(states: States, row: int) -> torch.Tensor:
    return states.hidden[row][states.content_mask[row] == 1]


@pytest.mark.sampled(6)
@pytest.mark.parametrize("name", [*MASKED, *CAUSAL])
def test_an_item_is_the_same_alone_and_in_any_batch(name: str) -> None:
    backbone = TextBackbone(build(name))
    prompt = torch.randn(len(ITEMS), 4, backbone.prompt_dim)
    batches = [run(backbone, prompt, *padded(left)) for left in (False, True)]
    for row, item in enumerate(ITEMS):
        alone = run(backbone, prompt[row : row + 1], item[None], torch.ones(1, len(item), dtype=torch.long))
        for batch in batches:
            torch.testing.assert_close(own_states(batch, row), own_states(alone, 0), rtol=0, atol=1e-5)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", [name for name in CAUSAL if name != "Bloom"])  # which does not say that it is causal
def test_what_is_read_in_parts_is_what_is_read_at_once(name: str) -> None:
    backbone = TextBackbone(build(name), placement="after")
    assert backbone.reads_in_parts == (name not in ("Gemma2", "Mistral"))  # these have sliding windows
    prompt = torch.randn(len(ITEMS), 4, backbone.prompt_dim)
    for left, position in itertools.product((False, True), (None, torch.tensor([2, 3, 1]))):
        with_parts = run(backbone, prompt, *padded(left), position=position)
        with mock.patch.object(backbone, "reads_in_parts", False):
            whole = run(backbone, prompt, *padded(left), position=position)
        for row in range(len(ITEMS)):
            torch.testing.assert_close(own_states(with_parts, row), own_states(whole, row), rtol=0, atol=1e-5)
        mask = padded(left)[1] == 1
        torch.testing.assert_close(with_parts.aligned()[mask], whole.aligned()[mask], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [*MASKED, *CAUSAL])
def test_label_logits_are_the_models_own(name: str) -> None:
    model = build(name)
    backbone, item, words = TextBackbone(model), ITEMS[0], torch.tensor([7, 50, 98])
    prompt = torch.randn(1, 4, backbone.prompt_dim)
    states = run(backbone, prompt, item[None], torch.ones(1, len(item), dtype=torch.long))
    plain = model(inputs_embeds=torch.cat([prompt, model.get_input_embeddings()(item[None])], 1)).logits
    torch.testing.assert_close(backbone.label_logits(states.hidden[:, -2], words), plain[:, -2, words])


@pytest.mark.parametrize("name", [*MASKED, *CAUSAL])
def test_attention_that_says_it_is_causal_sees_nothing_of_what_comes_later(name: str) -> None:
    model = build(name).base_model
    ids = torch.randint(50, (1, 7))
    states, others = (
        model(tokens).last_hidden_state[:, :6] for tokens in (ids, torch.cat([ids[:, :6], ids[:, :1]], 1))
    )
    sees = not torch.allclose(states, others, rtol=0, atol=1e-6)
    assert sees == (name in MASKED)
    assert not (sees and is_causal(model))


def test_a_causal_model_is_given_no_mask_where_all_padding_comes_last() -> None:
    given: dict[str, list[bool]] = {}
    for name in ("Qwen3", "MPNet"):
        backbone = TextBackbone(build(name))
        masks = given.setdefault(name, [])
        backbone.body.register_forward_pre_hook(
            lambda model, args, options, masks=masks: masks.append(options["attention_mask"] is not None),
            with_kwargs=True,
        )
        for left in (False, True):
            run(backbone, torch.randn(len(ITEMS), 4, backbone.prompt_dim), *padded(left))
    assert given == {"Qwen3": [False, True], "MPNet": [True, True]}

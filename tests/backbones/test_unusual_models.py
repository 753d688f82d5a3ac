"""Models that differ from the usual ones in head, positions or what a token sees: right, or refused in a line."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from lopa_lightning.backbones.adapters import trained_weights
from lopa_lightning.backbones.generation import check_generates
from lopa_lightning.backbones.lm_head import VocabularyHead
from lopa_lightning.backbones.padding_check import check_causal, check_embeddings
from lopa_lightning.backbones.pretrained import first_position, freeze, is_causal, max_positions
from lopa_lightning.backbones.text import TextBackbone
from lopa_lightning.errors import LoPAError
from tests.backbones.test_architectures import SIZES, TOKENS
from tests.tiny import run

EXPERTS: dict[str, Any] = {**SIZES, "num_key_value_heads": 2, "moe_intermediate_size": 16, "num_experts": 4}
HEADS: dict[str, dict[str, Any]] = {
    # Mixtures of experts, whose heads pass on a router's logits.
    "Mixtral": {**SIZES, "num_key_value_heads": 2, "num_local_experts": 4},
    "Qwen2Moe": {**EXPERTS, "shared_expert_intermediate_size": 16, "num_experts_per_tok": 2},
    "Qwen3Moe": {**EXPERTS, "head_dim": 8, "num_experts_per_tok": 2},
    "Olmoe": {**EXPERTS, "num_experts_per_tok": 2},
    # A bias beside the projection, and a projection in two parts.
    "Esm": {**SIZES, **TOKENS, "mask_token_id": 3, "position_embedding_type": "rotary"},
    "MobileBert": {**SIZES, "embedding_size": 16, "intra_bottleneck_size": 32, "true_hidden_size": 32},
}


def built(name: str, auto: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    model = freeze(auto.from_config(getattr(transformers, f"{name}Config")(**options)))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.tie_weights()
    return model


@pytest.mark.parametrize("name", HEADS)
def test_logits_and_losses_are_the_models_own(name: str) -> None:
    model = built(name, AutoModelForMaskedLM if name in ("Esm", "MobileBert") else AutoModelForCausalLM, **HEADS[name])
    backbone, ids, words = TextBackbone(model), torch.arange(5, 12)[None], torch.tensor([7, 50, 98])
    prompt = torch.randn(1, 4, backbone.prompt_dim)
    states = run(backbone, prompt, ids, torch.ones_like(ids)).hidden
    logits = model(inputs_embeds=torch.cat([prompt, model.get_input_embeddings()(ids)], 1)).logits
    torch.testing.assert_close(backbone.label_logits(states[:, -2], words), logits[:, -2, words], rtol=1e-5, atol=1e-5)
    losses, hits = backbone.token_losses(states[0], torch.full((11,), 7))
    torch.testing.assert_close(losses, F.cross_entropy(logits[0], torch.full((11,), 7), reduction="none"))
    assert hits is not None
    assert hits.tolist() == (logits[0].argmax(-1) == 7).tolist()


def test_a_head_that_reads_more_than_states_is_refused_before_weights() -> None:
    with torch.device("meta"):
        config = transformers.DebertaV2Config(**SIZES, legacy=False)
        model = AutoModelForMaskedLM.from_config(config)
    with pytest.raises(
        LoPAError, match="the language model head of DebertaV2ForMaskedLM reads more than hidden states"
    ):
        TextBackbone(model)


@pytest.mark.parametrize(("name", "first"), [("Roberta", 2), ("Yoso", 2), ("Nystromformer", 2), ("Bert", 0)])
def test_positions_are_counted_as_the_model_counts_them(name: str, first: int) -> None:
    options = {**SIZES, "pad_token_id": 1, **({"segment_means_seq_len": 64, "num_landmarks": 64} if first else {})}
    body = built(name, AutoModel, **options)
    assert first_position(body) == first
    assert max_positions(body) == (62 if name == "Roberta" else 64)  # whose config counts the two unused ones
    backbone, ids = TextBackbone(body), torch.arange(5, 12)[None]
    check_embeddings(backbone)
    states = run(backbone, torch.zeros(1, 0, 32), ids, torch.ones_like(ids)).hidden
    torch.testing.assert_close(states, body(input_ids=ids).last_hidden_state, rtol=0, atol=1e-5)


def test_positions_that_are_not_known_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lopa_lightning.backbones.padding_check.first_position", lambda body: 0)
    with pytest.raises(
        LoPAError, match=r"RobertaModel counts the positions of tokens otherwise than from 0: states dif"
    ):
        check_embeddings(TextBackbone(built("Roberta", AutoModel, **SIZES, pad_token_id=1)))


def test_a_limit_by_another_name_is_known() -> None:
    assert (
        max_positions(built("Mpt", AutoModel, d_model=32, n_heads=4, n_layers=2, max_seq_len=16, vocab_size=99)) == 16
    )


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Llama", {**SIZES, "is_causal": False}),
        ("XLNet", {"vocab_size": 99, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}),
        ("BertGeneration", SIZES),
    ],
)
def test_a_model_that_sees_later_tokens_learns_no_next_ones(name: str, options: dict[str, Any]) -> None:
    backbone = TextBackbone(built(name, AutoModelForCausalLM, **options))
    assert not is_causal(backbone.body)
    with pytest.raises(
        LoPAError, match=rf"{name}\w* is not causal: a token's states change by \d+% with a later token"
    ):
        check_causal(backbone)


@pytest.mark.parametrize(
    ("name", "options"),
    [("Llama", SIZES), ("Bloom", {"vocab_size": 99, "hidden_size": 32, "n_layer": 2, "n_head": 4})],
)
def test_a_causal_model_may(name: str, options: dict[str, Any]) -> None:
    check_causal(TextBackbone(built(name, AutoModelForCausalLM, **options)))  # Bloom does not say that it is one


def test_generation_would_count_a_decoders_positions_from_zero() -> None:
    model = built("Roberta", AutoModelForCausalLM, **SIZES, pad_token_id=1, is_decoder=True)
    with pytest.raises(
        LoPAError, match="its generate counts positions from 0, and the model was trained with positions"
    ):
        check_generates(model)


def test_the_norm_after_the_last_layer_is_trained_where_it_is_registered_before() -> None:
    options = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "ffn_dim": 48}
    model = built("OPT", AutoModelForCausalLM, **options, word_embed_proj_dim=32, max_position_embeddings=64)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    trained = {names[id(parameter)] for parameter in trained_weights(model, model.base_model, 1)}
    assert {name for name in trained if ".layers.2." not in name} == {
        "model.decoder.final_layer_norm.weight",
        "model.decoder.final_layer_norm.bias",
    }
    model = built("OPT", AutoModelForCausalLM, **options, word_embed_proj_dim=32, do_layer_norm_before=False)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert all(".layers.2." in names[id(each)] for each in trained_weights(model, model.base_model, 1))


def test_a_quantised_head_is_run_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VocabularyHead, "_is_selective", lambda head, width: pytest.fail("other weights were tried"))
    model = built("Bert", AutoModelForMaskedLM, **SIZES)
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    words = torch.tensor([7, 50, 98])
    states = torch.randn(2, 32)
    torch.testing.assert_close(VocabularyHead(model)(states, words), VocabularyHead(model)(states)[:, words])

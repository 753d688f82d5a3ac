"""A text alone and padded: models that compute the same are passed, others are refused or warned of, with no list."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModel, PreTrainedModel

from lopa_lightning.backbones.padding_check import change_by_padding, check_embeddings, check_padding, tolerance
from lopa_lightning.backbones.pretrained import freeze
from lopa_lightning.backbones.text import TextBackbone
from lopa_lightning.backbones.text_spec import instance_inputs
from lopa_lightning.errors import LoPAError
from lopa_lightning.instances.encoder import InstanceEncoder, InstanceEncoderSpec
from lopa_lightning.task import Side
from tests.backbones.test_architectures import GPT, MASKED, SIZES
from tests.tiny import TEXT

CONFIGS: dict[str, dict[str, Any]] = {
    "Mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "vocab_size": 99},
    "GPTNeo": {
        **{"vocab_size": 99, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "intermediate_size": 48},
        **{"max_position_embeddings": 128, "attention_types": [[["global", "local"], 1]], "window_size": 64},
    },
    "GPT2": GPT,
    "Bert": SIZES,
    "DebertaV2": MASKED["DebertaV2"],
    "Llama": SIZES,
    "ConvBert": {**SIZES, "embedding_size": 32},
    "MobileBert": {**SIZES, "embedding_size": 32, "intra_bottleneck_size": 32},
    "Yoso": SIZES,
    "RoFormer": {**SIZES, "embedding_size": 32},
    "FalconH1": {
        **{**SIZES, "embedding_multiplier": 5.6, "head_dim": 8, "num_key_value_heads": 4},
        **{"mamba_d_ssm": 32, "mamba_n_heads": 2, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1},
    },
    "Roberta": {**SIZES, "pad_token_id": 1},
    "Granite": {**SIZES, "embedding_multiplier": 5.6},
    "Gemma2": {**SIZES, "head_dim": 8},
}


def build(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    model = freeze(AutoModel.from_config(getattr(transformers, f"{name}Config")(**CONFIGS[name])))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.to(dtype)


def check(backbone: TextBackbone, side: Side, m: int = 4) -> list[str]:
    """The warnings of a check."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_padding(backbone, m, side, pad_id=0)
    return [str(warning.message) for warning in caught if "padding" in str(warning.message)]


@pytest.mark.sampled(4)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["Bert", "DebertaV2", "GPT2", "Llama", "Mpt", "GPTNeo"])
def test_models_to_which_padding_is_nothing_pass(name: str, dtype: torch.dtype) -> None:
    for placement in ("before", "after_first", "every_layer"):
        if placement == "every_layer" and name == "DebertaV2":
            continue
        backbone = TextBackbone(build(name, dtype), placement=placement)
        for side in ("left", "right"):
            if placement != "every_layer" or side == "right" or name not in ("Mpt", "GPTNeo"):
                assert check(backbone, side) == check(backbone, side, m=0) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["Mpt", "GPTNeo"])
def test_padding_between_virtual_tokens_and_text_is_refused_where_it_counts(name: str, dtype: torch.dtype) -> None:
    """ALiBi counts places, and local attention ends: of GPT-Neo's only behind a window longer than the texts."""
    backbone = TextBackbone(build(name, dtype), placement="every_layer")
    with pytest.raises(LoPAError, match=f"'every_layer'.*on the left.*{name}Model by [1-9][0-9]*%.*another placement"):
        check_padding(backbone, 4, "left", 0)
    assert check(backbone, "left", m=0) == []


@pytest.mark.parametrize(("name", "in_parts"), [("GPTNeo", False), ("GPT2", True), ("Llama", True)])
def test_a_model_that_counts_padding_between_two_parts_reads_at_once(name: str, in_parts: bool) -> None:
    backbone = TextBackbone(build(name), placement="after")
    assert backbone.reads_in_parts
    assert check(backbone, "right") == []
    assert backbone.reads_in_parts == in_parts


def test_rotations_that_depend_on_a_texts_length_are_computed_at_once() -> None:
    longrope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 1e4}
    longrope["original_max_position_embeddings"] = 12
    for rope, in_parts in ((None, True), (longrope, False)):
        config = transformers.LlamaConfig(**SIZES, rope_parameters=rope)
        assert TextBackbone(AutoModel.from_config(config), placement="after").reads_in_parts == in_parts


@pytest.mark.parametrize(
    ("name", "sides"),
    [("ConvBert", "left right"), ("MobileBert", "left right"), ("Yoso", "left right"), ("RoFormer", "left")],
)
def test_models_that_mix_padding_in_by_themselves_are_warned_of(name: str, sides: str) -> None:
    backbone = TextBackbone(build(name))
    for side in ("left", "right"):
        for m in (0, 4):
            found = check(backbone, side, m)
            assert len(found) == (side in sides)
            assert all(f"{name}Model mixes padding" in text and f"on the {side}" in text for text in found)


def test_an_instance_encoder_that_mixes_padding_in_is_warned_of_once() -> None:
    batch = instance_inputs(torch.arange(8).view(2, 4), torch.ones(2, 4, dtype=torch.long))
    for name, count in (("ConvBert", 1), ("Bert", 0)):
        encoder = InstanceEncoder(build(name), InstanceEncoderSpec(max_length=12), TEXT)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            first, second = encoder(batch), encoder(batch)
        assert [f"instance encoder {name}Model mixes" in str(w.message) for w in caught] == [True] * count
        torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_a_check_leaves_modes_and_random_numbers_as_they_were() -> None:
    backbone = TextBackbone(build("Bert"), dropout=True).train()
    backbone.body.encoder.layer[0].train(False)
    modes = [part.training for part in backbone.modules()]
    torch.manual_seed(3)
    wanted = torch.rand(1)
    torch.manual_seed(3)
    check_padding(backbone, 4, "right", 0)
    assert [part.training for part in backbone.modules()] == modes
    assert torch.rand(1) == wanted


@pytest.mark.parametrize("room", [0, 1, 2, 3, 30])
def test_texts_fit_into_the_positions_that_there_are(room: int) -> None:
    lengths: list[int] = []

    def states(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        assert mask.any(1).all()
        lengths.append(ids.shape[1])
        return ids[0, mask[0] == 1]

    assert change_by_padding(states, 99, "left", 0, room) == 0
    assert lengths == {0: [], 1: [], 2: [2, 1], 3: [3, 1], 30: [18, 6]}[room]


def test_rounding_is_allowed_for_by_dtype_and_quantisation() -> None:
    model = build("Bert")
    assert tolerance(model) == 1e-3
    model.config.quantization_config = {"quant_method": "torchao"}
    assert tolerance(model) == tolerance(build("Bert", torch.float16)) == 0.1


@pytest.mark.parametrize("name", ["Bert", "Roberta", "GPT2", "Llama", "Granite", "Gemma2"])
def test_token_ids_and_their_embeddings_have_the_same_states(name: str) -> None:
    check_embeddings(TextBackbone(build(name)))


def test_a_model_that_scales_token_ids_alone_is_refused() -> None:
    with pytest.raises(LoPAError, match="FalconH1Model changes the embeddings of token ids and not those"):
        TextBackbone(build("FalconH1")).check_padding(4, ["right"])

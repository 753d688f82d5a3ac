"""Folders whose config, tokenizer or weights cannot be right are refused before a weight is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lopa_lightning import InstanceEncoderSpec, PretrainedSpec
from lopa_lightning.backbones.pretrained import checked_shapes, load_config, load_model, load_tokenizer
from lopa_lightning.errors import LoPAError
from tests.modules.helpers import module
from tests.refusals import Refused, assert_refusal

Tiny = Callable[[str], str]
Variant = Callable[..., Path]


@pytest.fixture
def variant(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Variant:
    """A copy of a tiny model's folder with some entries of its config changed."""
    monkeypatch.chdir(tmp_path)

    def make(kind: str = "bert", **entries: Any) -> Path:
        folder = tmp_path / "model"
        shutil.copytree(tiny(kind), folder)
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))
        return folder

    return make


def build(folder: Path, objective: str = "masked_lm") -> None:
    """Asks for what a module asks for before rows and weights."""
    module(str(folder), objective=objective).builder.skeleton  # noqa: B018


# Weights

DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "only a length": lambda content: content[:8],
    "cut in the header": lambda content: content[:200],
    "cut in the data": lambda content: content[:-1],
    "longer": lambda content: content + b"x",
    "junk": lambda content: b"junk" * 1000,
    "a web page": lambda content: b"<html>404</html>",
    "a pointer of Git LFS": lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "flipped length": lambda content: bytes(byte ^ 0xFF for byte in content[:8]) + content[8:],
    "flipped header": lambda content: content[:8] + bytes(byte ^ 0x55 for byte in content[8:40]) + content[40:],
    "another offset": lambda content: content.replace(b'"data_offsets":[0,', b'"data_offsets":[9,', 1),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_of_weights(damage: str, variant: Variant, refused: Refused) -> None:
    path = variant() / "model.safetensors"
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    with refused(f"the weights in '{path}' are damaged: SafetensorError"):
        build(path.parent)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_that_no_check_came_before(damage: str, variant: Variant) -> None:
    path = variant() / "model.safetensors"
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    with pytest.raises(LoPAError) as caught:
        load_model(PretrainedSpec(str(path.parent)), "masked_lm")
    assert_refusal(str(caught.value), f"the weights of '{path.parent}' cannot be loaded: SafetensorError")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "model.safetensors.index.json' is no index of weights: "),
        ("", "model.safetensors.index.json' is no index of weights: "),
        ("[]", "model.safetensors.index.json' is no index of weights: TypeError"),
        ("5", "model.safetensors.index.json' is no index of weights: TypeError"),
        ("{}", "model.safetensors.index.json' is no index of weights: KeyError: 'weight_map'"),
        ('{"weight_map": []}', "is no index of weights: "),
        (
            '{"weight_map": {"a": "a-1.safetensors", "b": "a-2.safetensors"}}',
            "names a-1.safetensors, a-2.safetensors",
        ),
        ('{"weight_map": {"a": "model.safetensors"}}', "lack a, which their index names"),
    ],
)
def test_a_damaged_index(index: str, message: str, variant: Variant, refused: Refused) -> None:
    folder = variant()
    (folder / "model.safetensors.index.json").write_text(index)
    with refused(message):
        build(folder)


def test_a_folder_without_weights(variant: Variant, refused: Refused) -> None:
    folder = variant()
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    with refused(f"no model weights in '{folder}': neither model.safetensors nor pytorch_model.bin"):
        build(folder)


@pytest.mark.parametrize("content", [b"", b"junk", b"\x80\x02."], ids=["empty", "junk", "pickle"])
def test_a_damaged_file_of_an_older_format(content: bytes, variant: Variant) -> None:
    folder = variant()
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(LoPAError) as caught:
        load_model(PretrainedSpec(str(folder)), "masked_lm")
    assert_refusal(str(caught.value), str(folder))


# Configs that do not fit the weights

UNFIT = [
    ("bert", {"hidden_size": 64}, "bert.embeddings.word_embeddings.weight is", "32), by the config", "64)"),
    ("bert", {"vocab_size": 50}, "bert.embeddings.word_embeddings.weight is", ", by the config (50, 32)"),
    ("bert", {"vocab_size": 5000}, "bert.embeddings.word_embeddings.weight is", ", by the config (5000, 32)"),
    ("bert", {"max_position_embeddings": 32}, "position_embeddings.weight is (64, 32), by the config (32, 32)"),
    ("bert", {"intermediate_size": 7}, "intermediate.dense.weight is (48, 32), by the config (7, 32)"),
    ("llama", {"num_attention_heads": 8}, "self_attn.q_proj.weight is (32, 32), by the config (64, 32)"),
    ("llama", {"num_key_value_heads": 4}, "self_attn.k_proj.weight is (16, 32), by the config (32, 32)"),
    ("llama", {"vocab_size": 50}, "model.embed_tokens.weight is", "by the config (50, 32)"),
    ("bert", {"num_hidden_layers": 3}, "has no weights for bert.encoder.layer.2."),
    ("llama", {"num_hidden_layers": 3}, "has no weights for model.layers.2."),
    ("bert", {"num_hidden_layers": 1}, "have bert.encoder.layer.1.attention", "and its config no layer of that number"),
    ("llama", {"num_hidden_layers": 1}, "have model.layers.1.", "and its config no layer of that number"),
]


@pytest.mark.parametrize(("kind", "entries", "parts"), [(kind, entries, parts) for kind, entries, *parts in UNFIT])
@pytest.mark.parametrize("saved", ["safetensors", "bin"])
def test_a_config_that_does_not_fit_the_weights(
    kind: str, entries: dict[str, Any], parts: list[str], saved: str, variant: Variant, request: pytest.FixtureRequest
) -> None:
    folder, family = variant(kind, **entries), "masked_lm" if kind == "bert" else "causal_lm"
    if saved == "safetensors":
        with request.getfixturevalue("refused")(str(folder), *parts):
            build(folder, family)
        return
    # Of the older format nothing is known before it is read: the same is refused then, of some tensor.
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(LoPAError) as caught:
        load_model(PretrainedSpec(str(folder)), family)
    assert_refusal(str(caught.value), str(folder))


def test_what_a_head_has_beside_the_layers_is_left_out(variant: Variant) -> None:
    checked_shapes(PretrainedSpec(str(variant())), "encoder")


def test_layer_norms_as_they_were_first_saved_are_found(variant: Variant) -> None:
    path = variant() / "model.safetensors"
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    tensors = {
        next((name.replace(new, first) for new, first in old.items() if name.endswith(new)), name): value
        for name, value in load_file(path).items()
    }
    save_file(tensors, path, {"format": "pt"})
    checked_shapes(PretrainedSpec(str(path.parent)), "masked_lm")


@pytest.mark.parametrize("architecture", ["BertModel", "LlamaModel"])
def test_a_head_that_was_not_saved_is_known_from_the_config(
    architecture: str, variant: Variant, refused: Refused
) -> None:
    """As of a model on the hub, whose weights are not at hand yet."""
    kind, family = ("bert", "masked_lm") if architecture == "BertModel" else ("llama", "causal_lm")
    folder = variant(kind, architectures=[architecture])
    (folder / "model.safetensors").rename(folder / "model_elsewhere.txt")
    with refused(f"was saved as {architecture} and has no weights for", "use objective: head"):
        build(folder, family)


# Configs that describe no model


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"num_attention_heads": 3}, "The hidden size (32) is not a multiple of the number of attention heads (3)"),
        ({"num_attention_heads": 0}, "ZeroDivisionError"),
        ({"vocab_size": -1}, "negative dimension -1"),
        ({"vocab_size": 0}, "IndexError"),
        ({"num_hidden_layers": 0}, "has 0 layers; there must be at least 1"),
        ({"num_hidden_layers": -1}, "has -1 layers; there must be at least 1"),
        ({"hidden_act": "junk"}, "KeyError: 'junk'"),
        ({"hidden_size": "wide"}, "Field 'hidden_size' expected int, got str (value: 'wide')"),
        ({"hidden_size": 32.5}, "Field 'hidden_size' expected int, got float (value: 32.5)"),
        ({"hidden_size": None}, "Field 'hidden_size' expected int, got NoneType (value: None)"),
        ({"hidden_size": 10**12, "num_attention_heads": 1}, "10000000000"),
        ({"hidden_dropout_prob": 2.0}, "dropout probability has to be between 0 and 1, but got 2.0"),
        ({"pad_token_id": 99999}, "Padding_idx must be within num_embeddings"),
        ({"dtype": "float99"}, "float99"),
        ({"is_encoder_decoder": True}, "'bert' is an encoder-decoder model"),
        ({"model_type": "telepathy"}, "telepathy"),
        ({"model_type": ["bert"]}, "unhashable type"),
    ],
    ids=str,
)
def test_a_config_that_describes_no_model(
    entries: dict[str, Any], message: str, variant: Variant, refused: Refused
) -> None:
    folder = variant(**entries)
    with refused(message):
        build(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "5", '"bert"', "null", "{}", "\x00\x01"])
@pytest.mark.parametrize("read", [load_config, load_tokenizer])
def test_a_file_of_json_that_is_none(content: str, read: Callable[..., Any], variant: Variant) -> None:
    folder = variant()
    (folder / ("config.json" if read is load_config else "tokenizer.json")).write_text(content)
    with pytest.raises(LoPAError) as caught:
        read(PretrainedSpec(str(folder)))
    assert_refusal(str(caught.value), f"no usable {'model' if read is load_config else 'tokenizer'} in '{folder}'")


# Attention


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("attention", "message"),
    [
        ("junk", '`attn_implementation="junk"` is not supported'),
        ("SDPA", '`attn_implementation="SDPA"` is not supported'),
        ("", '`attn_implementation=""` is not supported'),
        ("flash_attention_2", "the package for FlashAttention2 doesn't seem to be installed"),
        ("kernels-community/nothing-{part}", "kernels"),
    ],
)
@pytest.mark.parametrize("part", ["backbone", "instance_encoder"])
def test_an_attention_that_is_not_there(part: str, attention: str, message: str, tiny: Tiny, refused: Refused) -> None:
    name, attention = tiny("bert"), attention.format(part=part)  # some releases of transformers refuse a name but once
    encoder = InstanceEncoderSpec(name, attn_implementation=attention)
    one = module(name, **({"instance_encoder": encoder} if part == "instance_encoder" else {}))
    if part == "backbone":
        one.backbone_spec = PretrainedSpec(name, attn_implementation=attention)
    with refused(message):
        one.input_spec  # noqa: B018


# Names


def test_a_home_folder_is_expanded(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(tiny("bert"))
    monkeypatch.setenv("HOME", str(folder.parent))
    assert load_config(PretrainedSpec(f"~/{folder.name}")).hidden_size == 32
    assert load_tokenizer(InstanceEncoderSpec(f"~/{folder.name}").pretrained()).mask_token == "[MASK]"


@pytest.mark.parametrize("name", ["", " ", "~/nothing", "a//b", "x" * 300, "a\0b", "https://x.y/z", "a:b"])
@pytest.mark.parametrize("read", [load_config, load_tokenizer])
def test_a_name_of_nothing(name: str, read: Callable[..., Any]) -> None:
    with pytest.raises(LoPAError) as caught:
        read(PretrainedSpec(name))
    assert_refusal(str(caught.value), f"found for {name!r}")


def test_a_folder_with_brackets_in_its_name_is_meant(tiny: Tiny, tmp_path: Path) -> None:
    shutil.copytree(tiny("bert"), tmp_path / "a[1]")
    load_model(PretrainedSpec(str(tmp_path / "a[1]")), "masked_lm")
    checked_shapes(PretrainedSpec(str(tmp_path / "a[1]")), "masked_lm")

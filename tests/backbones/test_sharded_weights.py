"""Weights that go straight to shards are those that transformers loads. On two processes: tests/test_sharded.py."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from lopa_lightning import PretrainedSpec
from lopa_lightning.backbones import pretrained
from lopa_lightning.backbones.pretrained import Family, load_model
from lopa_lightning.backbones.sharding import whole
from lopa_lightning.checkpoint import fingerprint

Tiny = Callable[[str], str]


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.fixture
def no_whole_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the whole model was read")

    for auto_class in pretrained._AUTO_CLASSES.values():
        monkeypatch.setattr(auto_class, "from_pretrained", never)


def assert_same(sharded: Any, expected: Any) -> None:
    values = dict(sharded.named_parameters())
    assert list(values) == [name for name, _ in expected.named_parameters()]
    for name, parameter in expected.named_parameters():
        assert torch.equal(whole(values[name]), parameter), name
        assert values[name].dtype == parameter.dtype
        assert not values[name].requires_grad
    buffers = dict(sharded.named_buffers())
    for name, buffer in expected.named_buffers():
        assert torch.equal(buffers[name], buffer), name
    assert any(isinstance(value, DTensor) for value in values.values())
    assert fingerprint(sharded) == fingerprint(expected)


@pytest.mark.parametrize(
    ("kind", "family"),
    [
        *(("bert", "masked_lm"), ("bert", "encoder"), ("bert_base", "encoder"), ("roberta", "masked_lm")),
        *(("gpt2", "causal_lm"), ("llama", "causal_lm"), ("llama", "encoder")),
    ],
)
def test_they_are_those_of_transformers(
    tiny: Tiny, mesh: DeviceMesh, kind: str, family: Family, request: pytest.FixtureRequest
) -> None:
    expected = load_model(PretrainedSpec(tiny(kind)), family)
    request.getfixturevalue("no_whole_model")
    before = torch.get_rng_state()
    sharded = load_model(PretrainedSpec(tiny(kind)), family, mesh)
    assert_same(sharded, expected)
    assert torch.equal(torch.get_rng_state(), before)


def test_several_files_another_format_and_old_names(
    tiny: Tiny, tmp_path: Path, mesh: DeviceMesh, request: pytest.FixtureRequest
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    request.getfixturevalue("no_whole_model")
    assert_same(load_model(PretrainedSpec(str(tmp_path)), "causal_lm", mesh), model)
    as_float = load_model(PretrainedSpec(str(tmp_path), dtype="float32"), "causal_lm", mesh)
    assert_same(as_float, model.float())


def test_layer_norms_as_they_were_once_called(
    tiny: Tiny, tmp_path: Path, mesh: DeviceMesh, request: pytest.FixtureRequest
) -> None:
    expected = load_model(PretrainedSpec(tiny("bert_base")), "encoder")
    expected.save_pretrained(tmp_path)
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    saved = load_file(tmp_path / "model.safetensors")
    for new, once in old.items():
        saved = {name.replace(new, once): value for name, value in saved.items()}
    save_file(saved, tmp_path / "model.safetensors", {"format": "pt"})
    request.getfixturevalue("no_whole_model")
    assert_same(load_model(PretrainedSpec(str(tmp_path)), "encoder", mesh), expected)


def test_files_that_name_other_tensors_are_read_whole(tiny: Tiny, tmp_path: Path, mesh: DeviceMesh) -> None:
    expected = load_model(PretrainedSpec(tiny("llama")), "causal_lm")
    torch.save(expected.state_dict(), tmp_path / "pytorch_model.bin")
    config = json.loads(Path(tiny("llama"), "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    got = load_model(PretrainedSpec(str(tmp_path)), "causal_lm", mesh)
    assert not any(isinstance(parameter, DTensor) for parameter in got.parameters())
    assert all(torch.equal(value, got.state_dict()[name]) for name, value in expected.state_dict().items())

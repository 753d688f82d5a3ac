"""The identity of an instance encoder whose vectors are kept."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from lopa_lightning import checkpoint as ckpt
from lopa_lightning.backbones.pretrained import PretrainedSpec, load_model
from lopa_lightning.errors import LoPAError
from lopa_lightning.instances.encoder import InstanceEncoder, InstanceEncoderSpec
from lopa_lightning.instances.vectors import VectorCache, commit_of, source_key
from tests.tiny import TEXT, on_hub, save_tiny

Tiny = Callable[[str], str]


def cache(folder: str, **options: Any) -> VectorCache:
    source = PretrainedSpec(folder)
    encoder = InstanceEncoder(
        functools.partial(load_model, source, "encoder"), InstanceEncoderSpec(folder, **options), TEXT
    )
    return VectorCache(source, encoder, ckpt.fingerprint)


def test_other_weights_in_the_same_folder_have_another_place(tmp_path: Path) -> None:
    folder = save_tiny("bert_base", tmp_path / "encoder")
    weights, found = Path(folder, "model.safetensors"), [cache(folder).folder()]
    assert cache(folder).folder() == found[0]
    size, tensors = weights.stat().st_size, load_file(weights)
    tensors["encoder.layer.1.output.LayerNorm.bias"][7] += 1.0  # one number of one tensor, the size as before
    save_file(tensors, weights, {"format": "pt"})
    assert weights.stat().st_size == size
    found.append(cache(folder).folder())
    # All weights others, and a clock that does not tell: as files of container images are.
    for scale in (1.0, 1.01):
        save_file({name: value * scale for name, value in tensors.items()}, weights, {"format": "pt"})
        os.utime(weights, ns=(0, 0))
        found.append(cache(folder).folder())
    Path(folder, "config.json").write_text(Path(folder, "config.json").read_text() + " ")
    found += [cache(folder).folder(), cache(folder, pooling="max").folder(), cache(folder, normalize=False).folder()]
    assert len(set(found)) == len(found)


def test_dtype_attention_and_quantization_are_part_of_the_source(tiny: Tiny) -> None:
    folder = tiny("bert_base")
    options: list[dict[str, Any]] = [{}, {"dtype": "bfloat16"}, {"attn_implementation": "eager"}]
    options += [{"quantization": {"quant_method": "bitsandbytes", f"load_in_{bits}bit": True}} for bits in (4, 8)]
    assert len({source_key(PretrainedSpec(folder, **option)) for option in options}) == 5


def test_a_model_of_the_hub_is_known_by_its_commit(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    keys = set()
    for name, commit in (("someone/model", "a" * 40), ("someone/model", "b" * 40), ("another/model", "a" * 40)):
        on_hub(tiny("bert_base"), name, commit, tmp_path)
        assert commit_of(PretrainedSpec(name)) == commit
        keys.add(source_key(PretrainedSpec(name)))
    assert commit_of(PretrainedSpec("someone/model", revision="a" * 40)) == "a" * 40
    assert len(keys) == 3
    assert commit_of(PretrainedSpec(tiny("bert_base"))) is None
    with pytest.raises(LoPAError, match="no model found for 'no/body', as a folder or a reachable hub id"):
        commit_of(PretrainedSpec("no/body"))
    on_hub(tiny("bert_base"), "no/commit", "latest", tmp_path)
    with pytest.raises(LoPAError, match="'no/commit' has no commit to know its weights by"):
        source_key(PretrainedSpec("no/commit"))


def test_which_encoder_it_is_is_read_from_the_disk(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    wanted = ckpt.fingerprint(load_model(PretrainedSpec(tiny("bert_base")), "encoder"))
    assert cache(tiny("bert_base")).facts() == wanted
    again = cache(tiny("bert_base"))
    assert again.facts() == wanted
    assert not again.encoder._unregistered
    (path,) = tmp_path.rglob("encoder.json")
    for broken in ("{", "[]", ""):
        path.write_text(broken)
        assert cache(tiny("bert_base")).facts() == wanted

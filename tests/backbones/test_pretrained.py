from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, T5Config

from lopa_lightning.backbones.pretrained import (
    Family,
    PretrainedSpec,
    load_config,
    load_model,
    load_tokenizer,
    meta_model,
)
from lopa_lightning.errors import LoPAError

Tiny = Callable[[str], str]


@pytest.mark.parametrize(
    ("kind", "family", "name"),
    [
        ("bert", "encoder", "BertModel"),
        ("bert", "masked_lm", "BertForMaskedLM"),
        ("bert_base", "encoder", "BertModel"),
        ("roberta", "encoder", "RobertaModel"),
        ("roberta", "masked_lm", "RobertaForMaskedLM"),
        ("gpt2", "encoder", "GPT2Model"),
        ("gpt2", "causal_lm", "GPT2LMHeadModel"),
        ("llama", "encoder", "LlamaModel"),
        ("llama", "causal_lm", "LlamaForCausalLM"),
    ],
)
def test_a_family_decides_the_head_and_models_come_frozen(kind: str, family: Family, name: str, tiny: Tiny) -> None:
    loaded, meta = load_model(PretrainedSpec(tiny(kind)), family), meta_model(PretrainedSpec(tiny(kind)), family)
    shapes = [{key: p.shape for key, p in model.named_parameters()} for model in (loaded, meta)]
    assert shapes[0] == shapes[1]
    assert {p.device.type for p in meta.parameters()} == {"meta"}
    for model in (loaded, meta):
        assert type(model).__name__ == name
        assert not any(p.requires_grad for p in model.parameters())
        assert not any(part.training for part in model.modules())


def test_weights_are_those_of_the_file_in_the_asked_dtype(tiny: Tiny) -> None:
    folder = tiny("llama")
    saved = load_model(PretrainedSpec(folder), "causal_lm")
    rounded = load_model(PretrainedSpec(folder, dtype="bfloat16"), "causal_lm")
    assert {p.dtype for p in saved.parameters()} == {torch.float32}
    for p, q in zip(saved.parameters(), rounded.parameters()):
        assert torch.equal(p.bfloat16(), q)


def test_the_attention_is_the_asked_one(tiny: Tiny) -> None:
    spec = PretrainedSpec(tiny("llama"), attn_implementation="eager")
    assert load_model(spec, "causal_lm").config._attn_implementation == "eager"


def test_a_masked_lm_without_head_weights_is_refused_with_a_way_out(tiny: Tiny) -> None:
    with pytest.raises(LoPAError, match=r"BertModel and has no weights for cls\..*use objective: head"):
        load_model(PretrainedSpec(tiny("bert_base")), "masked_lm")


def test_an_encoder_without_all_its_weights_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    model = load_model(PretrainedSpec(tiny("bert_base")), "encoder")
    state = {key: value for key, value in model.state_dict().items() if "layer.1.output.dense" not in key}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(LoPAError, match=r"no weights for encoder\.layer\.1\.output\.dense\.bias") as caught:
        load_model(PretrainedSpec(str(tmp_path)), "encoder")
    assert "objective" not in str(caught.value)


@pytest.mark.parametrize("build", [load_model, meta_model])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_head_that_an_architecture_has_not_is_refused(kind: str, build: Callable, tiny: Tiny) -> None:
    with pytest.raises(LoPAError, match=f"'{kind}' models have no masked_lm version"):
        build(PretrainedSpec(tiny(kind)), "masked_lm")


def test_encoder_decoders_are_refused(tmp_path: Path) -> None:
    T5Config().save_pretrained(tmp_path)
    with pytest.raises(LoPAError, match="'t5' is an encoder-decoder model"):
        load_model(PretrainedSpec(str(tmp_path)), "encoder")


def load_encoder(spec: PretrainedSpec) -> object:
    return load_model(spec, "encoder")


READERS = [load_config, load_tokenizer, load_encoder]


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("name", ["nobody/no-such-model", "no/such/folder", "not a name!"])
def test_an_unknown_name_is_an_error_that_repeats_it(name: str, read: Callable) -> None:
    with pytest.raises(LoPAError, match=f"found for '{name}'"):
        read(PretrainedSpec(name))


def test_an_unknown_revision_is_named_as_well() -> None:
    with pytest.raises(LoPAError, match="'nobody/no-such-model' at revision 'v2'"):
        load_config(PretrainedSpec("nobody/no-such-model", revision="v2"))


def test_a_folder_has_no_revision(tiny: Tiny) -> None:
    with pytest.raises(LoPAError, match=r"revision is of a model on the hub, and '.*' is a folder; got 'v2'"):
        load_config(PretrainedSpec(tiny("bert"), revision="v2"))


@pytest.mark.parametrize("read", READERS)
def test_a_folder_that_holds_no_model_is_an_error_that_names_it(read: Callable, tmp_path: Path) -> None:
    with pytest.raises(LoPAError, match=tmp_path.name):
        read(PretrainedSpec(str(tmp_path)))


def test_a_config_of_an_unknown_architecture_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "telepathy"}))
    with pytest.raises(LoPAError, match="telepathy"):
        load_config(PretrainedSpec(str(tmp_path)))


def test_a_config_without_weights_is_an_error(tmp_path: Path) -> None:
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(LoPAError, match="no usable model weights in"):
        load_model(PretrainedSpec(str(tmp_path)), "encoder")


@pytest.mark.parametrize("name", ["package:no_such_package/weights", "package:no_such_package.weights/small"])
def test_a_package_that_is_not_installed_is_named(name: str) -> None:
    with pytest.raises(LoPAError, match=f"'{name}': the Python package '{name[8:].split('/')[0]}' is not installed"):
        PretrainedSpec(name).location()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package of weights, which must not be imported."""
    root = tmp_path / "weights_of_somebody"
    (root / "deep" / "small").mkdir(parents=True)
    (root / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    return root


def test_a_folder_in_a_package_is_found_without_importing_it(package: Path) -> None:
    assert PretrainedSpec("package:weights_of_somebody/deep/small").location() == str(package / "deep" / "small")


def test_a_package_without_the_folder_names_both(package: Path) -> None:
    with pytest.raises(LoPAError, match="'weights_of_somebody' has no folder 'large'"):
        PretrainedSpec("package:weights_of_somebody/large").location()


@pytest.mark.parametrize("name", ["weights_of_somebody.deep/small", "weights_of_somebody/deep/small"])
def test_a_dotted_name_does_not_import_its_first_part(package: Path, name: str) -> None:
    assert PretrainedSpec(f"package:{name}").location() == str(package / "deep" / "small")
    assert "weights_of_somebody" not in sys.modules


@pytest.mark.parametrize("folder", ["..", "deep/../..", "/etc", "deep/\0"])
def test_a_folder_outside_of_a_package_is_none_of_it(package: Path, folder: str) -> None:
    with pytest.raises(LoPAError, match="'weights_of_somebody' has no folder"):
        PretrainedSpec(f"package:weights_of_somebody/{folder}").location()


def test_a_module_without_a_place_is_no_package() -> None:
    with pytest.raises(LoPAError, match="'__main__' is not installed"):
        PretrainedSpec("package:__main__/x").location()


def test_other_names_are_left_to_transformers() -> None:
    assert PretrainedSpec("owner/model").location() == "owner/model"

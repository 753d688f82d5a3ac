"""A checkpoint may be anybody's: what is not one is refused in a line, and nothing in it is run or imported."""

from __future__ import annotations

import copy
import functools
import io
import os
import pickle
import re
import resource
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lopa_lightning import LoPA, LoPALightningModule, PretrainedSpec, TextClassificationDataModule
from lopa_lightning.checkpoint import read
from lopa_lightning.errors import LoPAError
from tests.checkpoints.write import HERE

GOOD = HERE / "format_1" / "lopa.ckpt"
KEY = "net.prompt_encoder.row_head.1.bias"
ESCAPE = "\x1b[2Jnice\nname"


@pytest.fixture(autouse=True)
def _beside_the_backbones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE)


def good() -> dict[str, Any]:
    saved: dict[str, Any] = torch.load(GOOD, weights_only=True)
    return saved


def saved_as(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def refusal(act: Callable[[], Any], seconds: float = 5) -> str:
    """What an act is refused with: one clean line, soon, and in no more memory than a small file has a right to."""
    started, memory = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(LoPAError) as error:
        act()
    message = str(error.value)
    assert message.isprintable()
    assert len(message) < 1500
    assert "weights_only" not in message
    assert time.process_time() - started < seconds
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 100 * 1024
    return message


# The file


def _repacked(change: Callable[[zipfile.ZipInfo, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(GOOD) as old, zipfile.ZipFile(packed, "w", compression) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, change(entry, old.read(entry)))
    return packed.getvalue()


def _with_pickle(content: bytes) -> bytes:
    return _repacked(lambda entry, data: content if entry.filename.endswith("data.pkl") else data)


def _renamed(names: dict[str, str], more: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(GOOD) as old, zipfile.ZipFile(packed, "w") as new:
        root = old.namelist()[0].partition("/")[0]
        for entry in old.namelist():
            name = entry.removeprefix(f"{root}/")
            new.writestr(f"{root}/{names.get(name, name)}", old.read(entry))
        for name, content in more.items():
            new.writestr(f"{root}/{name}", content)
    return packed.getvalue()


FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "it is empty, cut off"),
    "cut": (lambda: GOOD.read_bytes()[:5000], "it is empty, cut off"),
    "text": (lambda: b"not a checkpoint" * 100, "it is empty, cut off"),
    "bare pickle": (lambda: pickle.dumps({"state_dict": {}}), "it is empty, cut off"),
    "another zip": (lambda: _repacked(lambda entry, data: data).replace(b"data.pkl", b"xata.pkl"), "did not write it"),
    "bomb": (
        lambda: _repacked(lambda entry, data: bytes(10**7) if entry.filename.endswith("data/0") else data, 8),
        "it is compressed",
    ),
    "bytearray": (
        lambda: _with_pickle(b"\x80\x02c__builtin__\nbytearray\nJ\0\0\0\x7f\x85R."),
        "'__builtin__.bytearray'",
    ),
    "another pickle in capitals": (
        lambda: _renamed({"data.pkl": "DATA.PKL"}, {"sub/data.pkl": b"\x80\x02}."}),
        "torch.save did not write it",
    ),
    "a second pickle in capitals": (lambda: _renamed({}, {"DATA.PKL": b"\x80\x02}."}), "torch.save did not write it"),
    "a second tensor in capitals": (lambda: _renamed({}, {"DATA/0": b"0"}), "torch.save did not write it"),
    "protocol 4": (lambda: _with_pickle(pickle.dumps(os.system, 4)), "it is damaged (UnpicklingError)"),
    "old class": (lambda: _with_pickle(b"(ios\nsystem\n."), "it is damaged (UnpicklingError)"),
    "long": (lambda: _with_pickle(b"\x80\x02" + b"N0" * 600_000 + b"N."), "more entries than a checkpoint"),
    "junk pickle": (lambda: _with_pickle(b"\xff\xfe"), "it is empty, cut off"),
    "short of memo": (lambda: _with_pickle(b"\x80\x02h\x05."), "it is damaged"),
    "flipped": (
        lambda: _repacked(lambda entry, data: data[:-8] if entry.filename.endswith("data/0") else data),
        "it is damaged",
    ),
}


@pytest.mark.sampled(5)
@pytest.mark.parametrize("kind", FILES)
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path, kind: str) -> None:
    make, message = FILES[kind]
    path = tmp_path / "x.ckpt"
    path.write_bytes(make())
    assert message in refusal(lambda: read(path))


def test_a_missing_file_a_folder_and_a_name_of_control_characters_are_named(tmp_path: Path) -> None:
    assert refusal(lambda: read(tmp_path / ESCAPE)).startswith("no checkpoint at '/")


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", "/dev/zero", ""):
        assert refusal(lambda path=path: read(path)).endswith("cannot be read as a checkpoint: it is no regular file")
    assert "Protocol not known: nope" in refusal(lambda: read("nope://x"))


def test_a_file_system_that_needs_a_package_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    assert "Install s3fs to access S3" in refusal(lambda: read("s3://x/y.ckpt"))


def test_an_open_file_is_read_as_a_path_is() -> None:
    with GOOD.open("rb") as file:
        assert read(file)["global_step"] == read(str(GOOD))["global_step"] == 3


# What is in it


def _bomb() -> list[Any]:
    nested: list[Any] = []
    for _ in range(25):
        nested = [nested] * 10
    return nested


CONTENTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a list": (lambda saved: [saved], "no checkpoint of LoPA Lightning"),
    "no identity": (lambda saved: saved.pop("lopa_identity"), "no checkpoint of LoPA Lightning"),
    "identity of no format": (lambda saved: saved["lopa_identity"].pop("format"), "its format is None"),
    "later format": (
        lambda saved: saved["lopa_identity"].update(format=99),
        "it has format 99.*reads up to 3; update it",
    ),
    "no state_dict": (lambda saved: saved.pop("state_dict"), "its state_dict must be a dict, got a NoneType"),
    "state_dict None": (lambda saved: saved.update(state_dict=None), "its state_dict must be a dict, got a NoneType"),
    "hyperparameters a list": (lambda saved: saved.update(hyper_parameters=[1]), "must be a dict, got a list"),
    "a str for a tensor": (
        lambda saved: saved["state_dict"].update({KEY: "x"}),
        f"tensors of real numbers, '{KEY}' is str",
    ),
    "None for a tensor": (lambda saved: saved["state_dict"].update({KEY: None}), f"'{KEY}' is NoneType"),
    "sparse": (lambda saved: saved["state_dict"].update({KEY: torch.ones(3).to_sparse()}), "_rebuild_sparse_tensor"),
    "meta": (lambda saved: saved["state_dict"].update({KEY: torch.ones(10**9, device="meta")}), "_rebuild_meta_tensor"),
    "integers": (lambda saved: saved["state_dict"].update({KEY: torch.ones(3, dtype=torch.long)}), "is torch.int64"),
    "complex": (lambda saved: saved["state_dict"].update({KEY: torch.ones(3) * 1j}), "is torch.complex64"),
    "NaN": (lambda saved: saved["state_dict"][KEY].fill_(float("nan")), f"'state_dict.{KEY}' is NaN or infinite"),
    "infinite": (lambda saved: saved["state_dict"][KEY].fill_(float("inf")), f"'state_dict.{KEY}' is NaN or infinite"),
    "NaN moments": (
        lambda saved: saved["optimizer_states"][0]["state"][0]["exp_avg"].fill_(float("nan")),
        "'optimizer_states.0.state.0.exp_avg' is NaN",
    ),
    "expanded": (
        lambda saved: saved["state_dict"].update({KEY: torch.ones(1).expand(10**9)}),
        "tensors are larger than the file",
    ),
    "expanded elsewhere": (
        lambda saved: saved["loops"].update(x=torch.ones(1).expand(10**9)),
        "tensors are larger than the file",
    ),
    "unknown entry": (lambda saved: saved.update({ESCAPE: 1}), r"unknown entry '\\x1b\[2Jnice\\nname'"),
    "nested": (lambda saved: saved["hyper_parameters"].update(task=_bomb()), "nested too deeply, or has too many"),
    "nested elsewhere": (lambda saved: saved["loops"].update(x=_bomb()), "nested too deeply, or has too many"),
    "long text": (lambda saved: saved["hyper_parameters"].update(placement="x" * 10**6), "longer than any setting"),
    "long number": (lambda saved: saved["hyper_parameters"].update(warmup=2**70), "longer than any setting"),
    "tensor in settings": (lambda saved: saved["hyper_parameters"].update(warmup=torch.ones(1)), "hold a tensor"),
    "odd key": (lambda saved: saved["hyper_parameters"].update({(1, 2): 1}), "a key of type tuple"),
    "odd version": (lambda saved: saved.update({"pytorch-lightning_version": ESCAPE}), r"'\\x1b\[2Jnice\\nname'"),
    "version of before": (
        lambda saved: saved.update({"pytorch-lightning_version": "1.0"}),
        "'1.0'; it must be 2 or la",
    ),
    "long version": (lambda saved: saved.update({"pytorch-lightning_version": "9" * 9999}), "it must be 2 or later"),
    "loops a list": (lambda saved: saved.update(loops=[]), "its loops must be a dict, got a list"),
}


@pytest.mark.sampled(10)
@pytest.mark.parametrize("kind", CONTENTS)
def test_contents_that_are_no_checkpoint_are_refused(tmp_path: Path, kind: str) -> None:
    change, message = CONTENTS[kind]
    saved = good()
    changed = change(saved)
    path = saved_as(tmp_path / "x.ckpt", changed if kind == "a list" else saved)
    found = refusal(lambda: read(path))
    assert found.startswith(f"'{path}' cannot be read as a checkpoint: ")
    assert re.search(message, found), found


def test_an_entry_under_the_name_of_an_imported_class_is_its_own(tmp_path: Path) -> None:
    path = saved_as(tmp_path / "x.ckpt", {**good(), "TextClassificationDataModule": {"seen": 3}})
    assert read(path)["TextClassificationDataModule"] == {"seen": 3}


# What it names


class Evil(LoPA):
    """A method that is imported."""


@pytest.fixture(scope="module")
def trap(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file that is there if a trap was run or imported. The module ``s1_evil`` is one."""
    folder = tmp_path_factory.mktemp("trap")
    sprung = folder / "sprung"
    code = f"from pathlib import Path\nPath({str(sprung)!r}).touch()\nclass Evil: pass\ndef evil(**kwargs): pass\n"
    (folder / "s1_evil.py").write_text(code)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield sprung
    assert not sprung.exists()


def _calls(sprung: Path) -> list[dict[str, Any]]:
    """Class paths of functions and classes that are no method, optimizer or schedule, with what would spring a trap."""
    command, code, file = f"touch {sprung}", f"open({str(sprung)!r}, 'w')", str(sprung)
    listed: list[tuple[str, dict[str, Any]]] = [
        ("os.system", {"command": command}),
        ("posix.system", {"command": command}),
        ("subprocess.Popen", {"args": command, "shell": True}),
        ("runpy.run_path", {"path_name": str(sprung.parent / "s1_evil.py")}),
        ("torch.save", {"obj": [1], "f": file}),
        ("builtins.eval", {"source": code}),
        ("builtins.exec", {"source": code}),
        ("builtins.open", {"file": file, "mode": "w"}),
        ("pathlib.Path.touch", {"self": file}),
        ("s1_evil.Evil", {}),
        ("s1_evil.evil", {}),
        ("s1_evil", {}),
        ("torch.nn.Linear", {"in_features": 100, "out_features": 100}),
        ("transformers.pipelines.base.Pipeline", {}),
        ("importlib.import_module", {"name": "s1_evil"}),
        ("tests.test_checkpoint_file.Evil.__init__", {}),
        ("", {}),
        (ESCAPE, {}),
    ]
    return [{"class_path": path, "init_args": arguments} for path, arguments in listed]


def changed(path: Path, **hyperparameters: Any) -> Path:
    saved = good()
    saved["hyper_parameters"].update(hyperparameters)
    return saved_as(path, saved)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("argument", ["prompt_encoder", "optimizer", "lr_scheduler", "_class_path", "backbone"])
def test_nothing_that_a_checkpoint_names_is_run_or_imported(tmp_path: Path, trap: Path, argument: str) -> None:
    for call in _calls(trap):
        value = call["class_path"] if argument == "_class_path" else call
        path = changed(tmp_path / "x.ckpt", **{argument: value})
        before = set(sys.modules)
        message = refusal(lambda path=path: LoPALightningModule.load_from_checkpoint(path))
        assert "subclass of" in message or argument == "backbone", message
        assert set(sys.modules) == before
        assert not trap.exists()


@pytest.mark.parametrize(
    ("name", "is_no", "hint"),
    [
        ("my_package.methods.Mine", "imported subclass", "import my_package.methods first"),
        ("os.system", "subclass", ""),
    ],
)
def test_a_class_of_the_users_own_must_be_imported_first(tmp_path: Path, name: str, is_no: str, hint: str) -> None:
    path = changed(tmp_path / "x.ckpt", prompt_encoder={"class_path": name, "init_args": {}})
    message = refusal(lambda: LoPALightningModule.load_from_checkpoint(path))
    assert f"{name!r} is no {is_no} of PromptEncoder; ours are dept, idpg, lopa, " in message
    assert message.partition("; if it is one of yours, ")[2] == hint


def test_a_class_of_the_users_own_that_is_imported_is_used(tmp_path: Path) -> None:
    saved = good()
    name = f"{__name__}.Evil"
    saved["hyper_parameters"]["prompt_encoder"]["class_path"] = name
    saved["lopa_identity"]["prompt_encoder"]["class_path"] = name
    loaded = LoPALightningModule.load_from_checkpoint(saved_as(tmp_path / "x.ckpt", saved))
    assert type(loaded.net.prompt_encoder) is Evil
    assert loaded.hparams["prompt_encoder"]["class_path"] == name


def test_an_optimizer_is_not_built_by_loading_and_is_there_to_go_on_with() -> None:
    loaded = LoPALightningModule.load_from_checkpoint(GOOD)
    assert isinstance(loaded.make_optimizer, functools.partial)
    assert loaded.make_optimizer.func is torch.optim.AdamW
    assert loaded.make_lr_scheduler.func is torch.optim.lr_scheduler.CosineAnnealingLR
    again = LoPALightningModule.load_from_checkpoint(GOOD, optimizer=torch.optim.SGD, lr_scheduler=None)
    assert (again.make_optimizer, again.make_lr_scheduler) == (torch.optim.SGD, None)


def test_a_data_module_is_not_built_from_a_checkpoint(tmp_path: Path, trap: Path) -> None:
    saved = {**good(), "datamodule_hyper_parameters": {"_instantiator": "lightning.pytorch.cli.instantiate_module"}}
    saved["datamodule_hyper_parameters"] |= {"_class_path": "os.system", "command": f"touch {trap}"}
    path = saved_as(tmp_path / "x.ckpt", saved)
    message = refusal(lambda: TextClassificationDataModule.load_from_checkpoint(path))
    assert message == "a checkpoint holds no data; build TextClassificationDataModule from its own arguments"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "too many virtual tokens": (
        {"prompt_encoder": {"class_path": "lopa", "init_args": {"num_virtual_tokens": 10**9}}},
        "its prompt_encoder has 'num_virtual_tokens' 1000000000, and 110 trained values",
    ),
    "other virtual tokens": (
        {"prompt_encoder": {"class_path": "lopa", "init_args": {"num_virtual_tokens": 3, "rank": 1, "hidden_dim": 3}}},
        "prompt_encoder.init_args.num_virtual_tokens: the checkpoint has 2, this run 3",
    ),
    "an unknown argument": (
        {"prompt_encoder": {"class_path": "lopa", "init_args": {"rnak": 3}}},
        "prompt_encoder must be of embedding_dim, instance_dim, num_virtual_tokens, rank",
    ),
    "an adapter without end": ({"adapter": {"peft_type": "LORA", "r": 10**9}}, "its adapter has 'r' 1000000000"),
    "a text for a number": ({"warmup": "abc"}, "warmup must be float, got 'abc'"),
    "a text for a flag": ({"frozen_dropout": "yes"}, "frozen_dropout must be bool, got 'yes'"),
    "another choice": (
        {"placement": ESCAPE},
        "placement must be one of before, after_first, after, every_layer, system, user, got '",
    ),
    "a method for a backbone": ({"backbone": {"class_path": "lopa", "init_args": {}}}, "backbone must be of name, "),
    "a backbone without a name": ({"backbone": {"dtype": "auto"}}, "backbone lacks name"),
    "a dtype that is none": ({"backbone": {"name": "bert", "dtype": "load"}}, "backbone.dtype must be 'auto' or"),
    "code of a model": ({"backbone": {"name": "x/y", "trust_remote_code": True}}, "asks for code from outside"),
    "code of an encoder": (
        {"instance_encoder": {"name": "x/y", "trust_remote_code": True}},
        "its instance_encoder asks",
    ),
    **{
        f"a pattern in an adapter, {kind}": ({"adapter": {"peft_type": "LORA", **options}}, "its adapter asks for code")
        for kind, options in {
            "modules": {"target_modules": r"(\w+\.?)+!"},
            "repeats": {"target_modules": ".{1,99}.{1,99}!"},
            "ranks": {"rank_pattern": {"(.+)+!": 2}},
            "excluded": {"exclude_modules": "a*"},
            "layers": {"layers_pattern": ["x", "(a|a)+b"]},
            "repository": {"adapters": {"0": "x/y"}},
        }.items()
    },
    "a pattern in an encoder's adapter": (
        {"instance_encoder": {"name": "bert", "adapter": {"peft_type": "LORA", "target_modules": "(a|a)+b"}}},
        "its instance_encoder.adapter asks for code from outside (a search by a pattern)",
    ),
    "code of an encoder's adapter": (
        {"instance_encoder": {"adapter": {"peft_type": "LORA", "megatron_core": "s1_evil"}}},
        "its instance_encoder.adapter asks for code from outside (megatron_core)",
    ),
    "an encoder's adapter without end": (
        {"instance_encoder": {"adapter": {"peft_type": "LORA", "r": 10**9}}},
        "its instance_encoder.adapter has 'r' 1000000000, and 110 trained values",
    ),
    "an encoder's adapter that is a text": (
        {"instance_encoder": {"adapter": "LORA"}},
        "instance_encoder.adapter must be",
    ),
    "an encoder's adapter that was not trained": (
        {"instance_encoder": {"adapter": {"peft_type": "LORA"}}},
        "instance_encoder.adapter: the checkpoint has None, this run {'peft_type': 'LORA'}",
    ),
    "adapters of an adapter": ({"adapter": {"peft_type": "XLORA", "adapters": {"0": "x"}}}, "peft_type must be one of"),
    "code of an adapter": ({"adapter": {"peft_type": "LORA", "megatron_core": "s1_evil"}}, "its adapter asks for code"),
    "a kernel": ({"backbone": {"name": "bert", "attn_implementation": "x/y:z"}}, "attn_implementation 'x/y:z'"),
    "a labels list of lists": ({"task": {"labels": [["a"], ["b"]]}}, "task.labels must be str, got ['a']"),
    "other words": ({"task": {"labels": ["good", "bad"], "words": ["bad", "good"]}}, "task.words: the checkpoint has"),
    "no such model": ({"backbone": {"name": f"no/{ESCAPE}"}}, "no model found for 'no/\\x1b"),
}


@pytest.mark.sampled(10)
@pytest.mark.parametrize("kind", REFUSED)
def test_hyperparameters_that_the_rest_contradicts_are_refused(tmp_path: Path, kind: str) -> None:
    hyperparameters, message = REFUSED[kind]
    path = changed(tmp_path / "x.ckpt", **hyperparameters)
    assert message in refusal(lambda: LoPALightningModule.load_from_checkpoint(path))


def test_code_of_a_model_counts_if_the_caller_says_so_again(tmp_path: Path) -> None:
    path = changed(tmp_path / "x.ckpt", backbone={"name": "bert", "trust_remote_code": True})
    assert LoPALightningModule.load_from_checkpoint(path, trust_remote_code=True).backbone_spec.trust_remote_code
    again = LoPALightningModule.load_from_checkpoint(path, backbone=PretrainedSpec("bert"))
    assert not again.backbone_spec.trust_remote_code


def test_plain_names_of_an_adapter_are_no_pattern(tmp_path: Path) -> None:
    names = {"target_modules": ["q_proj", "layers.0.v-proj"], "rank_pattern": {"q_proj": 4}, "lora_alpha": 1e-05}
    path = changed(tmp_path / "x.ckpt", adapter={"peft_type": "LORA", "bias": "none", **names})
    assert "asks for code" not in refusal(lambda: LoPALightningModule.load_from_checkpoint(path))


def test_nothing_is_compiled_but_for_who_says_so_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda layer, **_: compiled.append(layer) or layer)
    path = changed(tmp_path / "x.ckpt", backbone={"name": "bert", "compile": True})
    assert not LoPALightningModule.load_from_checkpoint(path).backbone_spec.compile
    assert compiled == []
    assert LoPALightningModule.load_from_checkpoint(path, trust_remote_code=True).backbone_spec.compile
    assert compiled


def test_values_must_be_finite_in_the_dtype_that_they_are_loaded_in(tmp_path: Path) -> None:
    saved = good()
    saved["state_dict"][KEY] = saved["state_dict"][KEY].double().fill_(1e300)
    path = saved_as(tmp_path / "x.ckpt", saved)
    assert f"{KEY}: NaN or infinite as torch.float32" in refusal(lambda: LoPALightningModule.load_from_checkpoint(path))


def test_it_says_which_models_a_checkpoint_names(caplog: pytest.LogCaptureFixture) -> None:
    LoPALightningModule.load_from_checkpoint(GOOD)
    assert f"Loading the models that '{GOOD}' names: backbone 'bert', instance_encoder 'backbone'" in caplog.text


def test_a_models_pickled_weights_run_no_code(tmp_path: Path, trap: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.system, (f"touch {trap}",)

    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((HERE / "bert" / file).read_bytes())
    torch.save({"x": Payload()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"Weights only load failed|cannot be loaded"):
        LoPALightningModule.load_from_checkpoint(GOOD, backbone=PretrainedSpec(str(tmp_path)))
    assert not trap.exists()


# Anything at all

_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 3, 10**9, 2**70, 0.5, -1.0, float("nan"), float("inf"), 1e300, 2j]),
    st.sampled_from(["", "backbone", "bert", "llama", "..", "/", "package:os.path/x", "package:torch/../..", ESCAPE]),
    st.sampled_from(["lopa", "idpg", "none", "p_tuning", "every_layer", "head", "os.system", "s1_evil.Evil"]),
    st.sampled_from([[], [1], ["x"], {}, {"x": 1}, {"class_path": "lopa"}, {1: 2}, (1, 2), {3}]),
    st.integers(0, 17).map(lambda index: ("call", index)),
    st.sampled_from(["long", "complex64", "nan", "sparse", "meta", "expanded", "float64", "empty"]).map(
        lambda kind: ("tensor", kind)
    ),
)
_TENSORS: dict[str, Callable[[], torch.Tensor]] = {
    "long": lambda: torch.ones(3, dtype=torch.long),
    "complex64": lambda: torch.ones(3) * 1j,
    "nan": lambda: torch.full((3,), float("nan")),
    "sparse": lambda: torch.ones(3).to_sparse(),
    "meta": lambda: torch.ones(3, device="meta"),
    "expanded": lambda: torch.ones(1).expand(10**9),
    "float64": lambda: torch.ones(3, dtype=torch.float64),
    "empty": lambda: torch.ones(0),
}
_LIBRARIES = {
    "transformers",
    "torch",
    "lopa_lightning",
    "tokenizers",
    "huggingface_hub",
    "lightning",
    "peft",
    "accelerate",
}


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_any_checkpoint_loads_or_is_refused_in_a_line(data: st.DataObject, trap: Path, tmp_path: Path) -> None:
    saved = good()
    for _ in range(data.draw(st.integers(1, 3))):
        _change(saved, data, trap)
    path = saved_as(tmp_path / "x.ckpt", saved)
    before = set(sys.modules)
    message = ""
    try:
        LoPALightningModule.load_from_checkpoint(path)
    except LoPAError as error:
        message = str(error)
    assert message.isprintable()
    assert "weights_only" not in message
    new = {name.partition(".")[0] for name in set(sys.modules) - before}
    assert new <= _LIBRARIES
    assert not trap.exists()


def _change(saved: dict[str, Any], data: st.DataObject, trap: Path) -> None:
    """Puts something else, or nothing, in a place that is drawn."""
    holder: Any = saved
    while True:
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        key = data.draw(st.sampled_from([*keys, "another"] if isinstance(holder, dict) or not keys else keys))
        inner = holder[key] if key in keys else None
        if not isinstance(inner, dict | list) or not inner or data.draw(st.booleans()):
            break
        holder = inner
    if isinstance(holder, dict) and key in holder and data.draw(st.integers(0, 3)) == 0:
        del holder[key]
        return
    value = copy.deepcopy(data.draw(_VALUES))
    if isinstance(value, tuple) and value[0] == "call":
        value = _calls(trap)[value[1]]
    elif isinstance(value, tuple) and value[0] == "tensor":
        value = _TENSORS[value[1]]()
    if isinstance(holder, dict) or holder:
        holder[key] = value

"""Checkpoints of every format load, validate and go on training as they did in the version that wrote them."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lopa_lightning import ClassificationModule, LoPA, LoPALightningModule
from lopa_lightning.backbones.quantization import check_quantization
from lopa_lightning.errors import LoPAError
from lopa_lightning.migrations import FORMAT, migrate
from tests.checkpoints.write import HERE, NAMES, data, known_defaults, loss, module, trainer

FOLDERS = [f"format_{number}" for number in range(1, FORMAT + 1)]
EVERY = [(folder, name) for folder in sorted(HERE.glob("format_*")) for name in NAMES]


# Once it is migrated, a checkpoint of an older format goes the way of those of the present one.
RESUMED = [(folder, name) for folder, name in EVERY if folder.name == FOLDERS[-1] or name in ("lopa", "causal_lm")]


@pytest.fixture(autouse=True)
def _beside_the_backbones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE)  # which backbones are named from


@pytest.mark.sampled(6)
@pytest.mark.parametrize(("folder", "name"), EVERY, ids=[f"{folder.name}-{name}" for folder, name in EVERY])
def test_a_checkpoint_loads_and_validates(folder: Path, name: str, tmp_path: Path) -> None:
    expected = json.loads((folder / "expected.json").read_text())[name]
    loaded = LoPALightningModule.load_from_checkpoint(folder / f"{name}.ckpt")
    assert loss(loaded, name, tmp_path) == pytest.approx(expected["saved"], abs=2e-5)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("folder", "name"),
    [pytest.param(*each, marks=[] if each in RESUMED else [pytest.mark.slow]) for each in EVERY],
    ids=[f"{folder.name}-{name}" for folder, name in EVERY],
)
def test_a_checkpoint_resumes(folder: Path, name: str, tmp_path: Path) -> None:
    path = folder / f"{name}.ckpt"
    expected = json.loads((folder / "expected.json").read_text())[name]
    if name == "lopa":  # of the others, going on takes the same way
        assert loss(module(name), name, tmp_path, path) == pytest.approx(expected["saved"], abs=2e-5)
    resumed = module(name)
    run = trainer(tmp_path, 6)
    run.fit(resumed, data(name, tmp_path), ckpt_path=path)
    assert run.global_step == 6
    assert float(run.callback_metrics["val/loss"]) == pytest.approx(expected["resumed"], abs=2e-5)
    assert expected["resumed"] < expected["saved"] - 1e-3

    # What is written now is of the present format, and says the same.
    again = LoPALightningModule.load_from_checkpoint(tmp_path / "last.ckpt")
    for key, value in again.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    said = {key: value for key, value in again.hparams.items() if key != "instance_column"}  # which is said since
    assert said == {**LoPALightningModule.load_from_checkpoint(path).hparams}


@pytest.mark.parametrize("name", ["bitsandbytes_8bit", "bitsandbytes_4bit", "torchao_int8"])
def test_a_quantisation_of_format_1_is_spelt_as_transformers_does(name: str) -> None:
    saved = torch.load(HERE / "format_1" / "lopa.ckpt", weights_only=True)
    saved["hyper_parameters"]["backbone"]["quantization"] = saved["lopa_identity"]["quantization"] = name
    migrate(saved)
    assert saved["lopa_identity"]["quantization"] == saved["hyper_parameters"]["backbone"]["quantization"]
    check_quantization(saved["lopa_identity"]["quantization"])


def test_there_are_checkpoints_of_every_format() -> None:
    folders = {folder for folder, _ in EVERY}
    assert {folder.name for folder in folders} == {f"format_{number}" for number in range(1, FORMAT + 1)}
    for folder in folders:
        for name in NAMES:
            saved = torch.load(folder / f"{name}.ckpt", weights_only=True)
            assert saved["lopa_identity"]["format"] == int(folder.name.removeprefix("format_"))


def test_a_default_that_changes_is_a_new_format() -> None:
    """A checkpoint leaves out what is default: a migration must write the default that was into older ones."""
    written = json.loads((HERE / f"format_{FORMAT}" / "defaults.json").read_text())
    assert [
        line for name, values in known_defaults().items() for line in _changed(written.get(name), values, name)
    ] == []


def _changed(written: Any, now: Any, name: str) -> list[str]:
    """What is not as it was written; an argument that is gone is none of it."""
    if not isinstance(written, dict) or not isinstance(now, dict):
        return [] if written == now else [f"{name}: {written!r} is {now!r} now"]
    new = [f"{name}.{key} is new: python -m tests.checkpoints.write defaults" for key in now if key not in written]
    both = [key for key in written if key in now]
    return new + [line for key in both for line in _changed(written[key], now[key], f"{name}.{key}")]


def test_a_class_that_is_moved_and_renamed_keeps_its_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE)
    names = {cls: cls.__qualname__ for cls in (LoPA, ClassificationModule)}
    try:
        for cls in names:
            monkeypatch.setattr(cls, "__module__", "lopa_lightning.elsewhere")
            cls.__qualname__ = "Renamed"
        for folder in FOLDERS:
            loaded = LoPALightningModule.load_from_checkpoint(HERE / folder / "lopa.ckpt")
            assert type(loaded) is ClassificationModule
            assert loaded.hparams["prompt_encoder"]["class_path"] == "lopa"
    finally:
        for cls, name in names.items():
            cls.__qualname__ = name


class Grown(LoPA):
    """LoPA as it may be one day, with one more argument."""

    def __init__(self, embedding_dim: int, instance_dim: int, gate_bias: bool = False, **kwargs: Any) -> None:
        super().__init__(embedding_dim, instance_dim, **kwargs)


@pytest.mark.parametrize("folder", FOLDERS)
def test_an_argument_that_is_new_counts_only_where_it_is_not_the_default(
    monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    monkeypatch.chdir(HERE)
    monkeypatch.setattr(Grown, "short_name", "lopa")
    with pytest.raises(LoPAError, match=r"'lopa' is the name of several classes: .*LoPA, .*Grown"):
        LoPALightningModule.load_from_checkpoint(HERE / folder / "lopa.ckpt")
    monkeypatch.setattr(LoPA, "short_name", None)
    path, options = HERE / folder / "lopa.ckpt", {"num_virtual_tokens": 2, "rank": 1, "hidden_dim": 3, "dropout": 0.0}
    assert type(LoPALightningModule.load_from_checkpoint(path).net.prompt_encoder) is Grown
    same = LoPALightningModule.load_from_checkpoint(path, prompt_encoder=functools.partial(Grown, **options))
    assert same.hparams["prompt_encoder"]["init_args"]["gate_bias"] is False
    for changed, message in {
        "gate_bias": "gate_bias: the checkpoint has False, this run True",
        "combine": "combine: the checkpoint has 'gate', this run 'add'",
    }.items():
        other = {**options, changed: {"gate_bias": True, "combine": "add"}[changed]}
        with pytest.raises(LoPAError, match=message):
            LoPALightningModule.load_from_checkpoint(path, prompt_encoder=functools.partial(Grown, **other))

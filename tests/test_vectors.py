"""Runs with instance vectors from the disk: the same as without, and no pass of the encoder from the second on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback

from lopa_lightning import InstanceEncoderSpec, LoPALightningModule, PromptTuning
from lopa_lightning.cli import main
from lopa_lightning.errors import LoPAError
from lopa_lightning.instances.encoder import InstanceEncoder
from tests.modules.helpers import causal, completions, module, reviews, trainer
from tests.test_distributed import ROOT
from tests.tiny import bert_tokenizer, save_tiny

Tiny = Callable[[str], str]


class Losses(Callback):
    """The loss of every step, and what its batch has."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self.keys: set[str] = set()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        self.values.append(float(outputs["loss"]))
        self.keys |= set(batch)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The texts of each pass of an instance encoder."""
    seen: list[int] = []
    forward = InstanceEncoder.forward

    def counted(self: InstanceEncoder, input_ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(len(input_ids))
        return forward(self, input_ids, *rest)

    monkeypatch.setattr(InstanceEncoder, "forward", counted)
    return seen


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data sets' cache of a test's own."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def vectors_in(folder: Path) -> list[Path]:
    return list(folder.rglob("vectors.arrow"))


def fit(model: Any, data: Any, folder: Path, epochs: int = 2, **options: Any) -> tuple[Losses, dict[str, float]]:
    losses = Losses()
    seed_everything(3)
    run = trainer(folder, epochs, callbacks=[losses], enable_checkpointing=False, **options)
    run.fit(model, data)
    return losses, {name: float(value) for name, value in run.callback_metrics.items()}


def made(kind: str, tiny: Tiny, cache: bool) -> Any:
    if kind == "own encoder":
        encoder = InstanceEncoderSpec(tiny("bert"), cache=cache)
        return module(tiny("llama"), objective="causal_lm", instance_encoder=encoder)
    if kind == "backbone":
        return module(tiny("bert"), frozen_dropout=True, instance_encoder=InstanceEncoderSpec(cache=cache))
    return causal(tiny("gpt2"), instance_encoder=InstanceEncoderSpec(tiny("bert_base"), "cls", True, cache=cache))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "workers"),
    [
        pytest.param("own encoder", 0, marks=pytest.mark.slow),
        ("backbone", 1),
        ("completions", 0),
    ],  # the last has its own
)
def test_a_run_is_that_of_an_encoder_at_every_step(
    tiny: Tiny, tmp_path: Path, kept: Path, passes: list[int], kind: str, workers: int
) -> None:
    if kind == "completions":
        data = functools.partial(completions, tmp_path / "data", max_length=16, num_workers=workers)
    else:
        data = functools.partial(reviews, tmp_path, rows=19, num_workers=workers)
    plain, wanted = fit(made(kind, tiny, cache=False), data(), tmp_path)
    assert "instance_input_ids" in plain.keys
    assert "instance" not in plain.keys
    assert not vectors_in(kept)
    passes.clear()

    first, metrics = fit(made(kind, tiny, cache=True), data(), tmp_path)
    assert "instance" in first.keys
    assert not [key for key in first.keys if key.startswith("instance_")]
    assert passes
    assert first.values == pytest.approx(plain.values, rel=1e-6, abs=1e-6)
    assert metrics == pytest.approx(wanted, rel=1e-6, abs=1e-6)
    passes.clear()

    again, metrics = fit(made(kind, tiny, cache=True), data(), tmp_path)
    assert not passes
    assert again.values == first.values
    assert metrics == pytest.approx(wanted, rel=1e-6, abs=1e-6)


def test_no_weight_of_the_encoder_is_read_in_a_second_run_of_any_kind(
    tiny: Tiny, tmp_path: Path, kept: Path, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = made("own encoder", tiny, cache=True), reviews(tmp_path)
    run = trainer(tmp_path)
    run.fit(model, data)
    run.test(model, data, verbose=False)
    wanted = run.predict(model, data)
    passes.clear()

    def fail(*_: Any) -> None:
        raise AssertionError("an encoder was loaded")

    monkeypatch.setattr("lopa_lightning.modules.builder._body", fail)
    again, data = LoPALightningModule.load_from_checkpoint(tmp_path / "last.ckpt"), reviews(tmp_path)
    run = trainer(tmp_path)
    for do in (run.validate, run.test):
        do(again, data, verbose=False)
    for one, other in zip(run.predict(again, data), wanted):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert not passes


def test_texts_that_are_new_are_encoded_when_they_come(tiny: Tiny, tmp_path: Path, kept: Path) -> None:
    texts, written = ["the film was", "it was", "a terrible"], []
    for cache in (False, True):
        model = made("completions", tiny, cache)
        model.generation = {"max_new_tokens": 5}
        fit(model, completions(tmp_path / "data"), tmp_path, epochs=1)
        assert (model.net.instance_encoder.own_model is None) == cache
        written.append(model.generate(texts))
        model.train()
        prompt, _ = model.net.soft_prompt(model.input_spec.instance_batch(texts, model.device))
        prompt.sum().backward()  # what was loaded for generation can serve in training
    assert written[0] == written[1]


def test_tiny_models_have_one_tokenizer() -> None:
    assert len({tokenizer().backend_tokenizer.to_str() for tokenizer in (bert_tokenizer, bert_tokenizer)}) == 1


@pytest.mark.slow
def test_a_checkpoint_goes_with_and_without_and_knows_its_encoder(
    tiny: Tiny, tmp_path: Path, kept: Path, passes: list[int]
) -> None:
    identities = []
    for cache in (False, True):
        run, model = trainer(tmp_path), made("own encoder", tiny, cache)
        run.fit(model, reviews(tmp_path))
        identities.append(torch.load(tmp_path / "last.ckpt", weights_only=True)["lopa_identity"])
        for other in (False, True):
            spec = InstanceEncoderSpec(tiny("bert"), cache=other)
            LoPALightningModule.load_from_checkpoint(tmp_path / "last.ckpt", instance_encoder=spec)
    assert identities[0] == identities[1]
    assert identities[0]["instance_encoder"]["weights"]
    other = save_tiny("bert_base", tmp_path / "other")
    for _ in range(2):  # told from its weights, and then from the disk
        with pytest.raises(LoPAError, match=r"instance_encoder\.weights"):
            LoPALightningModule.load_from_checkpoint(
                tmp_path / "last.ckpt", instance_encoder=InstanceEncoderSpec(other)
            )


@pytest.mark.parametrize(
    "options",
    [
        {"instance_encoder": InstanceEncoderSpec(cache=False)},
        {"instance_encoder": InstanceEncoderSpec(trainable=True)},
        {"prompt_encoder": functools.partial(PromptTuning, num_virtual_tokens=3)},
    ],
)
def test_nothing_is_kept_where_it_is_off_or_changes_or_is_not_read(
    tiny: Tiny, tmp_path: Path, kept: Path, options: dict[str, Any]
) -> None:
    model = module(tiny("bert"), **options)
    losses, _ = fit(model, reviews(tmp_path), tmp_path, epochs=1)
    assert model.input_spec.instance_vectors is None
    assert not vectors_in(kept)
    assert ("instance_input_ids" in losses.keys) == ("prompt_encoder" not in options)


def test_a_run_that_reads_few_rows_makes_no_vectors_and_uses_those_that_are_there(
    tiny: Tiny, tmp_path: Path, kept: Path
) -> None:
    data, keys = reviews(tmp_path), []
    for fast in (True, False, True):
        losses = Losses()
        model = module(tiny("bert"))
        trainer(tmp_path, callbacks=[losses], enable_checkpointing=False, fast_dev_run=fast).fit(model, data)
        keys.append("instance" in losses.keys)
    assert keys == [False, True, True]
    assert len(vectors_in(kept)) == 1  # training and validation have the same rows


def test_the_flag_is_an_option_of_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(ROOT / "configs" / "quickstart.yaml"), "--print_config"])
    assert "cache: true" in capsys.readouterr().out

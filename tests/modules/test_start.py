"""What a run is refused or warned of as it starts: answers from initial values, and padding that changes them."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from torch import Tensor
from transformers import AutoTokenizer, GPTNeoConfig, GPTNeoForCausalLM, OpenAIGPTConfig, OpenAIGPTLMHeadModel

from lopa_lightning import (
    ClassificationModule,
    InstanceEncoderSpec,
    LoPALightningModule,
    NoPrompt,
    PretrainedSpec,
    PromptTuning,
    TextClassificationDataModule,
)
from lopa_lightning.backbones.pretrained import PreTrainedModel
from lopa_lightning.callbacks import BestCheckpoint, FitSummary, LastCheckpoint
from lopa_lightning.callbacks.checkpoints import best_checkpoint
from lopa_lightning.errors import LoPAError
from tests.modules.helpers import LoPATiny, causal, completions, module, reviews, trainer
from tests.tiny import causal_tokenizer

Tiny = Callable[[str], str]

PromptTiny = functools.partial(PromptTuning, num_virtual_tokens=3)
REFUSED = "nothing was trained or loaded, so {} would answer from initial values: name a checkpoint .--ckpt_path"
AS_IT_COMES: dict[str, Any] = {"prompt_encoder": NoPrompt}
TRAINABLE: dict[str, dict[str, Any]] = {
    "prompt": {},
    "head": {**AS_IT_COMES, "objective": "head"},
    "adapter": {**AS_IT_COMES, "adapter": {"peft_type": "LORA", "r": 2}},
    "backbone": {**AS_IT_COMES, "train_backbone": True},
}


def fail(*_: Any, **__: Any) -> None:
    raise AssertionError("weights were read")


@pytest.mark.parametrize("what", TRAINABLE)
def test_initial_values_answer_nothing_and_no_weight_is_read_to_say_so(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr("lopa_lightning.modules.builder.load_model", fail)
    for do in ("test", "predict"):
        # Without a cache: its vectors belong to the data, and are made with it.
        encoder = InstanceEncoderSpec(cache=False)
        model = module(tiny("bert"), instance_encoder=encoder, **TRAINABLE[what])
        model.awaits_checkpoint = False
        with pytest.raises(LoPAError, match=REFUSED.format(do)):
            getattr(trainer(tmp_path), do)(model, reviews(tmp_path))


def test_without_a_word_of_the_checkpoint_it_is_refused_once_none_came(tiny: Tiny, tmp_path: Path) -> None:
    model, data, run = module(tiny("bert")), reviews(tmp_path), trainer(tmp_path)
    for do in ("test", "predict"):
        with pytest.raises(LoPAError, match=REFUSED.format(do)):
            getattr(run, do)(model, data)
    with pytest.warns(UserWarning, match="this validates initial values"):
        run.validate(model, data, verbose=False)
    run.fit(model, data)
    run.test(model, data, verbose=False)
    again = module(tiny("bert"))
    trainer(tmp_path).test(again, data, ckpt_path=tmp_path / "last.ckpt", verbose=False)
    loaded = LoPALightningModule.load_from_checkpoint(tmp_path / "last.ckpt")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="nothing was trained")
        trainer(tmp_path).validate(loaded, data, verbose=False)
        trainer(tmp_path).predict(loaded, data)


def test_a_fit_without_a_step_has_learned_nothing(tiny: Tiny, tmp_path: Path) -> None:
    model, data, run = module(tiny("bert")), reviews(tmp_path), trainer(tmp_path, max_steps=0)
    run.fit(model, data)
    with pytest.raises(LoPAError, match=REFUSED.format("test")):
        run.test(model, data)


def test_a_backbone_as_it_comes_answers_and_is_not_fitted(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = module(tiny("bert"), **AS_IT_COMES), reviews(tmp_path)
    model.awaits_checkpoint = False
    trainer(tmp_path).predict(model, data)
    monkeypatch.setattr("lopa_lightning.modules.builder.load_model", fail)
    with pytest.raises(LoPAError, match="nothing is trained"):
        trainer(tmp_path).fit(module(tiny("bert"), **AS_IT_COMES), data)


@pytest.mark.parametrize(
    ("option", "given", "has"),
    [("dtype", "bfloat16", "auto"), ("attn_implementation", "eager", "None"), ("revision", "v2", "None")],
)
def test_how_to_load_an_encoder_that_is_the_backbone_is_the_backbones_to_say(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str, given: str, has: str
) -> None:
    encoder = InstanceEncoderSpec(trainable=True, **{option: given})  # type: ignore[arg-type]
    with monkeypatch.context() as patched:
        patched.setattr("lopa_lightning.modules.builder.load_model", fail)
        with pytest.raises(LoPAError, match=f"instance_encoder.{option} {given} is .* by backbone.{option} {has};"):
            trainer(tmp_path).fit(module(tiny("bert"), instance_encoder=encoder), reviews(tmp_path))
    if option == "dtype":  # what the backbone says too
        backbone = PretrainedSpec(tiny("bert"), dtype="bfloat16")
        same = ClassificationModule(backbone=backbone, instance_encoder=encoder, prompt_encoder=LoPATiny)
        trainer(tmp_path).fit(same, reviews(tmp_path))


@pytest.mark.parametrize(
    "given", [{"trainable": True}, {"adapter": {"peft_type": "LORA", "r": 2}}, {"control": "shuffled"}]
)
def test_an_encoder_that_nothing_reads_is_said(tiny: Tiny, tmp_path: Path, given: dict[str, Any]) -> None:
    model = module(tiny("bert"), prompt_encoder=PromptTiny, instance_encoder=InstanceEncoderSpec(**given))
    said = f"instance_encoder.{next(iter(given))} has no effect: PromptTuning makes a soft prompt without an instance"
    with pytest.warns(UserWarning, match=said):
        trainer(tmp_path).fit(model, reviews(tmp_path))


def test_a_copy_of_the_backbone_says_what_it_does_not_have_of_it(tiny: Tiny, tmp_path: Path) -> None:
    backbone = PretrainedSpec(tiny("bert"), gradient_checkpointing=True)
    encoder = InstanceEncoderSpec(trainable=True)
    model = ClassificationModule(backbone=backbone, instance_encoder=encoder, prompt_encoder=LoPATiny)
    with pytest.warns(UserWarning, match="is a copy of the backbone, and without its gradient_checkpointing"):
        trainer(tmp_path).fit(model, reviews(tmp_path))


def test_completions_are_not_generated_from_initial_values_either(tiny: Tiny) -> None:
    with pytest.raises(LoPAError, match=REFUSED.format("generate")):
        causal(tiny("llama")).generate(["the film"])
    assert causal(tiny("llama"), generation={"max_new_tokens": 2}, **AS_IT_COMES).generate(["the film"])


class Constant(ClassificationModule):
    """Predicts one number for every text."""

    def predictions(self, outputs: Tensor) -> Tensor:
        return torch.full((len(outputs),), 2.5)


def numbers(folder: Path) -> TextClassificationDataModule:
    rows = [f"the film {'was ' * (i % 6)}good,{i % 6}.5" for i in range(24)]
    (folder / "rows.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    files = dict.fromkeys(("train", "validation"), str(folder / "rows.csv"))
    return TextClassificationDataModule(data_files=files, labels=[], batch_size=8)


def test_a_score_that_is_nan_is_no_best_one_and_is_said(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = BestCheckpoint(tmp_path / "kept", filename="best", monitor="val/score", mode="max")
    run = trainer(tmp_path, epochs=2, callbacks=[best, FitSummary()])
    model = Constant(objective="head", backbone=PretrainedSpec(tiny("bert_base")), prompt_encoder=LoPATiny)
    with pytest.warns(UserWarning, match=r"nothing was learned: val/score was nan .* no best checkpoint was kept"):
        run.fit(model, numbers(tmp_path))
    assert math.isnan(run.callback_metrics["val/score"])
    assert best.best_model_path == ""
    assert not (tmp_path / "kept").exists()
    for score, is_best in ((math.nan, False), (-math.inf, False), (0.5, True)):
        assert best.check_monitor_top_k(run, torch.tensor(score)) == is_best


def test_a_run_that_asks_for_no_validation_is_told_so(tiny: Tiny, tmp_path: Path) -> None:
    run = trainer(tmp_path, callbacks=[FitSummary()], limit_val_batches=0)
    model = module(tiny("bert"))
    with pytest.warns(UserWarning, match=r"nothing was validated, as trainer.limit_val_batches says"):
        run.fit(model, reviews(tmp_path))


def test_the_summarys_best_is_the_first_score_that_is_a_number() -> None:
    summary = FitSummary()
    run: Any = Trainer(logger=False, barebones=True)
    for score in (math.nan, 0.25, math.nan, 0.5, 0.125):
        run._logger_connector._callback_metrics = {"val/score": torch.tensor(score)}
        summary.on_validation_end(run, LightningModule())
    assert summary.state_dict() == {"best": {"val/score": 0.5}}


def test_the_summarys_best_is_the_best_checkpoints() -> None:
    summary, best = FitSummary(), BestCheckpoint(monitor="val/loss", mode="min")
    run: Any = Trainer(logger=False, callbacks=[best])
    for loss, score in ((0.5, 0.7), (0.3, 0.8), (0.4, 0.9)):
        metrics = {"val/loss": torch.tensor(loss), "val/score": torch.tensor(score)}
        run._logger_connector._callback_metrics = metrics
        summary.on_validation_end(run, LightningModule())
    assert summary.state_dict()["best"]["val/score"] == pytest.approx(0.8)


def test_the_summary_is_of_the_checkpoint_that_it_names(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    every = ModelCheckpoint(tmp_path / "every", save_top_k=-1)
    best = BestCheckpoint(tmp_path / "kept", filename="best", monitor="val/score", mode="max")
    model, data = module(tiny("bert_base"), objective="head"), reviews(tmp_path)
    summary = FitSummary()
    run = trainer(tmp_path, epochs=2, callbacks=[every, best, LastCheckpoint(tmp_path / "kept"), summary])
    run.fit(model, data)
    assert best_checkpoint(run) is best
    # A run that goes on elsewhere has a best checkpoint of its own there.
    summary._best = {"val/score": 9.0}
    summary.on_train_start(run, model)
    assert summary._best == {"val/score": 9.0}
    best.best_model_score = None
    summary.on_train_start(run, model)
    assert summary._best == {}
    # And without a monitor the last one is kept.
    best = BestCheckpoint(tmp_path / "last", filename="best", monitor=None)
    run = trainer(tmp_path, epochs=2, callbacks=[best, FitSummary()])
    capsys.readouterr()
    run.fit(model, data)
    assert "Last validation" in capsys.readouterr().out


class Mine(Checkpoint):
    """Somebody's, which keeps no files."""


def test_two_checkpoints_are_not_one_file(tiny: Tiny, tmp_path: Path) -> None:
    both = [BestCheckpoint(tmp_path / "kept", filename="last", monitor="val/loss"), LastCheckpoint(tmp_path / "kept")]
    saves_last = [ModelCheckpoint(save_last=True), LastCheckpoint()]
    for callbacks in (both, [LastCheckpoint(), ModelCheckpoint(filename="last")], saves_last):
        with pytest.raises(
            LoPAError, match=r"two checkpoints would be one file, last\.ckpt: give one another filename"
        ):
            trainer(tmp_path, callbacks=[*callbacks, Mine()]).fit(module(tiny("bert")), reviews(tmp_path))


def test_several_best_checkpoints_need_names_of_their_own() -> None:
    for kept in (-1, 3):
        with pytest.raises(
            LoPAError, match=f"save_top_k {kept} needs a filename with a field, such as 'best-{{step}}'"
        ):
            BestCheckpoint(filename="best", save_top_k=kept, enable_version_counter=False)
    for name, numbered in (("best-{step}", False), (None, False), ("best", True)):
        BestCheckpoint(filename=name, save_top_k=3, enable_version_counter=numbered, monitor="val/score")


@pytest.mark.sampled(1)
@pytest.mark.parametrize(("rate", "learned"), [(0.1, True), (1e-9, False)])
def test_a_regression_that_learned_nothing_is_told_from_one_that_did(
    tiny: Tiny, tmp_path: Path, rate: float, learned: bool
) -> None:
    """Labels of 0.5 to 5.5 have a variance of 35 / 12, which predicting 3 for all gets."""
    model = module(
        tiny("bert_base"), objective="head", learning_rates={"head": rate, "low_rank": 0, "shared_prompt": 0}
    )
    run = trainer(tmp_path, epochs=15, callbacks=[FitSummary()], check_val_every_n_epoch=15)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(model, numbers(tmp_path))
    told = [str(w.message) for w in caught if "labels' variance 2.9167" in str(w.message)]
    assert len(told) == (not learned)
    assert run.callback_metrics["val/label_variance"] == pytest.approx(35 / 12, abs=1e-5)


def save(model: PreTrainedModel, folder: Path) -> str:
    model.save_pretrained(folder)
    causal_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
def test_padding_that_counts_beside_virtual_tokens_ends_a_run_at_its_start(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "intermediate_size": 48, "window_size": 8}
    config = GPTNeoConfig(
        vocab_size=len(causal_tokenizer()), max_position_embeddings=64, attention_types=[[["local"], 2]], **sizes
    )
    folder = save(GPTNeoForCausalLM(config), tmp_path / "gpt_neo")
    run = trainer(tmp_path, fast_dev_run=True)
    with pytest.raises(LoPAError, match="placement 'every_layer' cannot be right with padding on the left"):
        run.fit(causal(folder, placement="every_layer"), completions(tmp_path / "data"))
    data = reviews(tmp_path)
    options: dict[str, Any] = {"objective": "causal_lm", "placement": "every_layer"}
    run.fit(module(folder, **options), data)  # padded on the right
    data.padding_side = "left"
    with pytest.raises(LoPAError, match="placement 'every_layer' cannot be right with padding on the left"):
        run.fit(module(folder, **options), data)


def test_a_backbone_whose_generate_takes_no_embeddings_learns_but_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = OpenAIGPTConfig(vocab_size=len(causal_tokenizer()), n_positions=64, n_embd=32, n_layer=1, n_head=4)
    folder, data = save(OpenAIGPTLMHeadModel(config), tmp_path / "gpt"), completions(tmp_path / "data")
    refused = "OpenAIGPTLMHeadModel cannot generate after virtual tokens"
    with pytest.warns(UserWarning, match=refused):
        trainer(tmp_path, fast_dev_run=True).fit(causal(folder), data)
    monkeypatch.setattr("lopa_lightning.modules.builder.load_model", fail)
    no_cache = {"instance_encoder": InstanceEncoderSpec(cache=False)}
    for do, options in (("predict", {}), ("fit", {"exact_match": 2}), ("validate", {"exact_match": "all"})):
        with pytest.raises(LoPAError, match=refused):
            getattr(trainer(tmp_path), do)(causal(folder, **options, **no_cache), data)
    with pytest.raises(LoPAError, match=refused):
        causal(folder).generate(["the film"])


def grown(folder: str, to: Path, token: str, **role: str) -> str:
    """A copy of a model whose tokenizer has a token more than the embedding table has rows."""
    to.mkdir()
    for path in Path(folder).iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens(role or {"extra_special_tokens": [token]})
    tokenizer.save_pretrained(to)
    return str(to)


def test_a_token_without_an_embedding_is_refused_before_weights(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lopa_lightning.modules.builder.load_model", fail)
    rows = len(AutoTokenizer.from_pretrained(tiny("llama")))
    folder = grown(tiny("llama"), tmp_path / "grown", "[PAD]", pad_token="[PAD]")
    refused = (
        f"'{folder}' has no embedding for 1 of its tokenizer's tokens, such as '.PAD.' with id {rows}: .* {rows} rows"
    )
    with pytest.raises(LoPAError, match=refused):
        trainer(tmp_path).fit(causal(folder), completions(tmp_path / "data"))
    with pytest.raises(LoPAError, match=refused):
        causal(tiny("gpt2"), instance_encoder=InstanceEncoderSpec(folder)).input_spec  # noqa: B018


def test_a_special_token_that_no_text_has_needs_no_embedding(tiny: Tiny, tmp_path: Path) -> None:
    folder = grown(tiny("llama"), tmp_path / "grown", "<image>")
    assert causal(folder).input_spec.tokenizer.convert_tokens_to_ids("<image>") == len(causal_tokenizer())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "<image>{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(folder)
    with pytest.raises(LoPAError, match="no embedding for 1 of its tokenizer's tokens, such as '<image>'"):
        causal(folder).input_spec  # noqa: B018


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_a_folder_without_a_tokenizer_is_named(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes(Path(tiny(kind), name).read_bytes())
    with pytest.raises(LoPAError, match=f"no (tokenizer found for|usable tokenizer in) '{tmp_path}'"):
        module(str(tmp_path)).input_spec  # noqa: B018

"""Objectives: what is read where, and that losses and metrics are the formulas'."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from lopa_lightning import InstanceEncoderSpec, LoPALightningModule, Task, TextClassificationDataModule, Verbalizer
from lopa_lightning.errors import LoPAError
from tests.modules.helpers import LoPATiny, module, reviews, trainer, write_reviews

Tiny = Callable[[str], str]


def lopa_by_hand(state: dict[str, Tensor], instance: Tensor, rank: int) -> Tensor:
    """Z = Z_S ∘ σ(U Vᵀ) from a checkpoint's tensors."""

    def head(name: str) -> Tensor:
        w1, b1, w2, b2 = (state[f"net.prompt_encoder.{name}.{i}.{p}"] for i in (1, 3) for p in ("weight", "bias"))
        return (torch.tanh(instance @ w1.T + b1) @ w2.T + b2).view(len(instance), -1, rank)

    gate = torch.sigmoid(torch.einsum("bmr,bdr->bmd", head("row_head"), head("column_head")))
    return state["net.prompt_encoder.shared_prompt.weight"] * gate


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("kind", "objective", "auto"),
    [
        ("bert", "masked_lm", AutoModelForMaskedLM),
        ("roberta", "masked_lm", AutoModelForMaskedLM),
        ("gpt2", "causal_lm", AutoModelForCausalLM),
        ("llama", "causal_lm", AutoModelForCausalLM),
    ],
)
def test_word_logits_are_those_of_the_plain_model_on_the_rendered_text(
    tiny: Tiny, tmp_path: Path, kind: str, objective: Any, auto: Any
) -> None:
    """The whole way, once more by hand: transformers alone, one text at a time, all logits."""
    model, data = module(tiny(kind), objective=objective), reviews(tmp_path)
    trainer(tmp_path).fit(model, data)
    model.eval()
    batch = next(iter(data.val_dataloader()[0]))
    with torch.no_grad():
        got = model(batch)

    plain, tokenizer = auto.from_pretrained(tiny(kind)).eval(), AutoTokenizer.from_pretrained(tiny(kind))
    texts = (tmp_path / "validation.csv").read_text().splitlines()[1:]
    words = [tokenizer.encode(f"x {word}", add_special_tokens=False)[-1] for word in ("great", "terrible")]
    for row, index in enumerate(batch["index"].tolist()):
        text = texts[index].rsplit(",", 1)[0]
        instance_ids = tokenizer(text, return_tensors="pt")["input_ids"]
        mask = tokenizer.mask_token
        prompted = f"{text} . It was {mask} ." if objective == "masked_lm" else f"{text} . It was"
        ids = tokenizer(prompted, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            mean = plain.base_model(input_ids=instance_ids).last_hidden_state.mean(1)
            instance = mean / mean.square().mean(1, keepdim=True).sqrt()
            prompt = lopa_by_hand(model.state_dict(), instance, rank=2)
            logits = plain(inputs_embeds=torch.cat([prompt, plain.get_input_embeddings()(ids)], 1)).logits[0]
        place = 3 + ids[0].tolist().index(tokenizer.mask_token_id) if objective == "masked_lm" else -1
        torch.testing.assert_close(got[row], logits[place, words], rtol=0, atol=1e-4)


def test_metrics_and_loss_are_those_of_the_predictions(tiny: Tiny, tmp_path: Path) -> None:
    model, data = module(tiny("bert")), reviews(tmp_path, rows=21)
    run = trainer(tmp_path)
    run.fit(model, data)
    (logged,) = run.validate(model, data, verbose=False)
    predicted = {}
    data.splits["predict"] = "validation"
    for batch in run.predict(model, data):
        predicted |= dict(zip(batch["index"].tolist(), batch["probabilities"]))
    labels = [0 if line.endswith("good") else 1 for line in (tmp_path / "validation.csv").read_text().splitlines()[1:]]
    hits = [int(predicted[i].argmax()) == label for i, label in enumerate(labels)]
    losses = [-torch.log(predicted[i][label]) for i, label in enumerate(labels)]
    assert logged["val/accuracy"] == logged["val/score"] == pytest.approx(sum(hits) / 21)
    assert logged["val/loss"] == pytest.approx(float(sum(losses)) / 21, abs=1e-5)
    assert logged["val/majority_share"] == pytest.approx(11 / 21)


@pytest.mark.slow  # so do the next two, of several labels and of numbers
def test_it_learns_what_a_word_decides(tiny: Tiny, tmp_path: Path) -> None:
    seed_everything(1)
    model = module(tiny("llama"), objective="head", learning_rates={"head": 0.1})
    run = trainer(tmp_path, epochs=40, num_sanity_val_steps=0, check_val_every_n_epoch=40)
    run.fit(model, reviews(tmp_path, rows=24))
    assert run.callback_metrics["val/accuracy"] > 0.9


@pytest.mark.slow
def test_several_labels_for_each_text(tiny: Tiny, tmp_path: Path) -> None:
    kinds, files = ["good", "terrible", "badly"], {}
    chosen = [[word for bit, word in enumerate(kinds) if row >> bit & 1] for row in range(8)] * 3
    for split in ("train", "validation"):
        rows = [json.dumps({"text": " ".join(["the film was", *words]), "tags": words[::-1]}) for words in chosen]
        files[split] = str(tmp_path / f"{split}.jsonl")
        Path(files[split]).write_text("\n".join(rows))
    data = TextClassificationDataModule(
        data_files=files, label_column="tags", labels=kinds, multi_label=True, metrics=["f1", "macro_f1"], batch_size=8
    )
    seed_everything(1)
    model = module(tiny("bert_base"), objective="head", learning_rates={"head": 0.1})
    run = trainer(tmp_path, epochs=20, check_val_every_n_epoch=20)
    run.fit(model, data)
    metrics = {name: float(value) for name, value in run.callback_metrics.items()}
    data.splits["predict"] = "validation"
    rows = [row for batch in run.predict(model, data) for row in model.prediction_rows(batch)]
    pairs = [(label in row["labels"], label in chosen[row["index"]]) for row in rows for label in kinds]
    both, wrong = sum(a and b for a, b in pairs), sum(a != b for a, b in pairs)
    assert metrics["val/f1"] == pytest.approx(2 * both / (2 * both + wrong))
    assert metrics["val/f1"] > 0.9
    assert metrics["val/accuracy"] == pytest.approx(1 - wrong / len(pairs))
    assert metrics["val/score"] == pytest.approx((metrics["val/f1"] + metrics["val/macro_f1"]) / 2)
    assert set(rows[0]) == {"index", "labels", "probabilities"}

    again: Any = LoPALightningModule.load_from_checkpoint(tmp_path / "last.ckpt")
    assert again.task == data.task
    files["validation"] = files["train"]
    options: Any = {"data_files": files, "label_column": "tags", "labels": kinds, "multi_label": True}
    for wrong_rows in ('{"text": "a", "tags": "good"}', '{"text": "a", "tags": [["good"]]}'):
        Path(files["train"]).write_text(wrong_rows)
        with pytest.raises(LoPAError, match="column 'tags' must hold a list of labels in each row, got"):
            run.fit(model, TextClassificationDataModule(**options))


def test_regression_with_a_trained_head(tiny: Tiny, tmp_path: Path) -> None:
    files = {}
    for split in ("train", "validation"):
        rows = [f"the film {'was ' * (i % 6)}good,{i % 6}.5" for i in range(24)]
        (tmp_path / f"{split}.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
        files[split] = str(tmp_path / f"{split}.csv")
    data = TextClassificationDataModule(data_files=files, labels=[], batch_size=8)
    seed_everything(1)
    model = module(tiny("bert_base"), objective="head", learning_rates={"head": 0.1})
    run = trainer(tmp_path, epochs=15, check_val_every_n_epoch=15)
    run.fit(model, data)
    metrics = run.callback_metrics
    assert metrics["val/score"] == pytest.approx(float(metrics["val/pearson"] + metrics["val/spearman"]) / 2)
    assert metrics["val/pearson"] > 0.9
    data.splits["predict"] = "validation"
    rows = [row for batch in run.predict(model, data) for row in model.prediction_rows(batch)]
    assert set(rows[0]) == {"index", "value"}


def test_prediction_rows_name_the_labels(tiny: Tiny) -> None:
    model = module(tiny("bert"), task=Task(["good", "bad"]))
    rows = model.prediction_rows({"index": torch.tensor([4]), "probabilities": torch.tensor([[0.25, 0.75]])})
    assert rows == [{"index": 4, "label": "bad", "probabilities": {"good": 0.25, "bad": 0.75}}]


@pytest.mark.parametrize(
    ("options", "data_options", "message"),
    [
        ({}, {"words": None}, "needs label words, one for each of"),
        (
            {},
            {"words": ["great", "marvellous"]},
            r"label word 'marvellous' must be one token of the backbone, but it is \[",
        ),
        ({}, {"template": ("{text} it was",)}, "needs a template with {mask}"),
        (
            {"task": Task(["yes", "no"], verbalizer=Verbalizer(["Yes", "No"]))},
            {},
            "labels: the model has .*'yes'.* the data .*'good'",
        ),
    ],
)
def test_a_task_that_does_not_fit_is_refused_before_weights_are_loaded(
    tiny: Tiny, tmp_path: Path, options: dict[str, Any], data_options: dict[str, Any], message: str
) -> None:
    model = module(tiny("bert"), **options)
    with pytest.raises(LoPAError, match=message):
        trainer(tmp_path).fit(model, reviews(tmp_path, **data_options))
    assert model.net is None


def test_words_for_regression_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,label\n" + "good,1.5\nbad,0.5\n" * 10)
    files: Any = {"train": str(tmp_path / "train.csv")}
    data = TextClassificationDataModule(data_files=files, labels=[], template=("{text} {mask}",))
    with pytest.raises(LoPAError, match="regression needs objective: head"):
        trainer(tmp_path).fit(module(tiny("bert")), data)


def test_a_precision_that_rounds_what_a_regression_learns_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,label\n" + "good,1001.5\nbad,1000.25\n" * 10)
    files: Any = {"train": str(tmp_path / "train.csv")}
    data = TextClassificationDataModule(data_files=files, labels=[])
    model = module(tiny("bert_base"), objective="head")
    with pytest.raises(LoPAError, match="precision bf16-true rounds the numbers to be learned"):
        trainer(tmp_path, precision="bf16-true").fit(model, data)
    assert model.net is None


def test_a_model_without_language_model_head_names_the_objective_to_use(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(LoPAError, match="use objective: head"):
        trainer(tmp_path).fit(module(tiny("bert_base")), reviews(tmp_path))


def test_two_evaluation_sets_are_logged_apart(tiny: Tiny, tmp_path: Path) -> None:
    class TwoSets(TextClassificationDataModule):
        def splits_of(self, role: Any) -> list[str]:
            return ["train"] if role == "train" else ["validation", "test"]

    files = {
        split: write_reviews(tmp_path / f"{split}.csv", n)
        for split, n in [("train", 8), ("validation", 10), ("test", 5)]
    }
    data = TwoSets(data_files=dict(files), labels=["good", "bad"])
    data.task = dataclasses.replace(data.task, eval_sets=["", "_other"])
    run = trainer(tmp_path)
    run.fit(module(tiny("bert_base"), objective="head"), data)
    shares = {name: float(run.callback_metrics[f"{name}/majority_share"]) for name in ("val", "val_other")}
    assert shares == {"val": pytest.approx(0.5), "val_other": pytest.approx(0.6)}


def test_an_encoder_of_its_own_reads_the_text_with_its_own_tokenizer(tiny: Tiny, tmp_path: Path) -> None:
    encoder = InstanceEncoderSpec(tiny("bert_base"), "cls", cache=False)  # whose tokens are in the batch
    model = module(tiny("llama"), objective="causal_lm", instance_encoder=encoder)
    data = reviews(tmp_path)
    trainer(tmp_path, fast_dev_run=True).fit(model, data)
    batch = next(iter(data.val_dataloader()[0]))
    tokenizer = AutoTokenizer.from_pretrained(tiny("bert_base"))
    text = (tmp_path / "validation.csv").read_text().splitlines()[1 + int(batch["index"][0])].rsplit(",", 1)[0]
    own = batch["instance_input_ids"][0][batch["instance_attention_mask"][0] == 1]
    assert own.tolist() == tokenizer(text)["input_ids"]
    assert model.net.prompt_encoder.row_head[1].in_features == 32


def test_lopa_tiny_is_a_partial_that_hyperparameters_describe(tiny: Tiny) -> None:
    model = module(tiny("bert"), prompt_encoder=functools.partial(LoPATiny, rank=1))
    assert model.hparams["prompt_encoder"] == {
        "class_path": "lopa",
        "init_args": {
            "num_virtual_tokens": 3,
            "rank": 1,
            "hidden_dim": 8,
            "dropout": 0.1,
            "init": "vocabulary",
            "init_text": None,
            "init_std": 1.0,
            "combine": "gate",
            "heads_init": "zero_u",
            "backbone_layers": 1,
        },
    }

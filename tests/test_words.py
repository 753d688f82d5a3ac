"""A label for each word: encoding, learning, resuming and predicting, against references written here."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from lightning.pytorch import seed_everything
from torch.nn import functional as F

from lopa_lightning import (
    ClassificationModule,
    InstanceEncoderSpec,
    LoPALightningModule,
    LoPAPrompter,
    TextClassificationDataModule,
)
from lopa_lightning.cli import main
from lopa_lightning.data.word_rows import word_rows
from lopa_lightning.errors import LoPAError
from lopa_lightning.metrics.classification import SpanScore, build_metrics
from lopa_lightning.serving.export import export_bundle
from lopa_lightning.task import IGNORED, Task
from tests.benchmarks.python_words import rows_of as python_rows
from tests.data.helpers import rows_of, write
from tests.modules.helpers import module, trainer
from tests.test_readme import ROOT, blocks
from tests.tiny import bert_tokenizer

Tiny = Callable[[str], str]
LABELS = ["O", "B-ART", "I-ART", "B-BAD", "I-BAD"]
OPTIONS: dict[str, Any] = {"text_columns": ["tokens"], "label_column": "ner_tags", "per_word": True, "batch_size": 8}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def example(draw: random.Random) -> dict[str, Any]:
    """Words whose labels are decided by the words themselves, and for ``film`` by the one before."""
    pairs: list[tuple[str, str]] = []
    for _ in range(draw.randint(1, 5)):
        pairs += draw.choice(
            [
                [("great", "B-ART"), ("film", "I-ART")],
                [("badly", "B-BAD")],
                [("the", "O"), ("film", "O")],
                [("was", "O")],
            ]
        )
    return {"id": draw.random(), "tokens": [word for word, _ in pairs], "ner_tags": [label for _, label in pairs]}


def files(rows: int = 32) -> Any:
    draw = random.Random(0)
    return {name: write(f"{name}.jsonl", [example(draw) for _ in range(rows)]) for name in ("train", "validation")}


def connected(backbone: str, stage: str = "validate", **options: Any) -> TextClassificationDataModule:
    data = TextClassificationDataModule(**{"labels": LABELS, **OPTIONS, **options})
    data.connect(module(backbone, objective="head").input_spec)
    data.setup(stage)
    return data


@pytest.mark.sampled(2)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["bert_base", "roberta", "llama"])
def test_a_label_stands_at_the_first_token_of_its_word(kind: str, side: Any, tiny: Tiny) -> None:
    rows = [
        {"tokens": ["unfilmed", "[SEP]", "the</s>", "<|endoftext|>"], "ner_tags": ["B-ART", "O", "B-BAD", "I-BAD"]},
        {"tokens": ["a"], "ner_tags": ["O"]},
    ]
    data = connected(tiny(kind), data_files={"validation": write("rows.jsonl", rows)}, padding_side=side)
    tokenizer = data.text_spec.tokenizer
    (batch,) = data.val_dataloader()[0]
    assert batch["input_ids"].shape == batch["labels"].shape == batch["words"].shape
    assert (batch["labels"][batch["attention_mask"] == 0] == IGNORED).all()
    assert ((batch["labels"] == IGNORED) == (batch["words"] == 0)).all()
    for index, row in enumerate(rows_of([batch])):
        # Each word alone, with the space before it that running text has.
        words = rows[index]["tokens"]
        pieces = [
            tokenizer.tokenize(word if number == 0 else f" {word}", split_special_tokens=True)
            for number, word in enumerate(words)
        ]
        before = 0 if kind == "llama" else 1
        flat = [piece for word in pieces for piece in word]
        assert tokenizer.convert_ids_to_tokens(row["input_ids"])[before : before + len(flat)] == flat
        # A space that is a token by itself tells nothing of the word after it.
        skipped = [word[0] == "Ġ" for word in pieces]
        firsts = [before + sum(map(len, pieces[:number])) + skipped[number] for number in range(len(words))]
        own = batch["attention_mask"][batch["index"].tolist().index(index)].bool()
        labels = batch["labels"][batch["index"].tolist().index(index)][own].tolist()
        assert [place for place, label in enumerate(labels) if label != IGNORED] == firsts
        assert [LABELS[labels[place]] for place in firsts] == rows[index]["ner_tags"]


@pytest.mark.parametrize(("side", "kept"), [("right", [1, 2, 3, 4]), ("left", [3, 4, 5, 6])])
def test_words_that_are_cut_have_no_label(side: Any, kept: list[int], tiny: Tiny) -> None:
    row = {"tokens": ["the", "film", "was", "great", "and", "good"], "ner_tags": ["O", "O", "O", "B-ART", "O", "O"]}
    source = {"validation": write("rows.jsonl", [row])}
    with pytest.warns(UserWarning, match=r"1 of 1 texts were cut to 6 tokens: words beyond have no label"):
        data = connected(tiny("bert_base"), data_files=source, max_length=6, truncation_side=side)
    (batch,) = data.val_dataloader()[0]
    assert batch["words"].tolist() == [[0, *kept, 0]]
    tokens = data.text_spec.tokenizer.convert_ids_to_tokens(batch["input_ids"][0])
    assert tokens == ["[CLS]", *(row["tokens"][number - 1] for number in kept), "[SEP]"]


def test_words_that_are_no_token_are_counted_and_have_no_label(tiny: Tiny) -> None:
    row = {"tokens": ["the", "\u200b", "film"], "ner_tags": ["O", "B-ART", "O"]}
    with pytest.warns(UserWarning, match="1 of 1 texts have words that are no token"):
        data = connected(tiny("bert_base"), data_files={"validation": write("rows.jsonl", [row])})
    (batch,) = data.val_dataloader()[0]
    assert len(bert_tokenizer()("\u200b", add_special_tokens=False)["input_ids"]) == 0
    assert batch["words"].tolist() == [[0, 1, 3, 0]]
    assert batch["num_words"].tolist() == [3]


# A good row, then those that cannot be used, and what is said.
GOOD = {"tokens": ["the", "film"], "ner_tags": ["O", "O"]}
FAULTS = {
    "lengths": (["a", "b"], ["O"], "row 2 (counted from 1): has 2 words in 'tokens' and 1 labels in 'ner_tags'"),
    "no words": ([], [], "column 'tokens' has no words in row 2 (counted from 1)"),
    "an empty word": (["a", " "], ["O", "O"], "column 'tokens' has an empty word in row 2 (counted from 1)"),
    "a label": (["a"], ["B-X"], "has labels 'B-X' beside the allowed 'O', 'B-ART', 'I-ART', 'B-BAD', 'I-BAD'"),
    "no label": (["a"], [None], "has labels 'a missing label' beside the allowed"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_rows_that_cannot_be_used_are_named(fault: str, tiny: Tiny) -> None:
    words, labels, message = FAULTS[fault]
    source = {"validation": write("rows.jsonl", [GOOD, {"tokens": words, "ner_tags": labels}])}
    with pytest.raises(LoPAError) as caught:
        connected(tiny("bert_base"), data_files=source)
    assert message in str(caught.value)
    assert "row 2 (counted from 1)" in str(caught.value)
    if not words:
        with pytest.warns(UserWarning, match="1 of 2 rows were dropped"):
            assert len(connected(tiny("bert_base"), data_files=source, drop_empty=True).datasets["val"][0]) == 1


def test_settings_that_cannot_be_right_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    source = files(4)
    for options, message in (
        ({"text_columns": ["a", "b"]}, "per_word reads the words of one text column, without template"),
        ({"template": ["{tokens}"]}, "per_word reads the words of one text column, without template"),
        (
            {"multi_label": True},
            "per_word needs labels, one for each word of a text, and neither words nor multi_label",
        ),
        ({"words": list("abcde")}, "per_word needs labels, one for each word of a text, and neither words nor"),
        ({"labels": []}, "per_word needs labels"),
        ({"shots_per_label": 2}, "shots_per_label needs rows with one label each"),
    ):
        with pytest.raises(LoPAError, match=message):
            TextClassificationDataModule(data_files=source, **{**OPTIONS, "labels": LABELS, **options})
    for settings, options, message in (
        ({"objective": "masked_lm"}, {}, "a label for each word needs objective: head, and no head_pooling"),
        ({"objective": "head", "head_pooling": "last"}, {}, "a label for each word needs objective: head"),
        ({"objective": "head", "placement": "after"}, {}, "needs a soft prompt that the words see, and placement is"),
        (
            {"objective": "head", "instance_loss": 1.0, "instance_encoder": InstanceEncoderSpec(trainable=True)},
            {},
            "instance_loss needs one answer for a text, and here each word has a label",
        ),
        (
            {"objective": "head"},
            {"metrics": ["span_f2"]},
            "metrics of classification must be of accuracy, f1, matthews",
        ),
        ({"objective": "head", "task": Task(LABELS)}, {}, "per_word: the model has None, the data True"),
        ({"objective": "head"}, {"labels": None}, "labels must name the classes: nothing in the data names those"),
        ({"objective": "head"}, {"max_length": 2}, "2 special tokens leave no room for words in 2"),
    ):
        data = TextClassificationDataModule(data_files=source, **{**OPTIONS, "labels": LABELS, **options})
        with pytest.raises(LoPAError, match=message):
            trainer(tmp_path).fit(module(tiny("llama" if "placement" in settings else "bert"), **settings), data)
    with pytest.raises(LoPAError, match="words, whose labels are not O and the B- and I- of spans, must be of"):
        build_metrics(["span_f1"], 2, word_labels=["NOUN", "VERB"])


# Metrics


def chunks(names: list[str]) -> set[tuple[str, int, int]]:
    """Spans as type, first and last word, one word after the other as in CoNLL's script (I- may begin a span)."""
    found, start, kind = set(), None, ""
    for place, name in enumerate([*names, "O"]):
        prefix, _, own = name.partition("-")
        if start is not None and (prefix != "I" or own != kind):
            found.add((kind, start, place - 1))
            start = None
        if prefix != "O" and start is None:
            start, kind = place, own
    return found


@pytest.mark.parametrize("seed", range(20))
def test_spans_are_those_of_a_reference(seed: int) -> None:
    draw = random.Random(seed)
    labels = draw.sample(LABELS, draw.randint(2, 5))
    if set(labels) == {"O"}:
        labels.append("B-ART")
    rows = [[[draw.randrange(len(labels)) for _ in range(draw.randint(1, 9))] for _ in range(2)] for _ in range(8)]
    rows = [[predicted[: len(wanted)] + wanted[len(predicted) :], wanted] for predicted, wanted in rows]
    right = predicted_count = wanted_count = 0
    metrics = build_metrics(["span_f1"], len(labels), word_labels=labels)
    for part in (rows[:3], rows[3:]):
        preds, target = torch.zeros(len(part), 20, dtype=torch.long), torch.full((len(part), 20), IGNORED)
        for number, (predicted, wanted) in enumerate(part):
            # Words stand anywhere, in their order; between them is what has no label.
            places = sorted(draw.sample(range(20), len(wanted)))
            preds[number, places], target[number, places] = torch.tensor(predicted), torch.tensor(wanted)
            own, given = (chunks([labels[label] for label in each]) for each in (predicted, wanted))
            right, predicted_count, wanted_count = (
                right + len(own & given),
                predicted_count + len(own),
                wanted_count + len(given),
            )
        metrics.update(preds, target)
    flat = [pair for predicted, wanted in rows for pair in zip(predicted, wanted)]
    values = {name: float(value) for name, value in metrics.compute().items()}
    total = predicted_count + wanted_count
    most = max(sum(wanted == label for _, wanted in flat) for label in range(len(labels)))
    assert values == pytest.approx(
        {
            "span_f1": 2 * right / total if total else 0,
            "span_precision": right / predicted_count if predicted_count else 0,
            "span_recall": right / wanted_count if wanted_count else 0,
            "accuracy": sum(a == b for a, b in flat) / len(flat),
            "majority_share": most / len(flat),
        }
    )


def test_no_spans_score_zero() -> None:
    score = SpanScore(["O", "B-ART"])
    score.update(torch.tensor([[0]]), torch.tensor([[0]]))
    assert score.compute() == 0


def test_the_score_of_plain_labels_is_the_accuracy_of_words() -> None:
    assert Task(["NOUN", "VERB"], per_word=True).official_metrics == ["accuracy"]
    assert Task(LABELS, per_word=True).official_metrics == ["span_f1"]
    assert set(build_metrics(["accuracy"], 2, word_labels=["NOUN", "VERB"])) == {"accuracy", "majority_share"}


# From a config


@pytest.fixture
def run(tiny: Tiny) -> list[str]:
    """Arguments of a run on words."""
    config = ROOT / "configs" / "own_tokens.yaml"
    source = json.dumps({**files(), "test": "validation.jsonl"})
    model = [f"--model.backbone.name={tiny('bert_base')}", "--model.prompt_encoder.num_virtual_tokens=3"]
    data = [f"--data.data_files={source}", f"--data.labels={json.dumps(LABELS)}", "--data.batch_size=8"]
    rates = ["--model.warmup=2", "--model.learning_rates={shared_prompt: 0.01, head: 0.1}"]
    return ["--config", str(config), *model, *data, *rates]


@pytest.mark.slow
def test_it_learns_resumes_predicts_and_is_a_bundle(
    run: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lopa_lightning.serving.predict.best_device", lambda: "cpu")
    main(["plan", *run, "--trainer.accelerator=cpu"])
    assert "activations" in capsys.readouterr().out
    quick = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--monitor.enabled=false"]
    main(["fit", *run, *quick, "--trainer.max_epochs=12", "--trainer.check_val_every_n_epoch=12"])
    assert "val/span_f1" in capsys.readouterr().out
    main(["fit", *run, *quick, "--trainer.max_epochs=6"])
    half, last = (f"runs/lopa/version_{number}/checkpoints/last.ckpt" for number in (1, 0))
    main(["fit", *run, *quick, "--trainer.max_epochs=12", "--ckpt_path", half])
    whole: Any = LoPALightningModule.load_from_checkpoint(last)
    resumed = LoPALightningModule.load_from_checkpoint(half.replace("_1", "_2"))
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, rtol=0, atol=0)

    main(["predict", *run, "--trainer.accelerator=cpu", "--ckpt_path", last, "--predictions.folder", "out"])
    stored = [json.loads(line) for line in Path("validation.jsonl").read_text().splitlines()]
    written = [json.loads(line) for line in Path("out/predictions.jsonl").read_text().splitlines()]
    assert [row["input"] for row in written] == [{"id": row["id"], "tokens": row["tokens"]} for row in stored]
    assert [row["gold"] for row in written] == [row["ner_tags"] for row in stored]
    assert all(len(row["labels"]) == len(row["gold"]) == len(row["probabilities"]) for row in written)
    pairs = [pair for row in written for pair in zip(row["labels"], row["gold"])]
    assert sum(a == b for a, b in pairs) / len(pairs) > 0.9

    answers = whole.predict([row["tokens"] for row in stored], batch_size=5)
    for answer, row in zip(answers, written):
        assert (answer["words"], answer["labels"]) == (row["input"]["tokens"], row["labels"])
        assert answer["probabilities"] == pytest.approx(row["probabilities"], abs=1e-5)
    capsys.readouterr()
    main(["predict", "--ckpt_path", last, "--file", "validation.jsonl"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["labels"] for line in lines] == [row["labels"] for row in written]
    assert lines[0]["input"] == stored[0]
    main(["predict", "--ckpt_path", last, "--text", "the great  film"])
    assert json.loads(capsys.readouterr().out)["words"] == ["the", "great", "film"]
    write("bad.jsonl", [{"tokens": ["a", ""]}])
    with pytest.raises(SystemExit):
        main(["predict", "--ckpt_path", last, "--file", "bad.jsonl"])
    assert "bad.jsonl: column 'tokens' has an empty word in row 1 (counted from 1)" in capsys.readouterr().err
    with pytest.raises(LoPAError, match=r"column 'tokens' has an empty word in row 1 \(counted from 0\)"):
        whole.predict([["a"], ["b", ""]])

    bundle = export_bundle(last, ["the great film"])
    bundle.save_pretrained("bundle")
    again: Any = LoPALightningModule.load_from_checkpoint("bundle")
    assert again.predict([["the", "great", "film"]]) == whole.predict([["the", "great", "film"]])
    assert bundle.rows[0]["labels"] == whole.predict("the great film")[0]["labels"]
    assert bundle.prompts is not None
    prompter = LoPAPrompter(bundle)
    for row in ("the great film", [["the", "great", "film"]], {"tokens": ["the", "great", "film"]}):
        torch.testing.assert_close(prompter(row), bundle.prompts, rtol=0, atol=1e-6)
    with pytest.raises(LoPAError, match="column 'tokens' has an empty word in row 0"):
        prompter([["a", ""]])


def test_loss_outputs_and_probabilities_are_those_of_each_words_state(tiny: Tiny) -> None:
    """Virtual tokens never count: the same by hand, for a text alone, from the backbone's states."""
    seed_everything(3)
    model: ClassificationModule = module(tiny("bert_base"), objective="head", task=None)
    data = connected(tiny("bert_base"), data_files={"validation": files(6)["validation"]})
    model._set_task(data.task)
    model.configure_model()
    model.eval()
    (batch,) = data.val_dataloader()[0]
    outputs = model(batch)
    net, losses = model._net(), []
    for number, row in enumerate(batch["input_ids"]):
        ids = row[batch["attention_mask"][number].bool()].unsqueeze(0)
        alone = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
        prompt = net.soft_prompt({name: value[number : number + 1] for name, value in batch.items()})[0]
        embedded = torch.cat([prompt, net.backbone.model.get_input_embeddings()(ids)], dim=1)
        hidden = net.backbone.body(inputs_embeds=embedded).last_hidden_state[0, prompt.shape[1] :]
        wanted = net.readout.linear(hidden)
        torch.testing.assert_close(outputs[number, : ids.shape[1]], wanted, rtol=1e-4, atol=1e-5)
        labels = batch["labels"][number, : ids.shape[1]]
        losses += [float(F.cross_entropy(wanted[at], labels[at])) for at in (labels != IGNORED).nonzero().flatten()]
        assert alone["input_ids"].shape[1] == (batch["attention_mask"][number]).sum()
    assert float(model.loss(outputs, batch)) == pytest.approx(sum(losses) / len(losses), abs=1e-4)
    assert int(model.loss_weight(outputs, batch)) == len(losses)


class UnlabelledDataModule(TextClassificationDataModule):
    """Words alone, of which nothing says what labels there are."""

    def load(self) -> DatasetDict:
        return DatasetDict({"test": Dataset.from_dict({"tokens": [["great", "film"], ["was"]]})})


class NamedDataModule(TextClassificationDataModule):
    """Labels are numbers, and the data set names them, as on the hub."""

    def load(self) -> DatasetDict:
        features = Features(
            {"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=LABELS))},
        )
        rows = {"tokens": [["great", "film"], ["was"]] * 4, "ner_tags": [[1, 2], [0]] * 4}
        split = Dataset.from_dict(rows, features=features)
        return DatasetDict({name: split for name in ("train", "validation", "test")})


def test_names_of_labels_are_taken_from_the_data_set(tiny: Tiny, tmp_path: Path) -> None:
    data = NamedDataModule(**OPTIONS)
    model = module(tiny("bert_base"), objective="head")
    run = trainer(tmp_path)
    run.fit(model, data)
    assert model.task is not None
    assert model.task.labels == LABELS
    rows = [row for batch in run.predict(model, data) for row in model.prediction_rows(batch)]
    named = data.named(0, sorted(rows, key=lambda row: row["index"]))
    assert [row["gold"] for row in named[:2]] == [["B-ART", "I-ART"], ["O"]]

    new = UnlabelledDataModule(**OPTIONS)
    found = [row for batch in run.predict(model, new) for row in model.prediction_rows(batch)]
    assert sorted(found, key=lambda row: row["index"])[0]["labels"] == named[0]["labels"]
    with pytest.raises(LoPAError, match="labels must name the classes: nothing in the data names those of column"):
        run.test(model, UnlabelledDataModule(**OPTIONS))


# What the documents say


def test_several_labels_by_the_lines_of_the_readme(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    (lines,) = (block for block in blocks("yaml", "lopa_lightning/data/README.md") if "multi_label" in block)
    Path("tags.yaml").write_text(lines)
    words = {"funny": "great", "sad": "bad", "long": "story"}
    tags = [[tag for bit, tag in enumerate(words) if number >> bit & 1] for number in range(8)] * 3
    write("train.jsonl", [{"text": " ".join(["it", *(words[tag] for tag in row)]), "tags": row} for row in tags])
    model = [f"--model.backbone.name={tiny('bert_base')}", "--trainer.accelerator=cpu", "--trainer.max_epochs=1"]
    config = ["--config", str(ROOT / "configs" / "own_csv.yaml"), "--config", "tags.yaml", *model]
    main(["plan", *config])
    main(["fit", *config])
    assert "val/exact_match" in capsys.readouterr().out
    module: Any = LoPALightningModule.load_from_checkpoint("runs/lopa/version_0/checkpoints/last.ckpt")
    assert set(module.predict("it was bad")[0]) == {"labels", "probabilities"}


def test_lines_of_python_have_the_labels_of_the_parser() -> None:
    rows = list(python_rows("class A:\n    def f(self):\n        self.x = os.path.join(a, g(b))\n"))
    assert [list(zip(row["tokens"], row["ner_tags"])) for row in rows] == [
        [
            *[("self", "B-TARGET"), (".", "I-TARGET"), ("x", "I-TARGET"), ("=", "O")],
            *[("os", "B-CALL"), (".", "I-CALL"), ("path", "I-CALL"), (".", "I-CALL"), ("join", "I-CALL"), ("(", "O")],
            *[("a", "O"), (",", "O"), ("g", "B-CALL"), ("(", "O"), ("b", "O"), (")", "O"), (")", "O")],
        ]
    ]


@pytest.mark.parametrize("row", [{"text": ["EU"]}, {"tokens": None}])
def test_a_row_without_its_words_is_left_to_the_check_of_rows(row: dict[str, Any]) -> None:
    assert word_rows(row, "tokens") is row

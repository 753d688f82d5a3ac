from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from lopa_lightning.data import GLUEDataModule
from lopa_lightning.data.glue import GLUE_TASKS
from lopa_lightning.data.template import Template
from lopa_lightning.errors import LoPAError
from tests.data.conftest import SpecOf, TokenizerOf
from tests.data.helpers import rows_of

# As on the hub: text columns, and class names in the order of their indices.
COLUMNS = {
    "cola": ["sentence"],
    "sst2": ["sentence"],
    "mrpc": ["sentence1", "sentence2"],
    "qqp": ["question1", "question2"],
    "stsb": ["sentence1", "sentence2"],
    "mnli": ["premise", "hypothesis"],
    "qnli": ["question", "sentence"],
    "rte": ["sentence1", "sentence2"],
    "wnli": ["sentence1", "sentence2"],
}
CLASSES = {
    "cola": ["unacceptable", "acceptable"],
    "sst2": ["negative", "positive"],
    "mrpc": ["not_equivalent", "equivalent"],
    "qqp": ["not_duplicate", "duplicate"],
    "stsb": [],
    "mnli": ["entailment", "neutral", "contradiction"],
    "qnli": ["entailment", "not_entailment"],
    "rte": ["entailment", "not_entailment"],
    "wnli": ["not_entailment", "entailment"],
}
METRICS = {"cola": ["matthews"], "mrpc": ["accuracy", "f1"], "qqp": ["accuracy", "f1"], "stsb": ["pearson", "spearman"]}
SUBMISSIONS = {
    "cola": ["CoLA"],
    "sst2": ["SST-2"],
    "mrpc": ["MRPC"],
    "qqp": ["QQP"],
    "stsb": ["STS-B"],
    "mnli": ["MNLI-m", "MNLI-mm"],
    "qnli": ["QNLI"],
    "rte": ["RTE"],
    "wnli": ["WNLI"],
}
MATCHES = ["matched", "mismatched"]

every_task = pytest.mark.parametrize("task", COLUMNS)


def splits_of(task: str) -> list[str]:
    if task == "mnli":
        return ["train", *(f"{split}_{match}" for split in ("validation", "test") for match in MATCHES)]
    return ["train", "validation", "test"]


def sentence(column: str, split: str, i: int) -> str:
    return f"{column.rstrip('12')} {split} {i}"


def label(task: str, split: str, i: int) -> int | float:
    if split.startswith("test"):
        return -1
    return i * 0.75 if task == "stsb" else i % len(CLASSES[task])


@pytest.fixture(scope="module")
def glue(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A GLUE of seven rows a split, laid out as the hub's."""
    folder = tmp_path_factory.mktemp("glue")
    header = ["---", "configs:"]
    for task, columns in COLUMNS.items():
        header += [f"- config_name: {task}", "  data_files:"]
        kind = ClassLabel(names=CLASSES[task]) if CLASSES[task] else Value("float32")
        features = Features({**{name: Value("string") for name in columns}, "label": kind, "idx": Value("int32")})
        for split in splits_of(task):
            header += [f"  - split: {split}", f"    path: {task}/{split}-*"]
            stored = {name: [sentence(name, split, i) for i in range(7)] for name in columns}
            stored |= {"label": [label(task, split, i) for i in range(7)], "idx": list(range(7))}
            (folder / task).mkdir(exist_ok=True)
            Dataset.from_dict(stored, features).to_parquet(folder / task / f"{split}-00000-of-00001.parquet")
    (folder / "README.md").write_text("\n".join([*header, "---", ""]))
    return str(folder)


def prepared(glue: str, task: str, text_spec: SpecOf, *stages: str, **options: Any) -> GLUEDataModule:
    data = GLUEDataModule(task, path=glue, **options)
    data.connect(text_spec("bert", "head" if task == "stsb" else "masked_lm"))
    for stage in stages:
        data.setup(stage)
    return data


# The table


def test_there_are_nine_tasks() -> None:
    assert set(GLUE_TASKS) == set(COLUMNS)


@every_task
def test_labels_are_the_data_sets_own(task: str) -> None:
    made = GLUEDataModule(task).task
    assert made is not None
    assert made.labels == CLASSES[task]
    assert made.is_regression == (task == "stsb")


@every_task
def test_each_label_has_a_word_of_its_own(task: str) -> None:
    made = GLUEDataModule(task).task
    assert made is not None
    if task == "stsb":
        assert made.words is None
    else:
        assert made.words is not None
        assert len(set(made.words)) == len(CLASSES[task])


@pytest.mark.parametrize("task", ["mrpc", "qqp", "mnli", "qnli", "rte", "wnli"])
def test_yes_means_that_it_is_so(task: str) -> None:
    made = GLUEDataModule(task).task
    assert made is not None
    assert made.words is not None
    meaning = dict(zip(made.words, made.labels))
    assert meaning["Yes"] in ("entailment", "equivalent", "duplicate")
    assert meaning["No"] in ("not_entailment", "contradiction", "not_equivalent", "not_duplicate")
    assert meaning.get("Maybe", "neutral") == "neutral"


def test_single_sentences_are_judged_by_an_adjective() -> None:
    tasks = [GLUEDataModule(task).task for task in ("cola", "sst2")]
    assert [dict(zip(task.words or [], task.labels)) for task in tasks if task is not None] == [
        {"incorrect": "unacceptable", "correct": "acceptable"},
        {"terrible": "negative", "great": "positive"},
    ]


@every_task
def test_templates_read_all_columns_and_ask_once(task: str) -> None:
    data = GLUEDataModule(task)
    assert data.template.columns == COLUMNS[task]
    assert len(data.template.pieces) == len(COLUMNS[task])
    assert isinstance(data.causal_template, Template)
    assert sorted(data.causal_template.columns) == sorted(COLUMNS[task])
    assert data.template.has_mask
    assert data.causal_template.pieces[0].endswith("{mask}")


@every_task
def test_metrics_are_the_official_ones(task: str) -> None:
    made = GLUEDataModule(task).task
    assert made is not None
    assert made.official_metrics == METRICS.get(task, ["accuracy"])


@every_task
def test_mnli_alone_has_two_evaluation_sets(task: str) -> None:
    data = GLUEDataModule(task)
    assert data.task is not None
    assert data.task.suffixes == (["", "_mismatched"] if task == "mnli" else [""])
    validation = ["validation_matched", "validation_mismatched"] if task == "mnli" else ["validation"]
    assert data.splits_of("train") == ["train"]
    assert data.splits_of("val") == data.splits_of("test") == validation
    assert data.splits_of("predict") == [name.replace("validation", "test") for name in validation]


def test_one_part_of_the_training_split_takes_the_place_of_both_mnli_validation_sets(
    glue: str, text_spec: SpecOf
) -> None:
    data = prepared(glue, "mnli", text_spec, "fit", "test", validation_from_train=0.5)
    assert data.task is not None
    assert data.task.suffixes == [""]
    assert data.splits_of("val") == ["train"]
    assert [len(data.val_dataloader()), len(data.test_dataloader())] == [1, 1]
    rows = len(data.raw()["train"])
    assert [len(data.datasets[role][0]) for role in ("train", "val")] == [rows - -(-rows // 2), -(-rows // 2)]


def test_an_unknown_task_is_refused_with_those_there_are() -> None:
    with pytest.raises(LoPAError, match=r"one of cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte, wnli, got 'sst-2'$"):
        GLUEDataModule("sst-2")


# Batches


def rendered(tokenizer: TokenizerOf, task: str, split: str) -> list[list[int]]:
    mask = {"cola": " . This is [MASK] .", "sst2": " . It was [MASK] .", "stsb": ""}.get(task, " [MASK]")
    *first, last = COLUMNS[task]
    texts = [[f"{sentence(last, split, i)}{mask}" for i in range(7)]]
    texts = [[sentence(name, split, i) for i in range(7)] for name in first] + texts
    ids: list[list[int]] = tokenizer("bert")(*texts)["input_ids"]
    return ids


@pytest.mark.sampled(3)
@every_task
def test_every_task_gives_batches_for_every_stage(
    glue: str, tokenizer: TokenizerOf, text_spec: SpecOf, task: str
) -> None:
    data = prepared(glue, task, text_spec, "fit", "validate", "test", "predict")
    train, *rest = splits_of(task)
    validation, test = rest[: len(rest) // 2], rest[len(rest) // 2 :]
    read = [
        (train, data.train_dataloader()),
        *zip(validation, data.val_dataloader(), strict=True),
        *zip(validation, data.test_dataloader(), strict=True),
        *zip(test, data.predict_dataloader(), strict=True),
    ]
    for split, loader in read:
        rows = rows_of(loader)
        assert [row["index"] for row in rows] == list(range(7))
        assert [row["input_ids"] for row in rows] == rendered(tokenizer, task, split)
        if split in test:
            assert not any("labels" in row for row in rows)
        else:
            assert [row["labels"] for row in rows] == [label(task, split, i) for i in range(7)]


def test_a_test_split_without_labels_cannot_be_evaluated(glue: str, text_spec: SpecOf) -> None:
    data = prepared(glue, "rte", text_spec)
    data.row = replace(data.row, eval_splits=(("", "test"),))
    with pytest.raises(LoPAError, match="labels '-1' beside the allowed 'entailment', 'not_entailment'"):
        data.setup("validate")


def test_a_template_of_ones_own_takes_the_place_of_the_tables(glue: str, text_spec: SpecOf) -> None:
    data = prepared(glue, "sst2", text_spec, "validate", template=["Just {mask} ! {sentence}"])
    assert data.template.pieces == ("Just {mask} ! {sentence}",)
    assert data.causal_template is None  # the table's would be read by causal language models in its place
    both = GLUEDataModule("sst2", template=["Just {mask} ! {sentence}"], causal_template="{sentence} : {mask}")
    assert both.causal_template is not None
    assert both.causal_template.pieces == ("{sentence} : {mask}",)


def test_an_empty_question_is_a_question(tmp_path: Path, text_spec: SpecOf) -> None:
    for split in ("train", "validation"):
        stored = {"question1": ["why", ""], "question2": ["", "how"], "label": [0, 1], "idx": [0, 1]}
        features = Features(
            {
                **{"question1": Value("string"), "question2": Value("string")},
                **{"label": ClassLabel(names=CLASSES["qqp"]), "idx": Value("int32")},
            }
        )
        Dataset.from_dict(stored, features).to_parquet(tmp_path / "qqp" / f"{split}.parquet")
    (tmp_path / "README.md").write_text("---\nconfigs:\n- config_name: qqp\n  data_dir: qqp\n---\n")
    data = prepared(str(tmp_path), "qqp", text_spec, "fit")
    assert [row["labels"] for row in rows_of(data.train_dataloader())] == [0, 1]


# Submissions


def predicted(task: str, rows: int) -> GLUEDataModule:
    """A data module whose test sets have that many rows."""
    data = GLUEDataModule(task)
    data.datasets["predict"] = [Dataset.from_dict({"index": list(range(rows))}) for _ in SUBMISSIONS[task]]
    return data


@every_task
def test_submissions_have_the_servers_file_names(task: str) -> None:
    data = predicted(task, rows=1)
    rows = [{"index": 0, "label": CLASSES[task][0]} if CLASSES[task] else {"index": 0, "value": 1.5}]
    names = [data.submission(i, rows)[0] for i in range(len(SUBMISSIONS[task]))]
    assert names == [f"{name}.tsv" for name in SUBMISSIONS[task]]


@pytest.mark.parametrize("task", ["cola", "sst2", "mrpc", "qqp", "wnli"])
def test_some_submissions_name_labels_by_index(task: str) -> None:
    rows = [{"index": i, "label": CLASSES[task][answer]} for i, answer in enumerate([1, 0, 1])]
    _, content = predicted(task, len(rows)).submission(0, rows)
    assert content == "index\tprediction\n0\t1\n1\t0\n2\t1\n"


@pytest.mark.parametrize("task", ["mnli", "qnli", "rte"])
def test_entailment_is_submitted_by_name(task: str) -> None:
    rows = [{"index": i, "label": CLASSES[task][answer]} for i, answer in enumerate([1, 0])]
    for i, _ in enumerate(SUBMISSIONS[task]):
        _, content = predicted(task, len(rows)).submission(i, rows)
        assert content == f"index\tprediction\n0\t{CLASSES[task][1]}\n1\tentailment\n"


def test_similarity_is_submitted_as_a_number() -> None:
    rows = [{"index": 0, "value": 2.5}, {"index": 1, "value": 0.125}]
    _, content = predicted("stsb", 2).submission(0, rows)
    read = list(csv.DictReader(io.StringIO(content), delimiter="\t"))
    assert [(row["index"], float(row["prediction"])) for row in read] == [("0", 2.5), ("1", 0.125)]


def test_a_part_of_the_rows_is_no_submission() -> None:
    rows = [{"index": 1, "label": "entailment"}]
    with pytest.warns(UserWarning, match="no file for the GLUE server: 1 of 2 rows"):
        assert predicted("rte", 2).submission(0, rows) is None


# The real data


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize(
    ("task", "stage", "counts"),
    [
        ("rte", "fit", [("train", {0: 1249, 1: 1241}), ("validation", {0: 146, 1: 131})]),
        ("sst2", "validate", [("validation", {0: 428, 1: 444})]),
    ],
)
def test_real_splits_have_the_published_sizes_and_labels(
    real_data: Callable[[str], str], text_spec: SpecOf, task: str, stage: str, counts: list[tuple[str, dict[int, int]]]
) -> None:
    folder = real_data("nyu-mll/glue")
    data = prepared(folder, task, text_spec, stage)
    loaders = [data.train_dataloader(), *data.val_dataloader()] if stage == "fit" else data.val_dataloader()
    for (split, expected), loader in zip(counts, loaders, strict=True):
        (file,) = Path(folder, task).glob(f"{split}-*.parquet")
        stored = pq.read_table(file)["label"].to_pylist()
        read = [row["labels"] for row in rows_of(loader)]
        assert read == stored
        assert Counter(read) == expected

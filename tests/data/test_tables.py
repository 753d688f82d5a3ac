"""Tables as people have them: encodings, delimiters, compression, empty cells, duplicates, rare labels."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from lopa_lightning import CompletionDataModule
from lopa_lightning.backbones.text_spec import TextSpec
from lopa_lightning.data.holdout import held_out
from tests.data.conftest import SpecOf
from tests.data.helpers import labelled, prepared, rows_of, texts_of, write
from tests.refusals import Refused

TEXTS = ["café crème", "it's “good”", "007"]
LABELS = ["good", "bad", "good"]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def spec(text_spec: SpecOf) -> TextSpec:
    return text_spec("gpt2")


def table(sep: str = ",") -> str:
    return f"text{sep}label\n" + "".join(f"{text}{sep}{label}\n" for text, label in zip(TEXTS, LABELS))


def packed(name: str, content: bytes) -> str:
    """Writes a file, compressed as its name says."""
    if name.endswith(".zip"):
        with zipfile.ZipFile(name, "w") as archive:
            archive.writestr(name.removesuffix(".zip"), content)
    else:
        pack: Any = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}.get(Path(name).suffix, bytes)
        Path(name).write_bytes(pack(content))
    return name


def read(spec: TextSpec, name: str, **options: Any) -> list[str]:
    data = prepared(spec, "test", data_files={"test": name}, **options)
    loader = data.test_dataloader()[0]
    assert [row["labels"] for row in rows_of(loader)] == [int(label == "good") for label in LABELS]
    return texts_of(data, loader)


@pytest.mark.sampled(8)
@pytest.mark.parametrize("ending", ["", ".gz", ".bz2", ".xz", ".zip"])
@pytest.mark.parametrize(
    ("kind", "sep", "encoding", "reader"),
    [
        (".csv", ",", "utf-8-sig", None),
        (".tsv", "\t", "utf-8", None),
        (".csv", ";", "cp1252", {"sep": ";", "encoding": "cp1252"}),
        (".csv", "|", "utf-16", {"sep": "|", "encoding": "utf-16"}),
        (".csv", "\t", "utf-8", {"sep": "\t"}),
    ],
)
def test_delimiters_encodings_and_compression(
    kind: str, sep: str, encoding: str, reader: Any, ending: str, spec: TextSpec
) -> None:
    name = packed(f"a{kind}{ending}", table(sep).encode(encoding))
    assert read(spec, name, reader=reader) == TEXTS
    assert read(spec, packed(name, table(sep).replace("007", "008").encode(encoding)), reader=reader)[2] == "008"


@pytest.mark.parametrize("ending", ["", ".gz", ".zip"])
def test_json_in_another_encoding(ending: str, spec: TextSpec) -> None:
    lines = "".join(f'{{"text": "{text}", "label": "{label}"}}\n' for text, label in zip(TEXTS, LABELS))
    name = packed(f"a.jsonl{ending}", lines.encode("cp1252"))
    assert read(spec, name, reader={"encoding": "cp1252"}) == TEXTS


@pytest.mark.parametrize(
    ("encoding", "reader", "message"),
    [
        ("cp1252", None, "a byte 0xe9 that is not UTF-8; set reader: {encoding: latin-1}, or what it is"),
        ("utf-16", None, "a byte 0xff that is not UTF-8; set reader: {encoding: utf-16}, or what it is"),
        ("utf-8", {"encoding": "latin-1"}, "it is in UTF-8, and not in latin-1; leave encoding out of reader"),
        ("utf-8", {"encoding": "utf-16-le"}, "leave encoding out of reader"),
        ("cp1252", {"encoding": "latin-1"}, "as latin-1 it has the control character U+0093; set reader: {encoding"),
        ("utf-8", {"encoding": "klingon"}, "unknown encoding: klingon"),
        (
            "utf-8",
            {"separator": ";"},
            "an option in reader for .csv must be one of sep, encoding, quotechar, escapechar",
        ),
        (
            "utf-8",
            {"sep": ";"},
            "there are text,label; of a file whose columns are parted otherwise, set reader: {sep: ",
        ),
    ],
)
def test_what_would_be_read_wrongly_is_refused_with_the_option_to_set(
    encoding: str, reader: Any, message: str, spec: TextSpec, refused: Refused
) -> None:
    packed("a.csv", table().encode(encoding))
    with refused(message):
        prepared(spec, "test", data_files={"test": "a.csv"}, reader=reader)


def test_json_of_wide_characters_is_refused(spec: TextSpec, refused: Refused) -> None:
    packed("a.jsonl", '{"text": "a"}\n'.encode("utf-16"))
    with refused("a.jsonl' cannot be read: JSON must not be in utf-16; save it in UTF-8"):
        prepared(spec, "test", data_files={"test": "a.jsonl"}, reader={"encoding": "utf-16"})


def test_a_folders_files_are_read_by_the_same_options(spec: TextSpec) -> None:
    Path("folder").mkdir()
    packed("folder/test.csv", table(";").encode("cp1252"))
    data = prepared(spec, "test", path="folder", reader={"sep": ";", "encoding": "cp1252"})
    assert texts_of(data, data.test_dataloader()[0])[:2] == TEXTS[:2]


# Empty cells


def test_rows_with_an_empty_cell_are_dropped_and_counted(spec: TextSpec) -> None:
    Path("a.csv").write_text("text,label\none,good\n,bad\n  ,good\nfour,\nfive,bad\n")
    with pytest.warns(UserWarning, match=r"test \(test\): 3 of 5 rows were dropped: they have an empty cell"):
        data = prepared(spec, "test", data_files={"test": "a.csv"}, drop_empty=True)
    rows = rows_of(data.test_dataloader()[0])
    assert [(row["index"], row["labels"]) for row in rows] == [(0, 1), (4, 0)]
    with pytest.warns(UserWarning, match=r"predict \(test\): 2 of 5 rows were dropped"):
        data = prepared(spec, "predict", data_files={"test": "a.csv"}, drop_empty=True)
    assert [row["index"] for row in rows_of(data.predict_dataloader()[0])] == [0, 3, 4]
    named = data.named(0, [{"index": 3, "label": "good"}, {"index": 4, "label": "good"}])
    assert named[0] == {"index": 3, "input": {"text": "four"}, "gold": None, "label": "good"}
    assert named[1] == {"index": 4, "input": {"text": "five"}, "gold": "bad", "label": "good"}


@pytest.mark.parametrize(
    ("labels", "column", "gold"),
    [
        (["bad", "good"], ["1", ""], ["good", None]),
        (["bad", "good"], ["1", "0"], ["good", "bad"]),
        ([], ["3", "4"], [3, 4]),
    ],
    ids=["numbers and an empty cell, read as floats", "numbers", "regression on whole numbers"],
)
def test_gold_is_what_is_predicted(labels: list[str], column: list[str], gold: list[Any], spec: TextSpec) -> None:
    Path("a.csv").write_text("text,label\n" + "".join(f"film,{cell}\n" for cell in column))
    files: Any = {"data_files": {"test": "a.csv"}, "label_values": [0, 1] if labels else []}
    data = prepared(spec, "predict", labels=labels, **files)
    named = data.named(0, [{"index": 0}, {"index": 1}])
    assert [row["gold"] for row in named] == gold
    assert [type(row["gold"]) for row in named] == list(map(type, gold))


def test_a_text_without_a_label_is_kept_where_there_may_be_several(spec: TextSpec) -> None:
    rows = [{"text": text, "label": labels} for text, labels in (("a", ["good"]), ("b", []), ("c", None), ("", []))]
    data = prepared(spec, "test", data_files={"test": write("a.jsonl", rows)}, multi_label=True, drop_empty=True)
    assert [(row["index"], row["labels"]) for row in rows_of(data.test_dataloader()[0])] == [(0, [0, 1]), (1, [0, 0])]


@pytest.mark.parametrize("labels", [["1", "2"], []], ids=["classes", "regression"])
def test_a_missing_label_is_named_by_its_row(labels: list[str], spec: TextSpec, refused: Refused) -> None:
    Path("a.csv").write_text("text,label\none,1\ntwo,\nthree,2\n")
    with refused("column 'label' ", "in row 2 (counted from 1)"):
        prepared(spec, "test", data_files={"test": "a.csv"}, labels=labels)
    with pytest.warns(UserWarning, match="1 of 3 rows were dropped"):
        data = prepared(spec, "test", data_files={"test": "a.csv"}, labels=labels, drop_empty=True)
    assert [row["labels"] for row in rows_of(data.test_dataloader()[0])] == ([1, 2] if not labels else [0, 1])


def test_shots_are_not_drawn_from_rows_without_a_label(spec: TextSpec) -> None:
    rows = labelled([f"film {n}" for n in range(30)], ["good", "bad", None])
    files: Any = {"train": write("a.jsonl", rows), "validation": write("b.jsonl", labelled(["x", "y"], ["good"]))}
    data = prepared(spec, data_files=files, shots_per_label=10, drop_empty=True)
    assert Counter(row["labels"] for row in rows_of(data.train_dataloader())) == {0: 10, 1: 10}


@pytest.mark.parametrize("drawn", [{"shots_per_label": 8}, {"max_train_examples": 16}], ids=str)
def test_examples_are_drawn_from_rows_that_are_kept(drawn: dict[str, int], spec: TextSpec) -> None:
    rows = labelled([f"film {n}" if n % 3 else "" for n in range(24)], ["good", "bad"])
    files: Any = {"train": write("a.jsonl", rows), "validation": write("b.jsonl", labelled(["x", "y"], ["good"]))}
    data = prepared(spec, data_files=files, drop_empty=True, **drawn)
    assert Counter(row["labels"] for row in rows_of(data.train_dataloader())) == {0: 8, 1: 8}


def test_completions_with_an_empty_cell(spec: TextSpec, refused: Refused) -> None:
    rows = [{"prompt": f"the film {n}", "completion": "was good"} for n in range(12)]
    rows[7] = {"prompt": "", "completion": "was"}
    rows[9] = {"prompt": "a film", "completion": None}  # type: ignore[dict-item]
    files: Any = {"train": write("a.jsonl", rows)}
    for name, kept, message in (
        ("b.jsonl", rows[:9], "column 'prompt' is empty in row 8 (counted from 1)"),
        ("c.jsonl", rows[:7] + rows[8:], "train (train): row 9 (counted from 1): it has no completion to learn"),
    ):
        data = connected(spec, data_files={"train": write(name, kept)}, splits={"val": "train"})
        with refused(message, rows=True):
            data.setup("fit")
    data = connected(spec, data_files=files, drop_empty=True)
    with pytest.warns(UserWarning, match=r"\d of \d+ rows were dropped: they have an empty cell"):
        data.setup("fit")
    kept = len(data.datasets["train"][0]) + len(data.datasets["val"][0])
    assert kept == 10


def connected(spec: TextSpec, **options: Any) -> CompletionDataModule:
    data = CompletionDataModule(**options)
    data.connect(spec)
    return data


# Splits


def test_rare_labels_are_validated_on() -> None:
    classes = ["rare"] * 6 + ["common"] * 398
    for seed in range(5):
        training, validation = held_out(404, 0.1, seed, classes)
        assert Counter(classes[row] for row in validation) == {"rare": 1, "common": 40}
        assert sorted([*training, *validation]) == list(range(404))
        assert np.array_equal(validation, held_out(404, 0.1, seed, classes)[1])
    assert not np.array_equal(held_out(404, 0.1, 0, classes)[1], held_out(404, 0.1, 1, classes)[1])


def test_each_class_is_held_out_by_its_share_and_never_all_of_it() -> None:
    random = np.random.default_rng(0)
    for _ in range(50):
        count, share = int(random.integers(2, 120)), float(random.choice([0.05, 0.1, 0.3]))
        classes = random.integers(0, 5, count).tolist()
        training, validation = held_out(count, share, 0, classes)
        assert sorted([*training, *validation]) == list(range(count))
        assert len(validation) == int(np.ceil(share * count))
        taken, sizes = Counter(classes[row] for row in validation), Counter(classes)
        assert all(abs(taken[label] - share * size) <= 1 for label, size in sizes.items())


@pytest.mark.parametrize(("count", "share"), [(404, 0.1), (10, 0.25), (29, 0.07)])
def test_without_classes_the_draw_is_that_of_datasets(count: int, share: float) -> None:
    parts = Dataset.from_dict({"row": list(range(count))}).train_test_split(test_size=share, seed=3)
    training, validation = held_out(count, share, 3)
    assert parts["train"]["row"][:] == training.tolist()
    assert parts["test"]["row"][:] == validation.tolist()


def test_validation_cut_from_training_has_each_label(spec: TextSpec) -> None:
    labels = ["good"] * 57 + ["bad"] * 3
    files: Any = {"train": write("train.csv", labelled([f"film {n}" for n in range(60)], labels))}
    for seed in range(3):
        data = prepared(spec, data_files=files, subset_seed=seed)
        assert Counter(row["labels"] for row in rows_of(data.val_dataloader()[0])) == {1: 5, 0: 1}


def test_examples_that_are_trained_on_are_told(spec: TextSpec, recwarn: pytest.WarningsRecorder) -> None:
    rows = labelled(["one", "two", "three", "four"], ["good", "bad"])
    files: Any = {
        "train": write("train.csv", rows),
        "validation": write("dev.csv", labelled(["five", "two", "one"], ["bad"])),
        "test": write("test.csv", labelled(["six", "four"], ["bad"])),
    }
    prepared(spec, data_files=files)
    said = [str(each.message) for each in recwarn if "training data" in str(each.message)]
    assert said == [
        "val (validation): 2 of 3 examples are in the training data, too, such as 'two'",
        "test (test): 1 of 2 examples are in the training data, too, such as 'four'",
    ]
    recwarn.clear()
    prepared(spec, data_files={"train": "train.csv", "validation": write("d.csv", labelled(["five"], ["bad"]))})
    assert not [each for each in recwarn if "training data" in str(each.message)]


def test_a_file_to_predict_needs_no_labels_and_may_have_other_columns(spec: TextSpec) -> None:
    files: Any = {
        "train": write("train.csv", labelled([f"film {n}" for n in range(20)], ["good", "bad"])),
        "test": write("test.csv", labelled(["a story"], ["good"])),
        "predict": write("new.jsonl", [{"id": 7, "text": "a new film"}]),
    }
    data = prepared(spec, "predict", data_files=files)
    assert texts_of(data, data.predict_dataloader()[0]) == ["a new film"]
    assert data.named(0, [{"index": 0, "label": "bad"}])[0]["input"] == {"id": 7, "text": "a new film"}
    data = prepared(spec, "predict", data_files=files, splits={"predict": "test"})
    assert texts_of(data, data.predict_dataloader()[0]) == ["a story"]


# Chats


def test_messages_are_recognised(spec: TextSpec) -> None:
    chat = [{"role": "user", "content": "the film ?"}, {"role": "assistant", "content": "good"}]
    files: Any = {"train": write("a.jsonl", [{"messages": chat}])}
    data = connected(spec, data_files=files)
    assert data.chat_column == "messages"
    files = {"train": write("b.jsonl", [{"messages": chat, "prompt": "x", "completion": "y"}])}
    assert connected(spec, data_files=files).chat_column is None

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lopa_lightning.backbones.text_spec import TextSpec
from lopa_lightning.data import TextClassificationDataModule
from lopa_lightning.errors import LoPAError
from tests.data.conftest import SpecOf
from tests.data.helpers import labelled, prepared, write

ROWS = labelled(["a great film", "a terrible story", "it was good", "No"], ["good", "bad"])


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def spec(text_spec: SpecOf) -> TextSpec:
    return text_spec()


@pytest.fixture
def files() -> dict[str, str | list[str]]:
    return {"train": write("train.parquet", ROWS), "validation": write("dev.parquet", ROWS)}


def refused(message: str) -> Any:
    return pytest.raises(LoPAError, match=re.escape(message))


# Columns


def test_a_missing_text_column(spec: TextSpec, files: Any) -> None:
    with refused("train (train): no column body; there are text, label"):
        prepared(spec, data_files=files, text_columns=["text", "body"])


def test_a_missing_label_column(spec: TextSpec, files: Any) -> None:
    with refused("train (train): no column 'class' with labels; there are text, label"):
        prepared(spec, data_files=files, label_column="class")


# Labels


def test_an_unknown_label(spec: TextSpec, files: Any) -> None:
    files["validation"] = write("dev.parquet", [*ROWS, {"text": "so", "label": "meh"}])
    with refused("val (validation): column 'label' has labels 'meh' beside the allowed 'bad', 'good'"):
        prepared(spec, data_files=files)


def test_a_missing_label(spec: TextSpec, files: Any) -> None:
    files["validation"] = write("dev.parquet", [*ROWS, {"text": "so", "label": None}])
    with refused("val (validation): column 'label' has labels 'a missing label' beside the allowed 'bad', 'good'"):
        prepared(spec, data_files=files)


def test_of_many_unknown_labels_a_few_are_shown(spec: TextSpec) -> None:
    rows = labelled(["a"] * 60, list(range(20)))
    with refused("has labels '0', '1', '10', '11', '12' ... beside the allowed"):
        prepared(spec, data_files={"train": write("train.parquet", rows)})


@pytest.mark.parametrize(("stored", "shown"), [(["high", "low"], "'high' in row 1, 2"), ([1.5, None], "None in row 2")])
def test_a_regression_label_that_is_no_number(spec: TextSpec, stored: list[Any], shown: str) -> None:
    files = {"test": write("test.parquet", labelled(["a", "b"], stored))}
    with refused(f"test (test): column 'label' must hold numbers, got {shown}"):
        prepared(spec, "test", data_files=files, labels=[])


@pytest.mark.parametrize("stored", [float("nan"), float("inf")])
def test_a_regression_label_that_is_not_finite(spec: TextSpec, stored: float) -> None:
    files = {"test": write("test.parquet", labelled(["a", "b"], [1.0, stored]))}
    with refused("test (test): column 'label' must hold"):
        prepared(spec, "test", data_files=files, labels=[])


# Texts


@pytest.mark.parametrize("empty", ["", " \n\t", None])
def test_an_empty_text_is_named_by_its_row(spec: TextSpec, files: Any, empty: str | None) -> None:
    rows = [*ROWS, {"text": empty, "label": "good"}, ROWS[0], {"text": empty, "label": "bad"}]
    files["validation"] = write("dev.parquet", rows)
    with refused("val (validation): column 'text' is empty in row 5, 7 (counted from 1)"):
        prepared(spec, data_files=files)


def test_of_many_empty_texts_five_are_named(spec: TextSpec) -> None:
    files = {"test": write("test.parquet", labelled([""] * 9, ["good"]))}
    with refused("column 'text' is empty in row 1, 2, 3, 4, 5 ... (counted from 1)"):
        prepared(spec, "predict", data_files=files)


def test_an_empty_field_in_a_csv_is_an_empty_text(spec: TextSpec) -> None:
    files = {"test": write("test.csv", [*ROWS, {"text": "", "label": "good"}])}
    with refused("column 'text' is empty in row 5 (counted from 1)"):
        prepared(spec, "predict", data_files=files)


def test_an_empty_text_is_named_by_the_files_row_where_validation_is_cut_off(spec: TextSpec) -> None:
    rows = labelled(["a film"] * 40, ["good", "bad"])
    rows[17]["text"] = ""
    with refused("is empty in row 18 (counted from 1)"):
        prepared(spec, data_files={"train": write("train.parquet", rows)})


# Files and splits


def test_a_missing_file(spec: TextSpec, files: Any) -> None:
    with refused("no such regular file: nowhere.parquet"):
        prepared(spec, data_files={**files, "test": "nowhere.parquet"})


@pytest.mark.parametrize(
    ("names", "shown"),
    [(["a.csv", "b.jsonl"], ".csv, .jsonl"), (["a.csv", "b.tsv"], ".csv, .tsv"), (["a.xlsx"], ".xlsx")],
)
def test_files_of_mixed_or_unknown_endings(spec: TextSpec, names: list[str], shown: str) -> None:
    for name in names:
        write(name, ROWS)
    with refused(f"must all be of one of .csv, .tsv, .txt, .json, .jsonl, .parquet; got {shown}"):
        prepared(spec, data_files={"train": names})


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.csv", ""), ("a.jsonl", ""), ("a.jsonl", '{"text": "a film", "lab'), ("a.parquet", "text,label")],
    ids=["empty csv", "empty jsonl", "broken jsonl", "no parquet"],
)
def test_a_file_that_cannot_be_read(spec: TextSpec, name: str, content: str) -> None:
    Path(name).write_text(content)
    with refused(name):
        prepared(spec, data_files={"train": name})


@pytest.mark.parametrize("name", ["dev.csv", "dev.parquet"])
def test_a_split_without_rows(spec: TextSpec, name: str) -> None:
    if name.endswith("csv"):
        Path(name).write_text("text,label\n")
    else:
        pq.write_table(pa.table({"text": pa.array([], pa.string()), "label": pa.array([], pa.string())}), name)
    train = write(name.replace("dev", "train"), ROWS)
    with refused("validation"):
        prepared(spec, data_files={"train": train, "validation": name})


def test_a_split_that_is_not_there(spec: TextSpec, files: Any) -> None:
    with refused("no split 'dev' for val; there are train, validation"):
        prepared(spec, data_files=files, splits={"val": "dev"})
    with refused("no split 'test' for predict; there are train, validation"):
        prepared(spec, "predict", data_files=files)


@pytest.mark.parametrize("name", ["val", "dev", "valid", "eval"])
def test_a_validation_file_by_another_name_is_not_passed_over(spec: TextSpec, files: Any, name: str) -> None:
    given = {"train": files["train"], name: files["validation"]}
    with refused(f"no split 'validation', and {name} would not be read: say splits: {{val: {name}}}, or"):
        prepared(spec, data_files=given)
    assert prepared(spec, data_files=given, splits={"val": name}).splits_of("val") == [name]
    held_out = prepared(spec, data_files=given, splits={"val": "train"})  # a part of it
    assert len(held_out.datasets["val"][0]) < len(held_out.datasets["train"][0])


def test_a_folder_that_is_not_there() -> None:
    with refused("no data found for 'no/such/folder'"):
        TextClassificationDataModule(path="no/such/folder", labels=[]).raw()


def test_a_config_that_is_not_there() -> None:
    write("folder/train.csv", ROWS)
    Path("folder/README.md").write_text("---\nconfigs:\n- config_name: long\n  data_files: train.csv\n---\n")
    with refused("the data in 'folder' cannot be read: BuilderConfig 'short' not found. Available: ['long']"):
        TextClassificationDataModule(path="folder", name="short", labels=[]).raw()


# Arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data_files": None}, "give either path or data_files, got path=None and data_files=None"),
        ({"path": "x"}, "give either path or data_files, got path='x'"),
        ({"max_train_examples": 2, "shots_per_label": 2}, "give max_train_examples or shots_per_label, not both"),
        ({"max_train_examples": 0}, "max_train_examples must be at least 1, got 0"),
        ({"shots_per_label": -1}, "shots_per_label must be at least 1, got -1"),
        ({"validation_fraction": 0.0}, "validation_fraction must be between 0 and 1, got 0.0"),
        ({"validation_fraction": 1.0}, "validation_fraction must be between 0 and 1, got 1.0"),
        ({"label_values": ["0"]}, "one label value for each label, got ['0'] for ['bad', 'good']"),
        ({"label_values": ["0", "0"]}, "['0', '0']"),
        ({"splits": {"dev": "train"}}, "splits names dev; the roles are train, val, test, predict"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"eval_batch_size": 0}, "eval_batch_size must be at least 1, got 0"),
        ({"truncation_side": "rigth"}, "truncation_side must be one of left, right, got 'rigth'"),
        ({"padding_side": "rigth"}, "padding_side must be one of left, right, got 'rigth'"),
        ({"labels": ["good"]}, "labels must be at least two different names"),
        ({"template": ["It was {mask}"]}, "template must be one or two pieces"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_arguments_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with refused(message):
        TextClassificationDataModule(**{"data_files": {"train": "a.csv"}, "labels": ["bad", "good"], **options})


def test_more_shots_than_there_are(spec: TextSpec, files: Any) -> None:
    with refused("shots_per_label asks for 3 of 'bad', there are 2"):
        prepared(spec, data_files=files, shots_per_label=3)


def test_shots_of_a_regression(spec: TextSpec) -> None:
    files = {"train": write("train.parquet", labelled(["a film"] * 20, [0.5, 1.5]))}
    with refused("shots_per_label"):
        prepared(spec, data_files=files, labels=[], shots_per_label=3)


def test_too_few_examples_to_cut_validation_from(spec: TextSpec) -> None:
    with refused("validation"):
        prepared(spec, data_files={"train": write("train.parquet", ROWS[:1])})


def test_a_limit_without_room_for_text(spec: TextSpec, files: Any) -> None:
    with refused("the template alone has 2 tokens, which leaves no room for text in 2"):
        prepared(spec, data_files=files, max_length=2)


def test_no_model_to_tokenise_for(files: Any) -> None:
    with refused("needs a module's input_spec: use a Trainer, or connect(module.input_spec)"):
        TextClassificationDataModule(data_files=files, labels=["bad", "good"]).setup("fit")


def test_a_warning_says_how_many_texts_were_cut(spec: TextSpec, files: Any) -> None:
    with pytest.warns(UserWarning, match=re.escape("val (validation): 3 of 4 texts were cut to 4 tokens")) as seen:
        prepared(spec, "validate", data_files=files, max_length=4)
    assert len(seen) == 1


def test_there_is_no_warning_where_all_texts_fit(spec: TextSpec, files: Any, recwarn: pytest.WarningsRecorder) -> None:
    prepared(spec, data_files=files, max_length=5)
    assert not [warning for warning in recwarn if "cut" in str(warning.message)]

"""Files, columns, texts and labels that cannot be right are refused, in one line that names them."""

from __future__ import annotations

import datetime
import gzip
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lopa_lightning import CompletionDataModule, CRUXEvalDataModule, MBPPDataModule, TextClassificationDataModule
from lopa_lightning.backbones.text_spec import TextSpec
from lopa_lightning.data.glue import GLUEDataModule
from lopa_lightning.errors import LoPAError
from tests.data.conftest import SpecOf
from tests.data.helpers import labelled, prepared, rows_of, texts_of, write
from tests.refusals import Refused, assert_refusal

ROWS = labelled(["a great film", "a terrible story", "it was good", "No"], ["good", "bad"])


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def spec(text_spec: SpecOf) -> TextSpec:
    return text_spec()


# Texts

NO_TEXTS = {
    "a number": ([42, 7], "42"),
    "a float": ([1.5, 2.0], "1.5"),
    "a bool": ([True, False], "True"),
    "a list": ([["a", "b"], ["c"]], "['a', 'b']"),
    "a mapping": ([{"a": 1}, {"a": 2}], "{'a': 1}"),
    "bytes": ([b"a film", b"b"], "b'a film'"),
    "a date": ([datetime.date(2020, 1, 1), datetime.date(2021, 1, 1)], "datetime.date(2020, 1, 1)"),
}
OF_JSON = ("a number", "a float", "a bool", "a list", "a mapping")


@pytest.mark.parametrize("kind", NO_TEXTS)
def test_what_is_no_text_in_parquet(kind: str, spec: TextSpec, refused: Refused) -> None:
    values, shown = NO_TEXTS[kind]
    files: Any = {"test": write("test.parquet", labelled(values, ["good"]))}
    with refused(f"test (test): column 'text' must hold texts, got {shown} in row 1, 2 (counted from 1)", rows=True):
        prepared(spec, "test", data_files=files)


@pytest.mark.parametrize("kind", OF_JSON)
@pytest.mark.parametrize("is_mixed", [False, True])
def test_what_is_no_text_in_json(kind: str, is_mixed: bool, spec: TextSpec, refused: Refused) -> None:
    values, shown = NO_TEXTS[kind]
    values, at = (["a film", values[0], "b"], "2") if is_mixed else (values, "1, 2")
    files: Any = {"test": write("test.jsonl", labelled(values, ["good"]))}
    with refused(f"test (test): column 'text' must hold texts, got {shown} in row {at} (counted from 1)", rows=True):
        prepared(spec, "test", data_files=files)


def test_what_is_no_text_is_named_by_the_files_row_where_validation_is_cut_off(
    spec: TextSpec, refused: Refused
) -> None:
    rows = labelled(["a film"] * 40, ["good", "bad"])
    rows[17]["text"] = 5
    files: Any = {"train": write("train.jsonl", rows)}
    with refused("column 'text' must hold texts, got 5 in row 18 (counted from 1)", rows=True):
        prepared(spec, data_files=files)


def test_where_texts_may_be_empty_they_must_be_texts(text_spec: SpecOf, refused: Refused) -> None:
    rows = [{"sentence1": None, "sentence2": 5, "label": "entailment"}]
    for split in ("train", "validation", "test"):
        write(f"glue/rte/{split}.jsonl", rows)
    configs = "---\nconfigs:\n- config_name: rte\n  data_files:\n"
    splits = "".join(f"  - split: {s}\n    path: rte/{s}.jsonl\n" for s in ("train", "validation", "test"))
    Path("glue/README.md").write_text(f"{configs}{splits}---\n")
    data = GLUEDataModule("rte", path="glue")
    data.connect(text_spec())
    with refused("column 'sentence2' must hold texts, got 5 in row 1 (counted from 1)", rows=True):
        data.setup("validate")


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_nul_character_in_a_text(ending: str, spec: TextSpec, refused: Refused) -> None:
    files: Any = {"test": write(f"test.{ending}", labelled(["a film", "a\0b", "c"], ["good"]))}
    with refused("test (test): column 'text' has a NUL character", "in row 2 (counted from 1)", rows=True):
        prepared(spec, "test", data_files=files)


@pytest.mark.parametrize("type_of", [pa.string(), pa.large_string(), pa.string_view()], ids=str)
def test_every_kind_of_text_is_one(type_of: Any, text_spec: SpecOf) -> None:
    table = pa.table({"text": pa.array(["a film", "007"], type_of), "label": ["good", "bad"]})
    pq.write_table(table, "test.parquet")
    data = prepared(text_spec("gpt2"), "test", data_files={"test": "test.parquet"})
    assert texts_of(data, data.test_dataloader()[0]) == ["a film", "007"]


# Completions


@pytest.mark.parametrize("column", ["prompt", "completion", "title"])
@pytest.mark.parametrize("value", [5, ["a"], {"a": 1}, True], ids=str)
def test_what_is_no_text_in_a_completions_columns(column: str, value: Any, text_spec: SpecOf, refused: Refused) -> None:
    rows = [{"prompt": "the film", "completion": "was good", "title": "film"} for _ in range(4)]
    files: Any = {"train": write("train.jsonl", [*rows, {**rows[0], column: value}])}
    data = CompletionDataModule(data_files=files, instance_column="title", splits={"val": "train"})
    data.connect(text_spec("gpt2"))
    with refused(f"column {column!r} must hold texts, got {value!r} in row 5 (counted from 1)", rows=True):
        data.setup("fit")


def test_numbers_in_a_csv_are_completions_as_written(text_spec: SpecOf) -> None:
    rows = [{"prompt": f"{i} + 1.0 =", "completion": f"0{i}"} for i in range(3)]
    data = CompletionDataModule(data_files={"test": write("test.csv", rows)})
    data.connect(text_spec("gpt2"))
    data.setup("test")
    assert [data.example("test", i).completion for i in range(3)] == ["00", "01", "02"]


TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "{{ m['role'] }}: {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
ASKED, ANSWERED = {"role": "user", "content": "the film ?"}, {"role": "assistant", "content": "good"}


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        (5, "a chat must be a list of {role, content}, both texts; got 5"),
        ("the film", "a chat must be a list of {role, content}, both texts; got 'the film'"),
        (["the film"], "a chat must be a list of {role, content}, both texts; got ['the film']"),
        ([{"role": "user"}], "both texts; got [{'role': 'user'}]"),
        ([{"role": "user", "content": 5}], "both texts; got [{"),
        ([{"role": 3, "content": "a"}], "both texts; got [{"),
        ([{"role": "user", "content": ["a"]}, ANSWERED], "both texts; got [{"),
        ([ANSWERED], "a chat must have a question before its last answer"),
        ([], "column 'chat' is empty"),
        ([{"role": "tool", "content": "a"}, ANSWERED], "chat template does not take"),
    ],
    ids=str,
)
def test_a_chat_that_is_none(chat: Any, message: str, text_spec: SpecOf, refused: Refused) -> None:
    spec = text_spec("gpt2")
    files: Any = {"test": write("test.jsonl", [{"chat": chat}])}
    data = CompletionDataModule(data_files=files, messages_column="chat")
    data.connect(spec)
    before = spec.tokenizer.chat_template
    spec.tokenizer.chat_template = TEMPLATE
    try:
        with refused("chat", message, rows=True):
            data.setup("test")
    finally:
        spec.tokenizer.chat_template = before


def test_a_chats_instance_is_its_question(refused: Refused) -> None:
    with refused("leave out messages_column or instance_column, got 'chat' and 'title'"):
        CompletionDataModule(data_files={"train": "x.csv"}, messages_column="chat", instance_column="title")


def test_a_chats_instance_is_its_question_in_a_column_found_by_itself_too(text_spec: SpecOf, refused: Refused) -> None:
    spec = text_spec("chat", "causal_lm")
    files: Any = {"test": write("test.jsonl", [{"messages": [ASKED, ANSWERED], "title": "film"}])}
    data = CompletionDataModule(data_files=files, instance_column="title")
    data.connect(spec)
    with refused("a chat's instance is its last question, got instance_column 'title'"):
        data.setup("test")


@pytest.mark.parametrize("role", ["test", "predict"])
@pytest.mark.parametrize("completion", [{"answer": "good"}, {"completion": None}], ids=["misspelt", "null"])
def test_a_test_without_completions_is_not_scored_as_wrong(
    role: Any, completion: dict[str, Any], text_spec: SpecOf, refused: Refused
) -> None:
    data = CompletionDataModule(data_files={"test": write("test.jsonl", [{"prompt": "the film", **completion}] * 2)})
    data.connect(text_spec("llama", "causal_lm"))
    if role == "predict":
        data.setup("predict")
        assert len(data.rows("predict")) == 2
        return
    with refused("completion", rows=True):
        data.setup("test")


def test_a_column_that_a_template_leaves_out_is_said() -> None:
    options: dict[str, Any] = {"text_columns": ["text", "title"], "template": ["{text} {mask}"]}
    with pytest.warns(UserWarning, match="does not read title of text_columns"):
        TextClassificationDataModule(data_files={"train": "a.csv"}, labels=["bad", "good"], **options)


@pytest.mark.parametrize("option", ["prompt_column", "completion_column", "messages_column", "instance_column"])
def test_a_benchmark_has_its_own_columns(option: str, refused: Refused) -> None:
    for kind in (MBPPDataModule, CRUXEvalDataModule):
        with refused(f"{kind.__name__} makes prompts by the benchmark's own layout, without {option}"):
            kind(**{option: "text"})


@pytest.mark.parametrize("option", ["prompt_column", "instance_column"])
def test_a_completion_is_not_what_is_read(option: str, refused: Refused) -> None:
    with refused("completion_column 'completion' must not be that of the prompt or the instance"):
        CompletionDataModule(data_files={"train": "x.csv"}, **{option: "completion"})


# Labels


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
@pytest.mark.parametrize("label", [["good", "bad"], [], {"name": "good"}], ids=str)
@pytest.mark.parametrize("labels", [["good", "bad"], []], ids=["classes", "regression"])
def test_labels_that_are_lists_or_mappings(
    labels: list[str], label: Any, ending: str, spec: TextSpec, refused: Refused
) -> None:
    name = f"test.{ending}"
    if ending == "parquet":
        pq.write_table(pa.table({"text": ["a film", "b"], "label": [label, label]}), name)
    else:
        write(name, labelled(["a film", "b"], [label]))
    files: Any = {"test": name}
    with refused(
        "test (test): column 'label' must hold one label in each row (multi_label: true takes lists)", str(label)
    ):
        prepared(spec, "test", data_files=files, labels=labels)


def test_labels_of_several_kinds_are_told_apart_as_they_are_written(spec: TextSpec) -> None:
    files: Any = {"test": write("test.jsonl", labelled(["a", "b", "c", "d"], [1, "1", "0", 0]))}
    data = prepared(spec, "test", data_files=files, labels=[0, 1])
    assert [row["labels"] for row in rows_of(data.test_dataloader()[0])] == [1, 1, 0, 0]


# Files


def bad_file(name: str, content: str | bytes) -> Any:
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return {"test": name}


HEAD = "text,label\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text,label,text\na,good,x\n", "has two columns of one name: text"),
        ("a.tsv", "text\tlabel\ttext\na\tgood\tx\n", "has two columns of one name: text"),
        ("a.csv", f"{HEAD}café,good\n".encode("latin-1"), "it has a byte 0xe9 that is not UTF-8"),
        (
            "a.csv",
            (HEAD + 50_000 * "a,good\n" + "café,good\n").encode("latin-1"),
            "it has a byte 0xe9 that is not UTF-8",
        ),
        ("a.csv", f"{HEAD}a,good\n".encode("utf-16"), "it has a byte 0xff that is not UTF-8"),
        ("a.csv", f"{HEAD}a,good\n".encode("utf-16-le"), "it has NUL characters; save it in UTF-8"),
        ("a.csv", f"{HEAD}a,good\n".encode("utf-32"), "it has a byte 0xff that is not UTF-8"),
        ("a.jsonl", '{"text": "café", "label": "good"}\n'.encode("latin-1"), "it has a byte 0xe9 that is not UTF-8"),
        ("a.csv", f"{HEAD}caf".encode() + b"\xc3", "it has a byte 0xc3 that is not UTF-8"),
        ("a.csv", f"{HEAD}a,good\nb\0,bad\n", "it has NUL characters; save it in UTF-8"),
        ("a.csv", f"{HEAD}a,good\nb,bad,c\n", "Expected 2 fields in line 3, saw 3"),
        ("a.csv", f"{HEAD}a,good,c\nb,bad,d\n", "a row has more cells than the header"),
        ("a.csv", f'{HEAD}"a,good\n', "EOF inside string"),
        ("a.csv", "", "a.csv"),
        ("a.csv", HEAD, "a.csv"),
        ("a.jsonl", "", "it has no rows"),
        ("a.jsonl", "5\n", "a.jsonl"),
        ("a.jsonl", '{"text": "a", "text": "b", "label": "good"}\n', "specified twice"),
        ("a.jsonl", '{"text": "a"', "a.jsonl"),
        ("a.parquet", b"PAR1junkPAR1", "a.parquet"),
        ("a.parquet", b"", "a.parquet"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_file_that_is_there_and_cannot_be_read(
    name: str, content: str | bytes, message: str, spec: TextSpec, refused: Refused
) -> None:
    files = bad_file(name, content)
    with refused(name, message):
        prepared(spec, "test", data_files=files)


OF_FOLDERS = [
    ("test.csv", b"text,label,text\na,good,x\n", "has two columns of one name: text"),
    ("test.tsv", b"text\tlabel\ttext\na\tgood\tx\n", "has two columns of one name: text"),
    ("test.csv", f"{HEAD}café,good\n".encode("latin-1"), "it has a byte 0xe9 that is not UTF-8"),
    ("test.csv", f"{HEAD}a,good\nb\0,bad\n".encode(), "it has NUL characters; save it in UTF-8"),
    ("test.csv.gz", gzip.compress(b"text,label,text\na,good,x\n", mtime=0), "has two columns of one name: text"),
    ("test.csv.gz", gzip.compress(10 * HEAD.encode(), mtime=0)[:-9], "test.csv.gz' cannot be read: "),
    ("test.csv.gz", b"no gzip", "test.csv.gz' cannot be read: Not a gzipped file"),
    ("test.csv", b"", "cannot be read: "),
    ("test.jsonl", '{"text": "café", "label": "good"}\n'.encode("latin-1"), "a byte 0xe9 that is not UTF-8"),
]


@pytest.mark.parametrize(("name", "content", "message"), OF_FOLDERS, ids=lambda value: str(value)[:30])
def test_a_folders_file_is_checked_as_one_that_is_named(
    name: str, content: bytes, message: str, spec: TextSpec, refused: Refused
) -> None:
    Path("folder").mkdir()
    Path("folder", name).write_bytes(content)
    with refused("folder", message):
        prepared(spec, "test", path="folder")


def test_a_readme_says_how_its_csvs_are_read(text_spec: SpecOf) -> None:
    Path("folder").mkdir()
    Path("folder", "test.csv").write_bytes("café;good\ngood;good\n".encode("latin-1"))
    said = "{config_name: default, sep: ;, encoding: latin-1, header: null, names: [text, label]}"
    Path("folder", "README.md").write_text(f"---\nconfigs:\n- {said}\n---\n")
    data = prepared(text_spec("gpt2"), "test", path="folder")
    assert texts_of(data, data.test_dataloader()[0]) == ["café", "good"]


def test_no_data_found_is_never_said_of_a_file_that_is_there(spec: TextSpec) -> None:
    files = bad_file("a.parquet", b"junk")
    with pytest.raises(LoPAError, match=r"^the data in \{'test': 'a.parquet'\} cannot be read: ") as caught:
        prepared(spec, "test", data_files=files)
    assert_refusal(str(caught.value))


def test_of_several_files_the_one_of_another_encoding_is_named(spec: TextSpec, refused: Refused) -> None:
    Path("good.csv").write_text(f"{HEAD}a,good\n")
    Path("bad.csv").write_bytes(f"{HEAD}café,good\n".encode("latin-1"))
    with refused("bad.csv' cannot be read: "):
        prepared(spec, "test", data_files={"test": ["good.csv", "bad.csv"]})


@pytest.mark.parametrize(
    ("ending", "file"), [("csv", "dev.csv' cannot be read with the others"), ("jsonl", "dev.jsonl")]
)
def test_a_file_with_other_columns_is_named_with_them(ending: str, file: str, spec: TextSpec, refused: Refused) -> None:
    other = [{**ROWS[0], "source": "a"}]
    files: Any = {"train": write(f"train.{ending}", ROWS), "validation": write(f"dev.{ending}", other)}
    with refused(file, "must have the same columns", "has text, label, source in place of text, label"):
        prepared(spec, data_files=files)


def test_a_byte_order_mark_is_no_part_of_a_name(text_spec: SpecOf) -> None:
    Path("a.csv").write_bytes(f"{HEAD}a film,good\n".encode("utf-8-sig"))
    data = prepared(text_spec("gpt2"), "test", data_files={"test": "a.csv"})
    assert texts_of(data, data.test_dataloader()[0]) == ["a film"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "data_files must all be of one of .csv, .tsv, .txt, .json, .jsonl, .parquet; got none"),
        ({"test": []}, "data_files must all be of one of .csv, .tsv, .txt, .json, .jsonl, .parquet; got none"),
        ({"test": "folder"}, "no such regular file: folder"),
        ({"test": "a.parquet.gz"}, "got .gz"),
        ({"test": "~/nothing.csv"}, "no such regular file: ~/nothing.csv"),
        ({"test": ["here.csv", "no*.csv"]}, "no such regular file: no*.csv"),
        ({"test": "here.csv/x.csv"}, "no such regular file: here.csv/x.csv"),
        ({"test": "folder.csv"}, "no such regular file: folder.csv"),
        ({"test": "folder.jsonl"}, "no such regular file: folder.jsonl"),
        ({"test": "folder.parquet"}, "no such regular file: folder.parquet"),
        ({"test": "pipe.csv"}, "no such regular file: pipe.csv"),
        ({"test": ["here.csv", "device.csv"]}, "no such regular file: device.csv"),
    ],
    ids=str,
)
def test_files_that_are_none(files: Any, message: str, spec: TextSpec, refused: Refused) -> None:
    for name in ("folder", "folder.csv", "folder.jsonl", "folder.parquet"):
        Path(name).mkdir()
    Path("a.parquet.gz").write_bytes(b"")
    os.mkfifo("pipe.csv")
    Path("device.csv").symlink_to("/dev/zero")
    write("here.csv", ROWS)
    with refused(message):
        prepared(spec, "test", data_files=files)


@pytest.mark.parametrize("from_the_root", [False, True])
@pytest.mark.parametrize("name", ["a[1].csv", "a*.csv", "a?.csv", "part[0-9]/x.csv"])
def test_a_file_with_a_patterns_letters_in_its_name_is_meant(name: str, from_the_root: bool, text_spec: SpecOf) -> None:
    for other in ("a1.csv", "a2.csv", "part1/x.csv"):
        write(other, labelled(["another"], ["bad"]))
    write(name, labelled(["this one"], ["good"]))
    data = prepared(
        text_spec("gpt2"), "test", data_files={"test": str(Path(name).resolve()) if from_the_root else name}
    )
    assert texts_of(data, data.test_dataloader()[0]) == ["this one"]


def test_a_working_folder_with_a_patterns_letters_in_its_name(
    text_spec: SpecOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("run[1]/x-1.csv", labelled(["this one"], ["good"]))
    write("run1/x-1.csv", labelled(["another"], ["bad"]))
    monkeypatch.chdir("run[1]")
    for files in ("x-1.csv", "x-*.csv"):
        data = prepared(text_spec("gpt2"), "test", data_files={"test": files})
        assert texts_of(data, data.test_dataloader()[0]) == ["this one"]


def test_a_home_folder_is_expanded(text_spec: SpecOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    write("home/data/test.csv", labelled(["a film"], ["good"]))
    for source in (
        {"path": "~/data"},
        {"data_files": {"test": "~/data/test.csv"}},
        {"data_files": {"test": "~/d*/*.csv"}},
    ):
        data = prepared(text_spec("gpt2"), "test", **source)
        assert texts_of(data, data.test_dataloader()[0]) == ["a film"]


@pytest.mark.parametrize("name", ["a[1]", "a*", "deep[x]/folder"])
@pytest.mark.parametrize("files", ["test.csv", "t*.csv"])
def test_a_folder_with_a_patterns_letters_in_its_name_is_not_taken_for_another(
    name: str, files: str, text_spec: SpecOf, refused: Refused
) -> None:
    write(f"{name}/test.csv", labelled(["this one"], ["good"]))
    for other in ("a1", "deepx/folder"):
        write(f"{other}/test.csv", labelled(["another"], ["bad"]))
    data = prepared(text_spec("gpt2"), "test", data_files={"test": f"{name}/{files}"})
    assert texts_of(data, data.test_dataloader()[0]) == ["this one"]
    with refused(
        f"path {os.path.realpath(name)!r} has *, ? or [ in its name", "name its files in data_files", rows=True
    ):
        prepared(text_spec("gpt2"), "test", path=name)


CARD = """---
configs:
- config_name: one
  data_files: [{split: test, path: "x/*.jsonl"}]
- config_name: two
  data_dir: y
  data_files: [{split: test, path: "*.jsonl"}]
dataset_info:
- config_name: one
  features: [{name: text, dtype: string}, {name: label, dtype: {class_label: {names: {"0": bad, "1": good}}}}]
- config_name: two
  features: [{name: text, dtype: string}, {name: label, dtype: string}]
---
"""


def test_what_a_folders_readme_says_holds(text_spec: SpecOf, refused: Refused) -> None:
    write("folder/x/1.jsonl", labelled(["one"], [1]))
    write("folder/y/test.jsonl", labelled(["two"], ["bad"]))
    Path("folder/README.md").write_text(CARD)
    for name in ("one", "two"):
        data = prepared(text_spec("gpt2"), "test", path="folder", name=name)
        assert texts_of(data, data.test_dataloader()[0]) == [name]
        assert [row["labels"] for row in rows_of(data.test_dataloader()[0])] == [int(name == "one")]
    with refused("the data in 'folder' cannot be read", rows=True):
        prepared(text_spec("gpt2"), "test", path="folder")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("here.csv", "path 'here.csv' is a file; name it in data_files, such as {train: here.csv}"),
        ("empty", "the data in 'empty' cannot be read: "),
        ("~/nothing", "no data found for '~/nothing'"),
        ("no/such/folder", "no data found for 'no/such/folder'"),
    ],
)
def test_a_path_of_no_data(path: str, message: str, spec: TextSpec, refused: Refused) -> None:
    write("here.csv", ROWS)
    Path("empty").mkdir()
    with refused(message):
        prepared(spec, "test", path=path)


def test_a_folder_has_no_revision(spec: TextSpec, refused: Refused) -> None:
    write("folder/test.csv", ROWS)
    with refused("revision is of a data set on the hub, and path 'folder' is a folder; got 'v2'"):
        prepared(spec, "test", path="folder", revision="v2")


# Arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 0}, "max_length must be at least 1, got 0"),
        ({"max_length": -5}, "max_length must be at least 1, got -5"),
        ({"batch_tokens": 0}, "batch_tokens must be at least 1, got 0"),
        ({"num_workers": -1}, "num_workers must be at least 0, got -1"),
        ({"subset_seed": -1}, "subset_seed must be at least 0, got -1"),
        ({"labels": "ab"}, "labels must be a list, got 'ab'"),
        ({"labels": 5}, "labels must be a list, got 5"),
        ({"labels": [["good"], ["bad"]]}, "labels must be names or numbers, got ['good']"),
        ({"labels": [{"good": 1}, "bad"]}, "labels must be names or numbers, got {'good': 1}"),
        ({"labels": [None, "bad"]}, "labels must be names or numbers, got None"),
        ({"labels": ["bad", "bad"]}, "labels must be at least two different names"),
        ({"labels": [1, "1"]}, "labels must be at least two different names"),
        ({"label_values": "ab"}, "label_values must be a list, got 'ab'"),
        ({"label_values": [["a"], ["b"]]}, "label_values must be names or numbers, got ['a']"),
        ({"label_values": [1, "1"]}, "there must be one label value for each label, got [1, '1'] for"),
        ({"words": "ab"}, "words must be a list, got 'ab'"),
        ({"metrics": "accuracy"}, "metrics must be a list, got 'accuracy'"),
        ({"template": "{text} {mask}"}, "template must be a list, got '{text} {mask}'"),
        ({"template": [5]}, "a template must be one or two pieces of text"),
        ({"template": ["{text!r} {mask}"]}, "without a format, and at most one {mask}; got ['{text!r} {mask}']"),
        ({"template": ["{text:>9} {mask}"]}, "without a format, and at most one {mask}; got ['{text:>9} {mask}']"),
        ({"template": ["{text} {mask"]}, "got ['{text} {mask']"),
        ({"template": ["{} {mask}"]}, "got ['{} {mask}']"),
        ({"text_columns": "text"}, "text_columns must be a list, got 'text'"),
        ({"text_columns": ["label"]}, "label_column 'label' must not be among the columns of text"),
        ({"template": ["{text} {label} {mask}"]}, "label_column 'label' must not be among the columns of text"),
        ({"causal_template": "{label} {mask}"}, "causal_template must have no columns but text, got '{label} {mask}'"),
        ({"causal_template": "{body} {mask}"}, "causal_template must have no columns but text, got '{body} {mask}'"),
        ({"text_columns": []}, "a template must be one or two pieces of text"),
        ({"revision": "v2"}, "name and revision are of a path, not of data_files; got None and 'v2'"),
    ],
    ids=lambda value: str(value),
)
def test_an_argument(options: dict[str, Any], message: str, refused: Refused) -> None:
    with refused(message):
        TextClassificationDataModule(**{"data_files": {"train": "a.csv"}, "labels": ["bad", "good"], **options})

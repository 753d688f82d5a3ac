from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value

from lopa_lightning.data import TextClassificationDataModule
from tests.data.conftest import SpecOf, TokenizerOf
from tests.data.helpers import labelled, prepared, rows_of, texts_of, write

TEXTS = ["a great film", "a terrible story , badly told", "it was good", "No"]
ROWS = labelled(TEXTS, ["good", "bad"])


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def val_rows(spec: Any, rows: Sequence[dict[str, Any]] = ROWS, **options: Any) -> list[dict[str, Any]]:
    files = {"train": write("train.parquet", rows), "validation": write("dev.parquet", rows)}
    return rows_of(prepared(spec, data_files=files, **options).val_dataloader()[0])


# Sources


@pytest.mark.parametrize("ending", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_files_give_the_tokenizers_own_ids(tokenizer: TokenizerOf, text_spec: SpecOf, ending: str) -> None:
    rows = labelled([*TEXTS, 'a "great" film,\twas\nit ?'], ["good", "bad"])
    files = {"train": write(f"train.{ending}", rows), "validation": write(f"dev.{ending}", rows[::-1])}
    data = prepared(text_spec(), data_files=files)
    for loader, members in ((data.train_dataloader(), rows), (data.val_dataloader()[0], rows[::-1])):
        expected = tokenizer("bert")([row["text"] for row in members])
        read = rows_of(loader)
        assert [row["input_ids"] for row in read] == expected["input_ids"]
        assert [row["token_type_ids"] for row in read] == expected["token_type_ids"]
        assert [row["labels"] for row in read] == [["bad", "good"].index(row["label"]) for row in members]
        assert [row["index"] for row in read] == list(range(len(members)))


def test_a_split_may_be_several_files(text_spec: SpecOf) -> None:
    files = {"train": [write("1.csv", ROWS), write("2.csv", ROWS[:3])], "validation": write("dev.csv", ROWS)}
    assert len(rows_of(prepared(text_spec(), data_files=files).train_dataloader())) == 7


def test_files_may_be_named_by_a_pattern_or_from_the_root(text_spec: SpecOf, tmp_path: Path) -> None:
    write("part-1.csv", ROWS)
    write("part-2.csv", ROWS)
    by_pattern = prepared(text_spec(), data_files={"train": "part-*.csv", "validation": "part-1.csv"})
    assert len(rows_of(by_pattern.train_dataloader())) == 8
    whole = {"train": str(tmp_path / "part-1.csv"), "validation": str(tmp_path / "part-2.csv")}
    assert len(rows_of(prepared(text_spec(), data_files=whole).train_dataloader())) == 4


def test_a_folder_is_read_as_from_the_hub(text_spec: SpecOf, tokenizer: TokenizerOf) -> None:
    write("folder/train.csv", ROWS)
    write("folder/validation.csv", ROWS[:2])
    data = prepared(text_spec(), path="folder")
    assert [row["input_ids"] for row in rows_of(data.val_dataloader()[0])] == tokenizer("bert")(TEXTS[:2])["input_ids"]


def test_a_config_of_a_folder_is_chosen_by_name(text_spec: SpecOf) -> None:
    lines = ["---", "configs:"]
    for config, rows in (("long", ROWS), ("short", ROWS[:2])):
        write(f"folder/{config}/train.csv", rows)
        lines += [f"- config_name: {config}", f"  data_files: {config}/train.csv"]
    Path("folder/README.md").write_text("\n".join([*lines, "---"]))
    for config, count in (("long", 4), ("short", 2)):
        assert (
            len(TextClassificationDataModule(path="folder", name=config, labels=["bad", "good"]).raw()["train"])
            == count
        )


@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_words_that_look_like_a_missing_value_are_text(tokenizer: TokenizerOf, text_spec: SpecOf, ending: str) -> None:
    texts = ["None", "NA", "null", "nan"]
    files = {"train": write(f"train.{ending}", ROWS), "test": write(f"test.{ending}", labelled(texts, ["good"]))}
    read = rows_of(prepared(text_spec("gpt2"), "test", data_files=files).test_dataloader()[0])
    assert [tokenizer("gpt2").decode(row["input_ids"]) for row in read] == texts


# Labels


def test_labels_count_in_the_order_that_is_given(text_spec: SpecOf) -> None:
    assert [row["labels"] for row in val_rows(text_spec(), labels=["bad", "good"])] == [1, 0, 1, 0]
    assert [row["labels"] for row in val_rows(text_spec(), labels=["good", "bad"])] == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("stored", "label_values"),
    [
        ([1, 0], ["0", "1"]),
        ([2, -1], ["-1", "2"]),
        ([True, False], [False, True]),
        ([1.0, 0.0], [0, 1]),
        (["+", "-"], ["-", "+"]),
    ],
)
def test_label_values_say_what_stands_in_the_column(
    text_spec: SpecOf, stored: list[Any], label_values: list[Any]
) -> None:
    rows = val_rows(text_spec(), labelled(TEXTS, stored), label_values=label_values)
    assert [row["labels"] for row in rows] == [1, 0, 1, 0]


def test_a_data_sets_own_class_names_are_matched_by_name(text_spec: SpecOf) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["good", "bad"])})
    stored = Dataset.from_dict({"text": TEXTS, "label": [0, 1, 0, 1]}, features=features)
    stored.to_parquet("train.parquet")
    data = prepared(text_spec(), data_files={"train": "train.parquet"}, splits={"test": "train"}, stage="test")
    assert [row["labels"] for row in rows_of(data.test_dataloader()[0])] == [1, 0, 1, 0]


@pytest.mark.parametrize("stored", [[0.5, -2.25], [3, 4], ["0.5", "1e2"]])
def test_regression_reads_numbers(text_spec: SpecOf, stored: list[Any]) -> None:
    write("train.parquet", labelled(TEXTS, stored))
    data = prepared(
        text_spec(), data_files={"train": "train.parquet"}, labels=[], splits={"test": "train"}, stage="test"
    )
    (batch,) = data.test_dataloader()[0]
    assert batch["labels"].dtype == torch.float32
    assert [row["labels"] for row in rows_of([batch])] == [float(stored[i % 2]) for i in range(4)]


def test_prediction_needs_no_labels(text_spec: SpecOf) -> None:
    files = {"test": write("test.csv", [{"text": text} for text in TEXTS])}
    (batch,) = prepared(text_spec(), "predict", data_files=files).predict_dataloader()[0]
    assert "labels" not in batch
    assert sorted(batch["index"].tolist()) == [0, 1, 2, 3]


# Texts


def test_two_columns_are_a_pair(tokenizer: TokenizerOf, text_spec: SpecOf) -> None:
    rows = [{"q": text, "a": TEXTS[-1 - i], "label": "good"} for i, text in enumerate(TEXTS)]
    expected = tokenizer("bert")(TEXTS, TEXTS[::-1])
    read = val_rows(text_spec(), rows, text_columns=["q", "a"])
    assert [row["input_ids"] for row in read] == expected["input_ids"]
    assert [row["token_type_ids"] for row in read] == expected["token_type_ids"]


@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_numbers_in_a_text_column_of_a_csv_are_read_as_written(ending: str, text_spec: SpecOf) -> None:
    written = ["007", "1.0", "1e5", "True", "NA", "2020-01-01", " 42 "]
    files: Any = {"test": write(f"test.{ending}", labelled(written, [0, 1]))}
    data = prepared(text_spec("gpt2"), "test", data_files=files, labels=[0, 1])
    assert texts_of(data, data.test_dataloader()[0]) == written
    assert [row["labels"] for row in rows_of(data.test_dataloader()[0])] == [0, 1, 0, 1, 0, 1, 0]


def test_a_template_asks_for_the_word_at_the_mask(tokenizer: TokenizerOf, text_spec: SpecOf) -> None:
    read = val_rows(text_spec("roberta", "masked_lm"), template=["{text} . It was {mask} ."], words=["bad", "good"])
    expected = tokenizer("roberta")([f"{text} . It was <mask> ." for text in TEXTS])["input_ids"]
    assert [row["input_ids"] for row in read] == expected


def test_a_causal_template_is_continued(tokenizer: TokenizerOf, text_spec: SpecOf) -> None:
    options = {"template": ["{text} {mask}"], "causal_template": "{text} . It was {mask}", "words": ["bad", "good"]}
    read = val_rows(text_spec("gpt2", "causal_lm"), **options)
    assert [row["input_ids"] for row in read] == tokenizer("gpt2")([f"{t} . It was" for t in TEXTS])["input_ids"]


def test_an_instance_encoder_reads_the_text_without_the_template(tokenizer: TokenizerOf, text_spec: SpecOf) -> None:
    spec = text_spec("bert", "masked_lm", instance="roberta", instance_max_tokens=6)
    read = val_rows(spec, template=["{text} . It was {mask} ."], words=["bad", "good"])
    whole = tokenizer("roberta")(TEXTS)["input_ids"]
    assert read[0]["instance_input_ids"] == whole[0]
    assert len(whole[1]) > 6
    assert [len(row["instance_input_ids"]) for row in read] == [min(6, len(ids)) for ids in whole]
    assert read[1]["input_ids"] == tokenizer("bert")(f"{TEXTS[1]} . It was [MASK] .")["input_ids"]


@pytest.mark.filterwarnings("ignore:.*texts were cut")
def test_the_lower_of_both_limits_holds(text_spec: SpecOf) -> None:
    def longest(spec_limit: int | None, max_length: int | None) -> int:
        rows = val_rows(text_spec("gpt2", max_tokens=spec_limit), max_length=max_length)
        return max(len(row["input_ids"]) for row in rows)

    assert longest(None, None) == 6
    assert longest(4, None) == longest(None, 4) == longest(4, 5) == longest(5, 4) == 4


@pytest.mark.filterwarnings("ignore:.*texts were cut")
def test_texts_are_cut_on_the_side_that_is_asked_for(tokenizer: TokenizerOf, text_spec: SpecOf) -> None:
    def first(side: Any) -> list[int]:
        ids: list[int] = val_rows(text_spec(), max_length=4, truncation_side=side)[0]["input_ids"]
        return ids

    assert first("right") == tokenizer("bert")("a great")["input_ids"]
    assert first("left") == tokenizer("bert")("great film")["input_ids"]


# Batches


def test_evaluation_batches_are_twice_as_large_by_default(text_spec: SpecOf) -> None:
    rows = labelled(TEXTS * 3, ["good", "bad"])
    files = {"train": write("train.csv", rows), "validation": write("dev.csv", rows)}
    data = prepared(text_spec(), data_files=files, batch_size=4)
    assert [len(batch["index"]) for batch in data.train_dataloader()] == [4, 4, 4]
    assert [len(batch["index"]) for batch in data.val_dataloader()[0]] == [8, 4]
    data = prepared(text_spec(), data_files=files, batch_size=4, eval_batch_size=5)
    assert [len(batch["index"]) for batch in data.val_dataloader()[0]] == [2, 5, 5]


def test_an_index_ties_a_prediction_to_its_row(tokenizer: TokenizerOf, text_spec: SpecOf) -> None:
    texts = [TEXTS[i % 4] + " was" * (i % 7) for i in range(20)]
    files = {"test": write("test.jsonl", labelled(texts, ["good"]))}
    loader = prepared(text_spec("gpt2"), "predict", data_files=files, eval_batch_size=3).predict_dataloader()[0]
    seen = {}
    for batch in loader:
        for index, ids, mask in zip(batch["index"].tolist(), batch["input_ids"], batch["attention_mask"]):
            seen[index] = tokenizer("gpt2").decode(ids[mask.bool()])
    assert list(seen) != sorted(seen)
    assert [seen[i] for i in range(20)] == texts


@pytest.mark.parametrize(("side", "column"), [("left", 0), ("right", -1)])
def test_padding_goes_where_it_is_asked_for(text_spec: SpecOf, side: str, column: int) -> None:
    files = {"test": write("test.csv", ROWS)}
    data = prepared(text_spec("bert", instance="bert"), "predict", data_files=files, padding_side=side)
    (batch,) = data.predict_dataloader()[0]
    padded = batch["attention_mask"].sum(1) < batch["attention_mask"].shape[1]
    assert padded.any()
    assert (batch["input_ids"][padded, column] == 0).all()
    assert (batch["attention_mask"][padded, column] == 0).all()
    assert (batch["instance_attention_mask"][:, 0] == 1).all()


def test_epochs_differ_and_follow_the_global_seed(text_spec: SpecOf, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"train": write("train.csv", labelled(TEXTS * 5, ["good", "bad"])), "validation": write("dev.csv", ROWS)}

    def order(seed: int, epoch: int) -> tuple[int, ...]:
        monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
        loader = prepared(text_spec(), data_files=files, batch_size=2).train_dataloader()
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        return tuple(index for batch in loader for index in batch["index"].tolist())

    assert order(0, 0) == order(0, 0)
    assert len({order(0, 0), order(0, 1), order(1, 0)}) == 3

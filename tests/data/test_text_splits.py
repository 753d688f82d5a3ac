from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
from transformers import AutoTokenizer

from lopa_lightning.backbones.text_spec import TextSpec
from lopa_lightning.data import TextClassificationDataModule
from lopa_lightning.data.template import Tokenize
from lopa_lightning.errors import LoPAError
from tests.data.conftest import SpecOf
from tests.data.helpers import labelled, prepared, rows_of, texts_of, write

TEXTS = [f"film {i}" for i in range(60)]
LABEL_OF = {text: ["good", "bad", "bad"][i % 3] for i, text in enumerate(TEXTS)}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def files() -> dict[str, str | list[str]]:
    return {"train": write("train.csv", labelled(TEXTS, ["good", "bad", "bad"]))}


@pytest.fixture
def spec(text_spec: SpecOf) -> TextSpec:
    return text_spec("gpt2")  # whose tokens decode to the very text


def train_texts(data: TextClassificationDataModule) -> list[str]:
    return texts_of(data, data.train_dataloader())


def val_texts(data: TextClassificationDataModule) -> list[str]:
    return texts_of(data, data.val_dataloader()[0])


# Validation sets


def test_without_a_validation_split_a_share_of_training_is_kept_apart(spec: TextSpec, files: Any) -> None:
    data = prepared(spec, data_files=files, validation_fraction=0.25)
    assert (len(train_texts(data)), len(val_texts(data))) == (45, 15)
    assert sorted(train_texts(data) + val_texts(data)) == sorted(TEXTS)


def test_a_part_of_the_training_examples_serves_to_choose_by(spec: TextSpec, files: Any) -> None:
    """Of the very examples that would have been trained on, and not of the validation split."""
    files["validation"] = write("validation.csv", labelled(["other film"], ["good"]))
    options = {"data_files": files, "max_train_examples": 40}
    held_out = prepared(spec, validation_from_train=0.25, **options)
    assert (len(train_texts(held_out)), len(val_texts(held_out))) == (30, 10)
    assert sorted(train_texts(held_out) + val_texts(held_out)) == sorted(train_texts(prepared(spec, **options)))
    assert val_texts(held_out) == val_texts(prepared(spec, "validate", validation_from_train=0.25, **options))


@pytest.mark.parametrize("drawn", [{}, {"max_train_examples": 20}, {"shots_per_label": 8}], ids=str)
@pytest.mark.parametrize("named", [{}, {"val": "train"}], ids=str)
def test_what_is_chosen_by_is_not_what_is_reported(
    spec: TextSpec, files: Any, named: dict[str, str], drawn: dict[str, int]
) -> None:
    """Where the reported validation set is itself cut from the training split."""
    options: dict[str, Any] = {"data_files": files, "validation_fraction": 0.25, "splits": named, **drawn}
    reported = prepared(spec, **options)
    chooses = prepared(spec, validation_from_train=0.25, **options)
    assert len(val_texts(reported)) == 15
    assert sorted(train_texts(chooses) + val_texts(chooses)) == sorted(train_texts(reported))
    assert len(val_texts(chooses)) == -(-len(train_texts(reported)) // 4)
    assert {*val_texts(reported)}.isdisjoint([*train_texts(chooses), *val_texts(chooses)])
    assert val_texts(chooses) == val_texts(prepared(spec, "validate", validation_from_train=0.25, **options))


class OfDev(TextClassificationDataModule):
    """Has a rule of its own for what is validated on."""

    def splits_of(self, role: Any) -> list[str]:
        return ["dev"] if role == "val" and not self.validation_from_train else super().splits_of(role)


def test_all_of_training_is_trained_on_where_a_subclass_validates_on_another_split(spec: TextSpec, files: Any) -> None:
    files["dev"] = write("dev.csv", labelled(["other film"], ["good"]))
    options: dict[str, Any] = {"text_columns": ["text"], "label_column": "label", "labels": ["good", "bad"]}
    counts = []
    for share in (0.0, 0.25):
        data = OfDev(data_files=files, validation_from_train=share, **options)
        counts.append([len(data.load_split(data.splits_of(role)[0], role)) for role in ("train", "val")])
    assert counts == [[60, 1], [45, 15]]


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_share_must_leave_examples_to_train_on(files: Any, share: float) -> None:
    with pytest.raises(LoPAError, match=f"validation_from_train must be a share below 1, got {share}"):
        TextClassificationDataModule(data_files=files, labels=["good", "bad"], validation_from_train=share)


def test_what_is_kept_apart_is_drawn_by_seed(spec: TextSpec, files: Any) -> None:
    def drawn(seed: int, stage: str = "fit") -> list[str]:
        return val_texts(prepared(spec, stage, data_files=files, subset_seed=seed))

    assert drawn(0) == drawn(0) == drawn(0, "validate")
    assert set(drawn(0)) != set(drawn(1))
    assert drawn(0) != TEXTS[-6:]


def test_a_validation_split_is_used_where_there_is_one(spec: TextSpec, files: Any) -> None:
    files["validation"] = write("dev.csv", labelled(["a story"], ["good"]))
    data = prepared(spec, data_files=files)
    assert train_texts(data) == TEXTS
    assert val_texts(data) == ["a story"]


def test_validating_needs_no_training_split(spec: TextSpec) -> None:
    files = {"validation": write("dev.csv", labelled(["a story"], ["good"]))}
    assert val_texts(prepared(spec, "validate", data_files=files)) == ["a story"]


def test_each_role_can_be_given_its_split(spec: TextSpec) -> None:
    names = ["one", "two", "three", "four"]
    files = {name: write(f"{name}.csv", labelled([f"{name} film"], ["good"])) for name in names}
    splits = {"train": "four", "val": "three", "test": "two", "predict": "one"}
    data = TextClassificationDataModule(data_files=dict(files), splits=splits, labels=["bad", "good"])
    data.connect(spec)
    for stage in ("fit", "test", "predict"):
        data.setup(stage)
    assert train_texts(data) == ["four film"]
    assert val_texts(data) == ["three film"]
    assert texts_of(data, data.test_dataloader()[0]) == ["two film"]
    assert texts_of(data, data.predict_dataloader()[0]) == ["one film"]


def test_prediction_is_on_the_test_split(spec: TextSpec, files: Any) -> None:
    files["test"] = write("test.csv", labelled(["a story"], ["good"]))
    data = prepared(spec, "predict", data_files=files)
    assert texts_of(data, data.predict_dataloader()[0]) == ["a story"]


# Parts of the training split


def test_at_most_so_many_examples_are_trained_on(spec: TextSpec, files: Any) -> None:
    def drawn(count: int, seed: int = 0) -> list[str]:
        return train_texts(prepared(spec, data_files=files, max_train_examples=count, subset_seed=seed))

    assert len(drawn(20)) == 20
    assert len(set(drawn(20))) == 20
    assert drawn(20) == drawn(20)
    assert set(drawn(20)) != set(drawn(20, seed=1))
    assert len(drawn(1000)) == 54


def test_a_part_of_training_leaves_validation_as_it_is(spec: TextSpec, files: Any) -> None:
    whole = prepared(spec, data_files=files)
    part = prepared(spec, data_files=files, max_train_examples=20)
    assert val_texts(part) == val_texts(whole)
    assert set(train_texts(part)) < set(train_texts(whole))


def test_so_many_shots_of_each_label_are_trained_on(spec: TextSpec, files: Any) -> None:
    def drawn(seed: int) -> list[str]:
        return train_texts(prepared(spec, data_files=files, shots_per_label=4, subset_seed=seed))

    assert Counter(LABEL_OF[text] for text in drawn(0)) == {"good": 4, "bad": 4}
    assert drawn(0) == drawn(0)
    assert set(drawn(0)) != set(drawn(1))


def test_shots_count_by_what_the_label_column_means(spec: TextSpec) -> None:
    files = {"train": write("train.jsonl", labelled(TEXTS, [7, 3, 3]))}
    data = prepared(spec, data_files=files, label_values=["3", "7"], shots_per_label=5)
    rows = rows_of(data.train_dataloader())
    assert Counter(row["labels"] for row in rows) == {0: 5, 1: 5}


# The cache


class TokenisedAgainError(Exception):
    pass


@pytest.fixture
def refuse_to_tokenise(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def refuse(*_: Any) -> NoReturn:
        raise TokenisedAgainError

    return lambda: monkeypatch.setattr(Tokenize, "__call__", refuse)


REVIEW = {"template": ["{text} . It was {mask} ."], "words": ["bad", "good"]}


def test_a_second_run_reads_tokens_from_the_cache(
    tiny: Callable[[str], str], files: Any, refuse_to_tokenise: Callable[[], None]
) -> None:
    def spec() -> TextSpec:  # loaded anew, as a second run would
        bert, roberta = (AutoTokenizer.from_pretrained(tiny(kind)) for kind in ("bert", "roberta"))
        return TextSpec(bert, 20, "masked_lm", roberta, 20)

    first = prepared(spec(), data_files=files, max_train_examples=20, **REVIEW)
    refuse_to_tokenise()
    second = prepared(spec(), data_files=files, max_train_examples=20, **REVIEW)
    assert rows_of(second.train_dataloader()) == rows_of(first.train_dataloader())
    assert rows_of(second.val_dataloader()[0]) == rows_of(first.val_dataloader()[0])


def test_a_tokenizer_used_otherwise_in_between_is_still_the_same(
    text_spec: SpecOf, files: Any, refuse_to_tokenise: Callable[[], None]
) -> None:
    spec = text_spec("roberta", instance="bert")
    first = prepared(spec, data_files=files)
    for tokenizer in (spec.tokenizer, spec.instance_tokenizer):
        assert tokenizer is not None
        tokenizer(["a film", "a"], truncation=True, max_length=3, padding="max_length")
    refuse_to_tokenise()
    second = prepared(spec, data_files=files)
    assert rows_of(second.train_dataloader()) == rows_of(first.train_dataloader())


def test_a_split_that_serves_two_roles_is_tokenised_once(
    spec: TextSpec, files: Any, refuse_to_tokenise: Callable[[], None]
) -> None:
    files["validation"] = write("dev.csv", labelled(["a story"], ["good"]))
    prepared(spec, "validate", data_files=files)
    refuse_to_tokenise()
    data = prepared(spec, "test", data_files=files, splits={"test": "validation"})
    assert texts_of(data, data.test_dataloader()[0]) == ["a story"]


@pytest.mark.filterwarnings("ignore:.*texts were cut")
@pytest.mark.parametrize(
    "change",
    [
        {"template": ["{text} . That is {mask} ."]},
        {"max_length": 9},
        {"truncation_side": "left"},
        {"labels": ["good", "bad"]},
        {"subset_seed": 1},
        {"shots_per_label": 3},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_setting_does_not_read_the_cache(
    text_spec: SpecOf, files: Any, refuse_to_tokenise: Callable[[], None], change: dict[str, Any]
) -> None:
    spec = text_spec("bert", "masked_lm", max_tokens=12)
    prepared(spec, data_files=files, **REVIEW)
    refuse_to_tokenise()
    prepared(spec, data_files=files, **REVIEW)
    with pytest.raises(TokenisedAgainError):
        prepared(spec, data_files=files, **{**REVIEW, **change})


@pytest.mark.parametrize(
    "other",
    [
        {"kind": "roberta", "instance": "bert"},
        {"kind": "bert", "instance": "roberta"},
        {"kind": "bert"},
        {"kind": "bert", "instance": "bert", "instance_max_tokens": 3},
        {"kind": "bert", "instance": "bert", "objective": "masked_lm"},
    ],
    ids=str,
)
def test_another_model_does_not_read_the_cache(
    text_spec: SpecOf, files: Any, refuse_to_tokenise: Callable[[], None], other: dict[str, Any]
) -> None:
    prepared(text_spec("bert", instance="bert"), data_files=files, **REVIEW)
    refuse_to_tokenise()
    with pytest.raises(TokenisedAgainError):
        prepared(text_spec(**other), data_files=files, **REVIEW)


def test_another_content_of_a_file_does_not_read_the_cache(spec: TextSpec, files: Any) -> None:
    prepared(spec, data_files=files)
    others = [text[::-1] for text in TEXTS]
    write("train.csv", labelled(others, ["good", "bad", "bad"]))
    data = prepared(spec, data_files=files)
    assert sorted(train_texts(data) + val_texts(data)) == sorted(others)


def test_prediction_does_not_read_what_was_tokenised_with_labels(spec: TextSpec, files: Any) -> None:
    files["test"] = write("test.csv", labelled(["a story"], ["good"]))
    assert "labels" in rows_of(prepared(spec, "test", data_files=files).test_dataloader()[0])[0]
    assert "labels" not in rows_of(prepared(spec, "predict", data_files=files).predict_dataloader()[0])[0]

from __future__ import annotations

import dataclasses
import re

import pytest

from lopa_lightning.errors import LoPAError
from lopa_lightning.task import Task, Verbalizer

LABELS = ["bad", "good"]


def test_classes_have_an_output_each_and_are_scored_by_accuracy() -> None:
    task = Task(["no", "maybe", "yes"])
    assert (task.is_regression, task.num_outputs, task.official_metrics) == (False, 3, ["accuracy"])


def test_regression_has_one_output_and_is_scored_by_correlation() -> None:
    task = Task([])
    assert (task.is_regression, task.num_outputs, task.official_metrics) == (True, 1, ["pearson", "spearman"])


def test_named_metrics_are_the_official_ones() -> None:
    assert Task(LABELS, metrics=["matthews"]).official_metrics == ["matthews"]
    assert Task(LABELS, metrics=[]).official_metrics == []  # the score is the negative loss
    assert Task([], metrics=["spearman"]).official_metrics == ["spearman"]


def test_there_is_one_evaluation_set_without_a_suffix_unless_more_are_named() -> None:
    assert Task(LABELS).suffixes == [""]
    assert Task(LABELS, eval_sets=["", "_mismatched"]).suffixes == ["", "_mismatched"]


def test_a_task_does_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Task(LABELS).labels = ["good", "bad"]  # type: ignore[misc]


@pytest.mark.parametrize("labels", [["good"], ["good", "good"], ["bad", "good", "bad"]])
def test_labels_are_at_least_two_and_differ(labels: list[str]) -> None:
    with pytest.raises(
        LoPAError, match=re.escape(f"at least two different names, or none for regression; got {labels}")
    ):
        Task(labels)


@pytest.mark.parametrize("words", [[], ["terrible"], ["terrible", "so", "great"]])
def test_there_is_one_word_for_each_label(words: list[str]) -> None:
    with pytest.raises(LoPAError, match=re.escape(f"one word for each label, got labels {LABELS} and words {words}")):
        Task(LABELS, verbalizer=Verbalizer(words))


def test_words_differ() -> None:
    with pytest.raises(LoPAError, match=re.escape("['great', 'great']")):
        Verbalizer(["great", "great"])


def test_regression_has_no_words() -> None:
    with pytest.raises(LoPAError, match=re.escape("got labels [] and words ['great']")):
        Task([], verbalizer=Verbalizer(["great"]))


def test_several_labels_have_no_words() -> None:
    assert Task(LABELS, multi_label=True).official_metrics == ["f1"]
    for wrong in ({"labels": []}, {"labels": LABELS, "verbalizer": Verbalizer(["terrible", "great"])}):
        with pytest.raises(LoPAError, match="multi_label needs labels, and no words"):
            Task(**wrong, multi_label=True)

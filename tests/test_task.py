from __future__ import annotations

import dataclasses
import re

import pytest

from lopa_lightning.errors import LoPAError
from lopa_lightning.task import TextTask

LABELS = ["bad", "good"]


def test_classes_have_an_output_each_and_are_scored_by_accuracy() -> None:
    task = TextTask(["no", "maybe", "yes"])
    assert (task.is_regression, task.num_outputs, task.official_metrics) == (False, 3, ["accuracy"])


def test_regression_has_one_output_and_is_scored_by_correlation() -> None:
    task = TextTask([])
    assert (task.is_regression, task.num_outputs, task.official_metrics) == (True, 1, ["pearson", "spearman"])


def test_named_metrics_are_the_official_ones() -> None:
    assert TextTask(LABELS, metrics=["matthews"]).official_metrics == ["matthews"]
    assert TextTask([], metrics=["spearman"]).official_metrics == ["spearman"]


def test_there_is_one_evaluation_set_without_a_suffix_unless_more_are_named() -> None:
    assert TextTask(LABELS).suffixes == [""]
    assert TextTask(LABELS, eval_sets=["", "_mismatched"]).suffixes == ["", "_mismatched"]


def test_a_task_does_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TextTask(LABELS).labels = ["good", "bad"]  # type: ignore[misc]


@pytest.mark.parametrize("labels", [["good"], ["good", "good"], ["bad", "good", "bad"]])
def test_labels_are_at_least_two_and_differ(labels: list[str]) -> None:
    with pytest.raises(
        LoPAError, match=re.escape(f"at least two different names, or none for regression; got {labels}")
    ):
        TextTask(labels)


@pytest.mark.parametrize("words", [[], ["terrible"], ["terrible", "so", "great"]])
def test_there_is_one_word_for_each_label(words: list[str]) -> None:
    with pytest.raises(LoPAError, match=re.escape(f"one word for each label, got labels {LABELS} and words {words}")):
        TextTask(LABELS, words)


def test_words_differ() -> None:
    with pytest.raises(LoPAError, match=re.escape("['great', 'great']")):
        TextTask(LABELS, ["great", "great"])


def test_regression_has_no_words() -> None:
    with pytest.raises(LoPAError, match=re.escape("got labels [] and words ['great']")):
        TextTask([], ["great"])

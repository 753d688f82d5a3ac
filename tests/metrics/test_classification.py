from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torchmetrics import MetricCollection

from lopa_lightning.errors import LoPAError
from lopa_lightning.metrics.classification import LabelVariance, MajorityShare, build_metrics


def scores(names: list[str], classes: int, preds: list[float], target: list[float], parts: int = 1) -> dict[str, float]:
    """What the metrics say after as many batches as there are parts."""
    metrics = build_metrics(names, classes)
    for p, t in zip(torch.tensor(preds).chunk(parts), torch.tensor(target).chunk(parts)):
        metrics.update(p, t)
    return {name: float(value) for name, value in metrics.compute().items()}


@st.composite
def answers(draw: st.DrawFn) -> tuple[int, list[int], list[int]]:
    classes = draw(st.integers(2, 4))
    pairs = draw(st.lists(st.tuples(*[st.integers(0, classes - 1)] * 2), min_size=1, max_size=60))
    return classes, [p for p, _ in pairs], [t for _, t in pairs]


def f1(preds: np.ndarray, target: np.ndarray, label: int) -> float:
    hits = ((preds == label) & (target == label)).sum()
    found = (preds == label).sum() + (target == label).sum()
    return float(2 * hits / found) if found else 0.0


def matthews(preds: np.ndarray, target: np.ndarray, classes: int) -> float:
    """The correlation of both one-hot codings (Gorodkin 2004); 0 where one of them never changes, as GLUE has it."""
    p, t = np.eye(classes)[preds], np.eye(classes)[target]
    p, t = p - p.mean(0), t - t.mean(0)
    spread = np.sqrt((p * p).sum() * (t * t).sum())
    return float((p * t).sum() / spread) if spread > 1e-9 else 0.0


# Classes


@settings(max_examples=40)
@given(answers(), st.integers(1, 3))
def test_classification_metrics_follow_their_formulas(given_: tuple[int, list[int], list[int]], parts: int) -> None:
    classes, preds, target = given_
    p, t = np.array(preds), np.array(target)
    present = sorted({*preds, *target})
    macro = np.mean([f1(p, t, label) for label in present])
    read = scores(["accuracy", "f1"], classes, preds, target, parts)
    assert read["accuracy"] == pytest.approx((p == t).mean(), abs=1e-6)
    assert read["f1"] == pytest.approx(f1(p, t, 1) if classes == 2 else macro, abs=1e-6)
    assert read["majority_share"] == pytest.approx(np.bincount(t).max() / len(t), abs=1e-6)


@settings(max_examples=40)
@given(answers(), st.integers(1, 3))
def test_matthews_correlation_follows_its_formula(given_: tuple[int, list[int], list[int]], parts: int) -> None:
    classes, preds, target = given_
    assume(len(set(preds)) > 1 and len(set(target)) > 1)
    expected = matthews(np.array(preds), np.array(target), classes)
    assert scores(["matthews"], classes, preds, target, parts)["matthews"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("answer", [0, 1])
@pytest.mark.parametrize("target", [[1] * 69 + [0] * 31, [1, 1, 1], [0, 0, 1, 0]], ids=["cola-like", "one", "zero"])
def test_always_the_same_answer_has_no_matthews_correlation(target: list[int], answer: int) -> None:
    assert matthews(np.array([answer] * len(target)), np.array(target), 2) == 0
    assert scores(["matthews"], 2, [answer] * len(target), target)["matthews"] == pytest.approx(0, abs=1e-6)


def test_f1_of_two_classes_is_of_the_second() -> None:
    # Of three ones two are found, with one false alarm.
    assert scores(["f1"], 2, [1, 1, 0, 1, 0], [1, 1, 1, 0, 0])["f1"] == pytest.approx(2 / 3)
    assert scores(["f1"], 2, [0, 0, 1, 0, 1], [0, 0, 0, 1, 1])["f1"] == pytest.approx(0.5)


def test_f1_of_more_classes_is_their_mean() -> None:
    # Of class 0: 1 of 1 found, 1 false alarm. Of class 1: 1 of 2 found. Of class 2: 1 of 1 found.
    expected = (2 / 3 + 2 / 3 + 1) / 3
    assert scores(["f1"], 3, [0, 0, 1, 2], [0, 1, 1, 2])["f1"] == pytest.approx(expected)


def test_classes_always_have_accuracy_and_the_share_of_a_blind_guess() -> None:
    assert set(build_metrics(["matthews"], 2)) == {"matthews", "accuracy", "majority_share"}
    assert set(build_metrics(["accuracy", "f1"], 3)) == {"accuracy", "f1", "majority_share"}
    assert set(build_metrics([], 2)) == {"accuracy", "majority_share"}


def test_majority_share_counts_over_batches_and_ignores_answers() -> None:
    share = MajorityShare(3)
    share.update(torch.tensor([1, 1]), torch.tensor([0, 0]))
    share.update(torch.tensor([1, 1, 1]), torch.tensor([2, 2, 2]))
    assert share.compute() == pytest.approx(3 / 5)
    share.reset()
    share.update(torch.tensor([0]), torch.tensor([1]))
    assert share.compute() == 1


def test_the_counts_of_two_processes_add_up() -> None:
    halves = [MajorityShare(2) for _ in range(2)]
    halves[0].update(torch.tensor([0, 1, 0]), torch.tensor([0, 0, 1]))
    halves[1].update(torch.tensor([1, 0]), torch.tensor([1, 1]))
    halves[0].sync(lambda own, group: [own, halves[1].confmat], distributed_available=lambda: True)
    assert float(MajorityShare.compute(halves[0])) == pytest.approx(3 / 5)


# Numbers


NUMBERS = st.lists(st.tuples(*[st.integers(-40, 40).map(lambda n: n / 8)] * 2), min_size=3, max_size=40)


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, equal values sharing their mean rank."""
    return np.array([(values < v).sum() + ((values == v).sum() + 1) / 2 for v in values])


@settings(max_examples=40)
@given(NUMBERS, st.integers(1, 3))
def test_correlations_follow_their_formulas(pairs: list[tuple[float, float]], parts: int) -> None:
    preds, target = np.array(pairs).T
    assume(min(preds.std(), target.std()) > 0.05)
    read = scores(["pearson", "spearman"], 0, preds.tolist(), target.tolist(), parts)
    assert set(read) == {"pearson", "spearman", "label_variance"}
    assert read["label_variance"] == pytest.approx(target.var(), rel=1e-5)
    assert read["pearson"] == pytest.approx(np.corrcoef(preds, target)[0, 1], abs=1e-4)
    assert read["spearman"] == pytest.approx(np.corrcoef(ranks(preds), ranks(target))[0, 1], abs=1e-4)


def test_spearman_asks_for_the_order_alone() -> None:
    read = scores(["pearson", "spearman"], 0, [1.0, 2.0, 3.0, 4.0], [1.0, 10.0, 100.0, 1000.0])
    assert read["spearman"] == pytest.approx(1)
    assert read["pearson"] < 0.9


@pytest.mark.parametrize("split", [0, 1, 3])
def test_the_labels_variance_of_two_processes_is_that_of_all_also_far_from_zero(split: int) -> None:
    labels = 1e4 + torch.tensor([0.0, 1.0, 1.0, 4.0, 9.0])
    halves = [LabelVariance() for _ in range(2)]
    for half, part in zip(halves, (labels[:split], labels[split:])):
        for label in part:  # a process may have none
            half.update(torch.zeros(1), label[None])
    other = torch.cat(halves[1].value)
    halves[0].sync(lambda own, group: [own, other], distributed_available=lambda: True)
    assert float(LabelVariance.compute(halves[0])) == pytest.approx(labels.double().var(correction=0).item(), rel=1e-3)


# Names


@pytest.mark.parametrize(
    ("names", "classes", "message"),
    [
        (["accuracy", "bleu"], 2, "metrics of classification must be of accuracy, f1, matthews; got bleu"),
        (["pearson"], 3, "metrics of classification must be of accuracy, f1, matthews; got pearson"),
        (["accuracy", "f1"], 0, "metrics of regression must be of pearson, spearman; got accuracy, f1"),
    ],
)
def test_unknown_names_are_refused_with_those_there_are(names: list[str], classes: int, message: str) -> None:
    with pytest.raises(LoPAError) as error:
        build_metrics(names, classes)
    assert str(error.value) == message


def test_a_name_given_twice_counts_once() -> None:
    metrics = build_metrics(["f1", "f1"], 2)
    assert isinstance(metrics, MetricCollection)
    assert len(metrics) == 3

"""Builds torchmetrics' metrics by name, with those of the majority baseline."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import CatMetric, Metric, MetricCollection, classification, regression

from lopa_lightning.errors import LoPAError
from lopa_lightning.task import IGNORED, is_bio

_CLASSIFICATION: dict[str, Callable[[int], Metric]] = {
    "accuracy": lambda n: classification.MulticlassAccuracy(n, average="micro", ignore_index=IGNORED),
    "f1": lambda n: (
        classification.BinaryF1Score(ignore_index=IGNORED)
        if n == 2
        else classification.MulticlassF1Score(n, average="macro", ignore_index=IGNORED)
    ),
    "matthews": lambda n: Matthews(n, ignore_index=IGNORED),
}
_SPANS = {"span_f1": 0.5, "span_precision": 1.0, "span_recall": 0.0}  # weight of precision
_MULTI_LABEL: dict[str, Callable[[int], Metric]] = {
    "accuracy": lambda n: classification.MultilabelAccuracy(n, average="micro"),
    "f1": lambda n: classification.MultilabelF1Score(n, average="micro"),
    "macro_f1": lambda n: classification.MultilabelF1Score(n, average="macro"),
    "exact_match": lambda n: classification.MultilabelExactMatch(n),
}
_REGRESSION: dict[str, Callable[[int], Metric]] = {
    "pearson": lambda _: regression.PearsonCorrCoef(),
    "spearman": lambda _: regression.SpearmanCorrCoef(),
}


class Matthews(classification.MulticlassMatthewsCorrCoef):
    """Computes Matthews' correlation, 0 where predictions or labels never change, as GLUE has it.

    Example:
        >>> matthews = Matthews(2)
        >>> matthews.update(torch.tensor([0, 0, 0, 0]), torch.tensor([0, 0, 1, 0]))
        >>> matthews.compute()
        tensor(0.)
    """

    def compute(self) -> Tensor:
        """Returns the correlation, between -1 and 1."""
        if min((self.confmat.sum(axis) > 0).sum() for axis in (0, 1)) < 2:
            return self.confmat.new_zeros((), dtype=torch.float)
        return super().compute()


class MajorityShare(classification.MulticlassConfusionMatrix):
    """Computes the share of the most frequent label: the accuracy of always predicting it.

    Example:
        >>> share = MajorityShare(3)
        >>> share.update(torch.tensor([0, 0, 0, 0]), torch.tensor([2, 2, 2, 0]))
        >>> share.compute()
        tensor(0.7500)
    """

    def compute(self) -> Tensor:
        """Returns the share, between 0 and 1."""
        return self.confmat.sum(1).max() / self.confmat.sum()


class LabelVariance(CatMetric):
    """Computes the variance of the labels: the mean squared error of always predicting their mean.

    Example:
        >>> variance = LabelVariance()
        >>> variance.update(torch.zeros(4), torch.tensor([1.0, 1.0, 3.0, 3.0]))
        >>> variance.compute()
        tensor(1.)
    """

    def update(self, preds: Tensor, target: Tensor) -> None:  # type: ignore[override]
        """Adds the labels ``[B]`` of a batch."""
        super().update(target)

    def compute(self) -> Tensor:
        """Returns the variance of all processes' labels together."""
        return super().compute().var(correction=0)


class SpanScore(Metric):
    """Computes the F1 of spans of words, or their precision or recall, over all types together.

    A span is right if its type, its first and its last word are. It begins at a ``B-``, and at an ``I-`` that goes on
    no span of its type, as in CoNLL's own script and in seqeval.

    Args:
        labels: Names of the labels: ``B-`` and ``I-`` with a type, and ``O``.
        precision_weight: 0.5 for F1, 1 for precision, 0 for recall.

    Example:
        >>> f1 = SpanScore(["O", "B-PER", "I-PER"])
        >>> f1.update(torch.tensor([[1, 2, 0, 1]]), torch.tensor([[1, 2, 0, 0]]))
        >>> f1.compute()
        tensor(0.6667)
    """

    higher_is_better = True

    right: Tensor
    predicted: Tensor
    wanted: Tensor
    types: Tensor
    begins: Tensor

    def __init__(self, labels: Sequence[str], precision_weight: float = 0.5) -> None:
        super().__init__()
        self.precision_weight, self.outside = precision_weight, len(labels)
        types = {kind: number for number, kind in enumerate(dict.fromkeys(["", *(name[2:] for name in labels)]))}
        self.register_buffer("types", torch.tensor([*(types[name[2:]] for name in labels), 0]), persistent=False)
        self.register_buffer("begins", torch.tensor([*(name.startswith("B-") for name in labels), False]), False)
        for name in ("right", "predicted", "wanted"):
            self.add_state(name, torch.tensor(0), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Adds a batch.

        Args:
            preds: Labels ``[B, T]``.
            target: Labels ``[B, T]``, :data:`~lopa_lightning.task.IGNORED` where there is none.
        """
        kept = F.pad(target != IGNORED, (0, 1), value=True)  # after each row a word outside, so that no span goes on
        (begins, types, ends), (own_begins, own_types, own_ends) = (
            self._spans(F.pad(labels, (0, 1), value=self.outside)[kept]) for labels in (preds, target)
        )
        self.right += (begins & own_begins & (types == own_types) & (ends == own_ends)).sum()
        self.predicted += begins.sum()
        self.wanted += own_begins.sum()

    def _spans(self, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns of words ``[N]`` whether a span begins, its type, and the number of the first word after it."""
        types = self.types[labels]
        goes_on = (types > 0) & ~self.begins[labels] & (types == types.roll(1))
        numbers = torch.arange(len(labels), device=labels.device).masked_fill(goes_on, len(labels))
        return (types > 0) & ~goes_on, types, numbers.flip(0).cummin(0).values.flip(0).roll(-1)

    def compute(self) -> Tensor:
        """Returns the score, 0 where there are no spans."""
        found = self.precision_weight * self.predicted + (1 - self.precision_weight) * self.wanted
        return self.right / found.clamp(min=0.5)


def build_metrics(
    names: Sequence[str], num_labels: int, multi_label: bool = False, word_labels: Sequence[str] = ()
) -> MetricCollection:
    """Builds the metrics of a task.

    Args:
        names: ``accuracy``, ``f1`` (of class 1 if there are two classes, else macro) and ``matthews``
            for classes; ``accuracy``, ``f1`` (both over all labels of all examples), ``macro_f1`` and ``exact_match``
            where an example may have several; ``span_f1``, ``span_precision`` and ``span_recall`` where those of its
            words mark spans; ``pearson`` and ``spearman`` for numbers.
        num_labels: Number of classes; 0 for regression.
        multi_label: Whether an example may have several labels.
        word_labels: Names of the labels, where each word has one.

    Returns:
        The metrics under their names. With one class each, always ``accuracy`` and ``majority_share`` as well; with
        several, ``accuracy`` and ``exact_match``; with labels that mark spans, those of spans; for regression,
        ``label_variance``.

    Raises:
        LoPAError: If a name is unknown, or none of this kind of task.

    Example:
        >>> sorted(build_metrics(["matthews"], num_labels=2))
        ['accuracy', 'majority_share', 'matthews']
    """
    known = _MULTI_LABEL if multi_label else _CLASSIFICATION if num_labels else _REGRESSION
    spans = _SPANS if word_labels and is_bio(word_labels) else {}
    if unknown := [name for name in names if name not in {*known, *spans}]:
        kind = "several labels" if multi_label else "classification" if num_labels else "regression"
        if word_labels and not spans:
            kind = "words, whose labels are not O and the B- and I- of spans,"
        raise LoPAError(f"metrics of {kind} must be of {', '.join([*known, *spans])}; got {', '.join(unknown)}")
    metrics: dict[str, Metric | MetricCollection] = {name: known[name](num_labels) for name in names if name in known}
    metrics |= {name: SpanScore(word_labels, weight) for name, weight in spans.items()}
    if multi_label:
        metrics |= {name: known[name](num_labels) for name in ("accuracy", "exact_match")}
    elif num_labels:
        metrics |= {
            "accuracy": known["accuracy"](num_labels),
            "majority_share": MajorityShare(num_labels, ignore_index=IGNORED),
        }
    else:
        metrics["label_variance"] = LabelVariance()
    # Without compute groups: their merging of equal states would need a first update on every process.
    return MetricCollection(metrics, compute_groups=False)

"""Builds torchmetrics' metrics by name, with those of the majority baseline."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchmetrics import CatMetric, Metric, MetricCollection, classification, regression

from lopa_lightning.errors import LoPAError

_CLASSIFICATION: dict[str, Callable[[int], Metric]] = {
    "accuracy": lambda n: classification.MulticlassAccuracy(n, average="micro"),
    "f1": lambda n: classification.BinaryF1Score() if n == 2 else classification.MulticlassF1Score(n, average="macro"),
    "matthews": lambda n: Matthews(n),
}
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


def build_metrics(names: Sequence[str], num_labels: int, multi_label: bool = False) -> MetricCollection:
    """Builds the metrics of a task.

    Args:
        names: ``accuracy``, ``f1`` (of class 1 if there are two classes, else macro) and ``matthews``
            for classes; ``accuracy``, ``f1`` (both over all labels of all examples), ``macro_f1`` and ``exact_match``
            where an example may have several; ``pearson`` and ``spearman`` for numbers.
        num_labels: Number of classes; 0 for regression.
        multi_label: Whether an example may have several labels.

    Returns:
        The metrics under their names. With one class each, always ``accuracy`` and ``majority_share`` as well; with
        several, ``accuracy`` and ``exact_match``; for regression, ``label_variance``.

    Raises:
        LoPAError: If a name is unknown, or none of this kind of task.

    Example:
        >>> sorted(build_metrics(["matthews"], num_labels=2))
        ['accuracy', 'majority_share', 'matthews']
    """
    known = _MULTI_LABEL if multi_label else _CLASSIFICATION if num_labels else _REGRESSION
    if unknown := [name for name in names if name not in known]:
        kind = "several labels" if multi_label else "classification" if num_labels else "regression"
        raise LoPAError(f"metrics of {kind} must be of {', '.join(known)}; got {', '.join(unknown)}")
    metrics: dict[str, Metric | MetricCollection] = {name: known[name](num_labels) for name in names}
    if multi_label:
        metrics |= {name: known[name](num_labels) for name in ("accuracy", "exact_match")}
    elif num_labels:
        metrics |= {"accuracy": known["accuracy"](num_labels), "majority_share": MajorityShare(num_labels)}
    else:
        metrics["label_variance"] = LabelVariance()
    # Without compute groups: their merging of equal states would need a first update on every process.
    return MetricCollection(metrics, compute_groups=False)

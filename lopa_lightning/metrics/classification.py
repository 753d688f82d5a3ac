"""Metrics by name, all from torchmetrics, and what a blind guess would get."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import (
    BinaryF1Score,
    MulticlassAccuracy,
    MulticlassF1Score,
    MulticlassMatthewsCorrCoef,
)
from torchmetrics.regression import PearsonCorrCoef, SpearmanCorrCoef

from lopa_lightning.errors import LoPAError

_CLASSIFICATION: dict[str, Callable[[int], Metric]] = {
    "accuracy": lambda n: MulticlassAccuracy(n, average="micro"),
    "f1": lambda n: BinaryF1Score() if n == 2 else MulticlassF1Score(n, average="macro"),
    "matthews": lambda n: Matthews(n),
}
_REGRESSION: dict[str, Callable[[int], Metric]] = {
    "pearson": lambda _: PearsonCorrCoef(),
    "spearman": lambda _: SpearmanCorrCoef(),
}


class Matthews(MulticlassMatthewsCorrCoef):
    """Matthews' correlation, 0 where answers or labels never change, as GLUE has it.

    Example:
        >>> matthews = Matthews(2)
        >>> matthews.update(torch.tensor([0, 0, 0, 0]), torch.tensor([0, 0, 1, 0]))
        >>> matthews.compute()
        tensor(0.)
    """

    def compute(self) -> Tensor:
        """The correlation, between -1 and 1."""
        if min((self.confmat.sum(axis) > 0).sum() for axis in (0, 1)) < 2:
            return self.confmat.new_zeros((), dtype=torch.float)
        return super().compute()


class MajorityShare(Metric):
    """Share of the most frequent label: the accuracy of always answering it.

    Args:
        num_labels: Number of classes.

    Example:
        >>> share = MajorityShare(3)
        >>> share.update(torch.tensor([0, 0, 0, 0]), torch.tensor([2, 2, 2, 0]))
        >>> share.compute()
        tensor(0.7500)
    """

    full_state_update = False
    higher_is_better = None
    is_differentiable = False
    counts: Tensor

    def __init__(self, num_labels: int) -> None:
        super().__init__()
        self.add_state("counts", torch.zeros(num_labels, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Counts the labels of a batch.

        Args:
            preds: Ignored.
            target: Class indices ``[B]``.
        """
        self.counts += torch.bincount(target, minlength=len(self.counts))

    def compute(self) -> Tensor:
        """The share, between 0 and 1."""
        return self.counts.max() / self.counts.sum()


class LabelVariance(Metric):
    """Variance of the labels: the mean squared error of always predicting their mean.

    Example:
        >>> variance = LabelVariance()
        >>> variance.update(torch.zeros(4), torch.tensor([1.0, 1.0, 3.0, 3.0]))
        >>> variance.compute()
        tensor(1.)
    """

    full_state_update = False
    higher_is_better = None
    is_differentiable = False
    moments: Tensor

    def __init__(self) -> None:
        super().__init__()
        # Number, mean and sum of squared differences from it, which keep their digits where squares would not.
        self.add_state("moments", torch.zeros(3), dist_reduce_fx=None)

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Adds the labels of a batch.

        Args:
            preds: Ignored.
            target: Numbers ``[B]``.
        """
        labels = target.float()
        mean = labels.mean()
        batch = torch.stack([mean.new_tensor(len(labels)), mean, (labels - mean).square().sum()])
        self.moments = _together(torch.stack([self.moments, batch]))

    def compute(self) -> Tensor:
        """The variance, of all processes' labels together."""
        number, _, squares = _together(self.moments.view(-1, 3))
        variance: Tensor = squares / number
        return variance


def _together(moments: Tensor) -> Tensor:
    """Number, mean and sum of squared differences of several parts ``[P, 3]`` together (Chan et al. 1979)."""
    numbers, means, squares = moments.unbind(-1)
    mean = (numbers * means).sum() / numbers.sum()
    return torch.stack([numbers.sum(), mean, (squares + numbers * (means - mean).square()).sum()])


def build_metrics(names: Sequence[str], num_labels: int) -> MetricCollection:
    """Builds the metrics of a task.

    Args:
        names: ``accuracy``, ``f1`` (of class 1 if there are two classes, else macro) and ``matthews``
            for classes; ``pearson`` and ``spearman`` for numbers.
        num_labels: Number of classes; 0 for regression.

    Returns:
        The metrics under their names. With classes, always ``accuracy`` and ``majority_share`` as well; without,
        ``label_variance``.

    Raises:
        LoPAError: If a name is unknown, or none of this kind of task.

    Example:
        >>> sorted(build_metrics(["matthews"], num_labels=2))
        ['accuracy', 'majority_share', 'matthews']
    """
    known = _CLASSIFICATION if num_labels else _REGRESSION
    if unknown := [name for name in names if name not in known]:
        kind = "classification" if num_labels else "regression"
        raise LoPAError(f"metrics of {kind} must be of {', '.join(known)}; got {', '.join(unknown)}")
    wanted = dict.fromkeys([*names, "accuracy"] if num_labels else names)
    metrics: dict[str, Metric | MetricCollection] = {name: known[name](num_labels) for name in wanted}
    if num_labels:
        metrics["majority_share"] = MajorityShare(num_labels)
    else:
        metrics["label_variance"] = LabelVariance()
    # Without compute groups: their merging of equal states would need a first update on every process.
    return MetricCollection(metrics, compute_groups=False)

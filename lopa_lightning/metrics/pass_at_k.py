"""Estimates the chance that one of k samples is right (Chen et al. 2021, https://arxiv.org/abs/2107.03374)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat
from torchmetrics.utilities.distributed import gather_all_tensors

from lopa_lightning.errors import LoPAError

_SKIPPED = -1
_QUANTILE = 1.959963984540054  # of the normal distribution, at 97.5 %


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Returns the share of the sets of ``k`` among the samples of a problem that have a correct one.

    That is ``1 - C(n - c, k) / C(n, k)``, the unbiased estimate of Chen et al. (2021), equation 1.

    Args:
        samples: n, how many were drawn.
        correct: c, how many of them pass.
        k: How many one may submit.

    Raises:
        LoPAError: If not ``0 <= correct <= samples`` and ``1 <= k <= samples``.

    Example:
        >>> pass_at_k(5, 2, 1), pass_at_k(5, 2, 4)
        (0.4, 1.0)
    """
    if not 0 <= correct <= samples or not 1 <= k <= samples:
        raise LoPAError(
            f"pass@k needs 1 <= k <= samples and 0 <= correct <= samples, got k={k}, samples={samples}, "
            f"correct={correct}"
        )
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


class PassAtK(Metric):
    """Computes the mean of :func:`pass_at_k` over the problems, with its 95 % confidence interval.

    The samples of a problem may come in any order, in several batches, and on several processes. The
    interval is Wilson's, for the problems as a sample of those that could have been asked. Each problem's value v
    is a share and not only 0 or 1, so it varies less than Wilson supposes; the number of problems n is replaced by the
    effective one, ``n p (1 - p) / var(v)``, at most the number of samples. With one sample for each problem this is
    Wilson's own interval, and it has a width where none or all are solved.

    A benchmark's harness may skip samples, as CRUXEval's does. Skipped samples of a problem with one that passes are
    left out of n, which raises pass@k; where none passes they count. Where fewer than k are left, the value is 1.

    Args:
        k: Which to report.

    Raises:
        LoPAError: If a ``k`` is less than 1, or there is none.

    Example:
        >>> metric = PassAtK(k=[1, 2])
        >>> metric.update(torch.tensor([7, 7, 8, 8]), torch.tensor([True, False, False, False]))
        >>> {name: round(float(value), 3) for name, value in metric.compute().items()}
        {'pass@1': 0.25, 'pass@1_low': 0.046, 'pass@1_high': 0.699,
         'pass@2': 0.5, 'pass@2_low': 0.095, 'pass@2_high': 0.905}
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False
    problems: list[Tensor]
    passed: list[Tensor]

    def __init__(self, k: Sequence[int] = (1,)) -> None:
        super().__init__(dist_sync_fn=_gather_integers)
        if not k or min(k) < 1:
            raise LoPAError(f"k must be numbers from 1 on, got {list(k)}")
        self.k = tuple(dict.fromkeys(k))
        self.add_state("problems", [], dist_reduce_fx="cat")
        self.add_state("passed", [], dist_reduce_fx="cat")

    def update(self, problems: Tensor, passed: Tensor, skipped: Tensor | None = None) -> None:
        """Adds samples.

        Args:
            problems: Which problem each sample answers, any integers ``[N]``.
            passed: Whether it is right ``[N]``.
            skipped: Whether the harness skips it ``[N]``; it then counts as not right.
        """
        self.problems.append(problems.long())
        self.passed.append(passed.long() if skipped is None else passed.long().masked_fill(skipped.bool(), _SKIPPED))

    def compute(self) -> dict[str, Tensor]:
        """Returns ``pass@k``, ``pass@k_low`` and ``pass@k_high`` for each k; NaN before any sample.

        Raises:
            LoPAError: If a problem has fewer samples than a ``k``.
        """
        # Lists of tensors here, one tensor where the processes' were put together.
        nothing = torch.zeros(0, dtype=torch.long, device=self.device)
        problems, passed = (dim_zero_cat(state) if len(state) else nothing for state in (self.problems, self.passed))
        _, which, samples = torch.unique(problems, return_inverse=True, return_counts=True)
        of = (torch.bincount(which[passed == value], minlength=len(samples)) for value in (1, _SKIPPED))
        counts = torch.stack([samples, *of], 1).tolist()
        values: dict[str, Tensor] = {}
        for k in self.k:
            shares = torch.tensor([_share(n, c, s, k) for n, c, s in counts], dtype=torch.float64, device="cpu")
            low, high = _interval(shares, len(problems))
            values |= {f"pass@{k}": shares.mean(), f"pass@{k}_low": low, f"pass@{k}_high": high}
        return {name: value.float().to(self.device) for name, value in values.items()}


def _share(samples: int, correct: int, skipped: int, k: int) -> float:
    """Returns :func:`pass_at_k` by the rule of CRUXEval's harness for skipped samples."""
    left = samples - skipped
    if not correct or k > samples:
        return pass_at_k(samples, correct, k)
    return pass_at_k(left, correct, k) if k <= left else 1.0


def _gather_integers(state: Tensor, group: Any = None) -> list[Tensor]:
    """Gathers a state; that of a process without samples has become an empty tensor of floats."""
    return gather_all_tensors(state.long(), group)


def _interval(shares: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    mean, z = shares.mean(), _QUANTILE
    spread, variance = mean * (1 - mean), (shares - mean).square().mean()
    # Without a spread that is 0 / 0, and the number of problems stays.
    n = (len(shares) * spread / variance).nan_to_num(len(shares)).clamp(max=samples)
    centre, half = mean + z * z / (2 * n), z * (spread / n + z * z / (4 * n * n)).sqrt()
    # At the ends rounding alone would leave the interval without the mean.
    low, high = (((centre + side) / (1 + z * z / n)).clamp(0, 1) for side in (-half, half))
    return torch.minimum(low, mean), torch.maximum(high, mean)

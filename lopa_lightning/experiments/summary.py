"""What the runs of a comparison say together: pure functions from results to figures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lopa_lightning.experiments.result import Result

NOT_OFFICIAL = ("loss", "score", "majority_share")
NO_SHARES = ("perplexity",)


@dataclass(frozen=True)
class Row:
    """A run of a comparison.

    Attributes:
        task: Its column.
        method: Its row.
        phase: ``select`` for a run that only chooses the learning rate, ``seed`` for one that is reported.
        seed: Its seed.
        factor: By which its learning rates were multiplied.
        result: None while there is none.
    """

    task: str
    method: str
    phase: Literal["select", "seed"]
    seed: int
    factor: float | None
    result: Result | None = None

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.task} {self.method} " + (f"select {self.factor:g}" if self.phase == "select" else self.label)

    @property
    def label(self) -> str:
        """The part of the name that tells seeds apart."""
        return f"seed {self.seed}"

    @property
    def done(self) -> bool:
        """Whether it has ended well."""
        return self.result is not None and self.result.done


@dataclass(frozen=True)
class Figure:
    """Mean and spread of a figure over seeds.

    Attributes:
        mean: Over the seeds.
        sd: The sample's, with n - 1; None of a single value.
    """

    mean: float
    sd: float | None = None

    @classmethod
    def of(cls, values: Iterable[float]) -> Figure | None:
        """Mean and standard deviation; None of nothing.

        Args:
            values: One for each seed.

        Example:
            >>> Figure.of([1.0, 2.0, 6.0])
            Figure(mean=3.0, sd=2.6457513110645907)
        """
        found = list(values)
        if not found:
            return None
        if not all(map(math.isfinite, found)):
            return cls(sum(found), math.nan)  # statistics.stdev takes finite numbers alone
        return cls(statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else None)


@dataclass(frozen=True)
class Cell:
    """A method on a task.

    Attributes:
        rows: Its reported runs.
        factor: By which its learning rates were multiplied; None while it is not chosen.
        at_edge: Whether that factor is the smallest or largest of several.
        score: None where no seed has ended well.
        metrics: Each metric of the task by name, see :func:`metric_names`.
        samples: Training samples to reach the target, mean over seeds; None if a seed never does.
    """

    rows: Sequence[Row]
    factor: float | None
    at_edge: bool
    score: Figure | None
    metrics: dict[str, Figure]
    samples: float | None

    @property
    def done(self) -> list[Result]:
        """Results of the seeds that have ended well."""
        return [row.result for row in self.rows if row.result is not None and row.result.done]

    def mean_of(self, name: str) -> float | None:
        """Mean over the seeds of an attribute of their results.

        Args:
            name: The attribute.

        Returns:
            None where a seed lacks it, or there is none.
        """
        values: list[Any] = [getattr(result, name) for result in self.done]
        return statistics.fmean(values) if values and None not in values else None


def target(scores: Iterable[float], reach: float) -> float:
    """The score to reach: a share of the best, from below where scores are negative losses.

    Args:
        scores: Mean final score of each method.
        reach: The share.

    Example:
        >>> round(target([0.7, 0.8], 0.95), 4), round(target([-2.0, -1.0], 0.95), 4)
        (0.76, -1.05)
    """
    best = max((score for score in scores if not math.isnan(score)), default=math.nan)
    return best - (1 - reach) * abs(best)


def samples_to_reach(result: Result, score: float) -> int | None:
    """Training samples seen when the validation score was first as high as ``score``.

    Args:
        result: A run's.
        score: The score to reach.

    Returns:
        None if it never was.
    """
    reached = (entry["samples"] for entry in result.history if entry["metrics"].get("val/score", math.nan) >= score)
    return next(reached, None)


def choose_factor(rows: Sequence[Row]) -> float | None:
    """The rate factor whose selection run ended with the best score; among equals the lowest loss decides.

    Args:
        rows: Selection runs of a method on a task.

    Returns:
        None if none has ended well.
    """

    def merit(row: Row) -> tuple[float, float]:
        assert row.result is not None
        values = row.result.score, -row.result.metrics.get("val/loss", math.inf)
        return values[0] if not math.isnan(values[0]) else -math.inf, values[1]

    return max((row for row in rows if row.done), key=merit).factor if any(row.done for row in rows) else None


def metric_names(results: Iterable[Result]) -> list[str]:
    """Names of a task's metrics, without ``val/``, in the order they were logged.

    Args:
        results: Of the task's runs.

    Example:
        >>> names = dict.fromkeys(["val/loss", "val/accuracy", "val/score", "val_mismatched/accuracy"], 0.5)
        >>> metric_names([Result("done", "", history=[{"metrics": names}])])
        ['accuracy', 'accuracy (mismatched)']
    """
    found = [_short(name) for result in results for name in result.metrics]
    return [name for name in dict.fromkeys(found) if name.split(" ")[0] not in NOT_OFFICIAL]


def _short(name: str) -> str:
    group, _, metric = name.partition("/")
    suffix = group.removeprefix("val").strip("_")
    return f"{metric} ({suffix})" if suffix else metric


def cells_of(
    rows: Sequence[Row], task: str, methods: Sequence[str], reach: float, factors: Sequence[float]
) -> dict[str, Cell]:
    """Gathers the reported runs of a task.

    Args:
        rows: Of all tasks and phases.
        task: Which.
        methods: In their order.
        reach: Share of the best score that counts as reached.
        factors: The grid of rate factors.

    Returns:
        A cell for each method.
    """
    reported = {name: [r for r in rows if (r.task, r.method, r.phase) == (task, name, "seed")] for name in methods}
    done = {
        name: [r.result for r in group if r.result is not None and r.result.done] for name, group in reported.items()
    }
    scores = {name: Figure.of(result.score for result in results) for name, results in done.items()}
    goal = target([score.mean for score in scores.values() if score is not None], reach)
    cells = {}
    for name in methods:
        reached = [samples_to_reach(result, goal) for result in done[name]]
        numbers = [number for number in reached if number is not None]
        factor = next((row.factor for row in reported[name]), None)
        values = [{_short(key): value for key, value in result.metrics.items()} for result in done[name]]
        cells[name] = Cell(
            reported[name],
            factor,
            at_edge=len(factors) > 1 and factor in (min(factors), max(factors)),
            score=scores[name],
            metrics={
                metric: figure
                for metric in metric_names(done[name])
                if (figure := Figure.of(value[metric] for value in values if metric in value)) is not None
            },
            samples=statistics.fmean(numbers) if numbers and len(numbers) == len(reached) else None,
        )
    return cells


def majority_share(cells: Iterable[Cell]) -> float | None:
    """Share of the most frequent label in the validation split; None where labels are no classes.

    Args:
        cells: Of a task.
    """
    results = (result for cell in cells for result in cell.done)
    return next((r.metrics["val/majority_share"] for r in results if "val/majority_share" in r.metrics), None)


def score_is_accuracy(cells: Iterable[Cell]) -> bool:
    """Whether a task's score is the accuracy, and so of one scale with the majority's share.

    Args:
        cells: Of the task.
    """
    metrics = [result.metrics for cell in cells for result in cell.done]
    return all("val/accuracy" in m and math.isclose(m["val/accuracy"], m["val/score"]) for m in metrics)


def score_is_share(cells: Iterable[Cell]) -> bool:
    """Whether a task's score is one to be shown in points, and not, for want of an official metric, a negative loss.

    Args:
        cells: Of the task.
    """
    metrics = [result.metrics for cell in cells for result in cell.done]
    return bool(metrics) and not any(m.get("val/score") == -m.get("val/loss", math.nan) for m in metrics)


def blind_methods(cells: Mapping[str, Cell]) -> list[str]:
    """The methods that are no better than always answering the most frequent label.

    Args:
        cells: Of a task, by method.
    """
    share = majority_share(cells.values())
    if share is None:
        return []
    return [
        name for name, cell in cells.items() if "accuracy" in cell.metrics and cell.metrics["accuracy"].mean <= share
    ]

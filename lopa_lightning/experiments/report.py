"""Tables of many runs: pure functions from results to data frames and Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd

from lopa_lightning.callbacks.run_record import Result
from lopa_lightning.callbacks.summary import ADVICE

_NOT_OFFICIAL = ("loss", "score", "majority_share", "label_variance")
_NOT_IN_POINTS = ("perplexity",)
_EDGE = "\\*"
_EDGE_NOTE = f"{_EDGE} The best multiplier is at the edge of the grid: a wider one (`rate_factors`) may score better."
_MEASURED = ["trained", "frozen", "seconds_per_step", "seconds", "peak_mb", "peak_of", "score", "best_score"]


@dataclass(frozen=True)
class Row:
    """A run of a comparison.

    Attributes:
        task: Its column.
        method: Its row.
        phase: ``select`` for a run that only chooses the learning rate, ``seed`` for one that is reported.
        seed: Its seed.
        factor: Multiplier of its learning rates; None while it is not chosen.
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
        kind = f"select {self.factor:g}" if self.phase == "select" else f"seed {self.seed}"
        return f"{self.task} {self.method} {kind}"

    @property
    def done(self) -> bool:
        """Whether it has ended well."""
        return self.result is not None and self.result.done


def choose_factor(rows: Sequence[Row]) -> float | None:
    """Returns the multiplier whose selection run ended with the best score; among equals the lowest loss decides.

    Returns:
        None if no run has ended well.
    """

    def merit(row: Row) -> tuple[float, float]:
        assert row.result is not None
        score = row.result.score
        return -math.inf if math.isnan(score) else score, -row.result.metrics.get("val/loss", math.inf)

    done = [row for row in rows if row.done]
    return max(done, key=merit).factor if done else None


def measured(result: Result) -> dict[str, Any]:
    """Returns what a table shows of a run, with every metric of its last validation."""
    size = result.checkpoint_bytes
    values = {"status": result.status, "reason": result.reason, **{name: getattr(result, name) for name in _MEASURED}}
    return {**values, "checkpoint_mb": None if size is None else size / 1e6, **result.metrics}


def runs_table(rows: Sequence[Row], reach: float) -> pd.DataFrame:
    """Makes a line for each run.

    Args:
        rows: The runs.
        reach: Share of the best method's mean score, for the examples it takes to get there (``samples_to_reach``).

    Returns:
        A frame in the order of ``rows``, ready for ``to_csv``.
    """
    named = ("task", "method", "phase", "seed", "factor")
    records = [
        {
            **{name: getattr(row, name) for name in named},
            **({"status": "not run"} if row.result is None else measured(row.result)),
        }
        for row in rows
    ]
    table = pd.DataFrame(
        records, columns=list(dict.fromkeys([*named, *measured(Result("done", "")), *(k for r in records for k in r)]))
    )
    reported = table[(table.phase == "seed") & (table.status == "done")]
    means = reported.groupby(["task", "method"]).score.mean().groupby("task").max()
    goals = {task: target(best, reach) for task, best in means.items()}
    # The goal is a score on the reported split: a selection run is measured on another.
    table["samples_to_reach"] = [
        samples_to_reach(row.result, goals.get(row.task, math.nan)) if row.phase == "seed" and row.result else None
        for row in rows
    ]
    return table


def csv_text(table: pd.DataFrame) -> str:
    """Returns a table as CSV, whole numbers as such."""
    text: str = table.convert_dtypes().to_csv(index=False)
    return text


def target(best: float, reach: float) -> float:
    """Returns the score to reach: a share of the best, from below where scores are negative losses.

    Example:
        >>> round(target(0.8, 0.95), 4), round(target(-1.0, 0.95), 4)
        (0.76, -1.05)
    """
    return best - (1 - reach) * abs(best)


def samples_to_reach(result: Result, score: float) -> float | None:
    """Returns the training examples seen when the validation score first was ``score``; None if it never was."""
    reached = (entry["samples"] for entry in result.history if entry["metrics"].get("val/score", math.nan) >= score)
    return next(reached, None)


@dataclass(frozen=True)
class TaskTable:
    """The reported runs of one task.

    Args:
        runs: Those lines of :func:`runs_table`.
    """

    runs: pd.DataFrame

    @property
    def done(self) -> pd.DataFrame:
        """The runs that have ended well."""
        return self.runs[self.runs.status == "done"]

    @property
    def metrics(self) -> dict[str, str]:
        """Column to name of each official metric: ``val/f1`` is ``f1``, ``val_other/f1`` is ``f1 (other)``."""
        columns = [c for c in self.done.dropna(axis=1, how="all").columns if str(c).startswith("val") and "/" in str(c)]
        names = {}
        for column in columns:
            group, _, metric = str(column).partition("/")
            suffix = group.removeprefix("val").strip("_")
            if metric not in _NOT_OFFICIAL:
                names[str(column)] = f"{metric} ({suffix})" if suffix else metric
        return names

    @property
    def majority_share(self) -> float | None:
        """Share of the most frequent label in the validation split; None where labels are no classes."""
        shares = self.done.get("val/majority_share", pd.Series(dtype=float)).dropna()
        return float(shares.iloc[0]) if len(shares) else None

    @property
    def in_points(self) -> bool:
        """Whether the score is a share and not, for want of an official metric, a negative loss."""
        losses = self.done.get("val/loss", pd.Series(dtype=float))
        return bool(len(self.done)) and not bool((self.done.score == -losses).any())

    @property
    def score_is_accuracy(self) -> bool:
        """Whether the score is of one scale with the majority's share."""
        return "val/accuracy" in self.done and bool(((self.done["val/accuracy"] - self.done.score).abs() < 1e-9).all())

    def blind_methods(self) -> list[str]:
        """Returns the methods that are no better than always answering the most frequent label."""
        if self.majority_share is None or "val/accuracy" not in self.done:
            return []
        means = self.done.groupby("method", sort=False)["val/accuracy"].mean()
        return [str(name) for name in means[means <= self.majority_share].index]

    def of(self, method: str) -> pd.DataFrame:
        """Returns a method's runs."""
        return self.runs[self.runs.method == method]

    def score_text(self, method: str) -> str:
        """Returns a method's score, or what there is in its place."""
        runs = self.of(method)
        done = runs[runs.status == "done"]
        if not len(done):
            return "failed" if (runs.status == "failed").any() else "not run yet"
        text = figure_text(done.score, self.in_points)
        return text if len(done) == len(runs) else f"{text} ({len(done)} of {len(runs)} seeds)"

    def markdown(self, methods: Sequence[str], reach: float, factors: Sequence[float]) -> str:
        """Returns the table of all methods."""
        metrics = self.metrics if len(self.metrics) > 1 else {}
        kinds = set(self.done.peak_of.dropna())
        peak = {"cuda": "peak GPU MB", "process": "peak process MB"}[kinds.pop()] if len(kinds) == 1 else "peak MB"
        header = ["method", "score", *metrics.values(), "trained parameters", "checkpoint MB", "s/step", peak]
        body = []
        for method in methods:
            runs = self.of(method)
            done = runs[runs.status == "done"]
            factor = runs.factor.dropna().max()
            mark = f" {_EDGE}" if at_edge(factor, factors) else ""
            body.append(
                [
                    escaped(method),
                    self.score_text(method),
                    *(figure_text(done[c], name.split(" ")[0] not in _NOT_IN_POINTS) for c, name in metrics.items()),
                    *(mean_text(done[c], form) for c, form in (("trained", ",.0f"), ("checkpoint_mb", ".2f"))),
                    *(mean_text(done[c], form) for c, form in (("seconds_per_step", ".3g"), ("peak_mb", ",.0f"))),
                    mean_text(done.samples_to_reach, ",.0f"),
                    "–" if pd.isna(factor) else f"{factor:g}{mark}",
                ]
            )
        return markdown_table([*header, f"samples to {100 * reach:g} %", "rate factor"], body)


def markdown_text(table: pd.DataFrame, reach: float, factors: Sequence[float]) -> str:
    """Returns a report: a table for each task, and one of all.

    Args:
        table: As from :func:`runs_table`.
        reach: Share of the best score that counts as reached.
        factors: The grid of multipliers of learning rates.
    """
    parts = ["# Comparison", _explained(table, reach)]
    tasks = tasks_of(table)
    methods = list(dict.fromkeys(table.method))
    if len(tasks) > 1:
        parts += ["## All tasks", _summary(tasks, methods)]
    for name, task in tasks.items():
        parts.append(f"## {name}")
        if task.majority_share is not None:
            parts.append(f"Always answering the most frequent label: accuracy {100 * task.majority_share:.1f}.")
        if blind := task.blind_methods():
            parts.append(f"No better than that, so nothing was learned: {', '.join(map(escaped, blind))}. {ADVICE}")
        parts.append(task.markdown(methods, reach, factors))
        if task.done.factor.map(lambda factor: at_edge(factor, factors)).any():
            parts.append(_EDGE_NOTE)
        failed = table[(table.task == name) & (table.status == "failed")]
        if len(failed):
            lines = [f"- {_run_name(run)} failed: {escaped(run.reason)}" for run in failed.itertuples()]
            parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def tasks_of(table: pd.DataFrame) -> dict[str, TaskTable]:
    """Returns the reported runs by task."""
    reported = table[table.phase == "seed"]
    return {task: TaskTable(reported[reported.task == task]) for task in dict.fromkeys(table.task)}


def _run_name(run: Any) -> str:
    return Row(run.task, run.method, run.phase, run.seed, run.factor).name


def _explained(table: pd.DataFrame, reach: float) -> str:
    missing = int((table.status == "not run").sum())
    lines = [
        "Score is that of the last validation, not of the best one; mean ± sample standard deviation over seeds, in "
        "points; where a task has no metric, the negative loss as it is. Figures beside it are means over seeds.",
        f"Samples to {100 * reach:g} %: training examples seen when the validation score first was {100 * reach:g} % "
        "of the best method's mean final score, as finely as there are validations; – where a seed never gets there.",
        "Checkpoint MB: with the optimizer's state.",
    ]
    return "\n".join([*lines, *([f"{missing} of {len(table)} runs have not ended yet."] if missing else [])])


def _summary(tasks: dict[str, TaskTable], methods: Sequence[str]) -> str:
    body = []
    for method in methods:
        done = [task.of(method)[lambda runs: runs.status == "done"].score for task in tasks.values()]
        comparable = all(len(scores) for scores in done) and all(task.in_points for task in tasks.values())
        mean = f"{100 * sum(scores.mean() for scores in done) / len(done):.1f}" if comparable else "–"
        body.append([escaped(method), *(task.score_text(method) for task in tasks.values()), mean])
    return markdown_table(["method", *tasks, "mean"], body)


def at_edge(factor: float, factors: Sequence[float]) -> bool:
    """Tells whether a multiplier is the smallest or the largest of several."""
    return len(factors) > 1 and factor in (min(factors), max(factors))


def figure_text(values: Iterable[float], in_points: bool = True) -> str:
    """Returns mean ± sample standard deviation.

    Args:
        values: One for each seed; of none a dash.
        in_points: Whether they are shares, to be shown in hundredths.

    Example:
        >>> figure_text([0.74, 0.76, 0.81]), figure_text([-0.5], in_points=False), figure_text([])
        ('77.0 ± 3.6', '-0.5000', '–')
    """
    found = pd.Series(list(values), dtype=float)
    if not len(found) or found.isna().any():
        return "–"
    scale, form = (100, ".1f") if in_points else (1, ".4f")
    spread = f" ± {scale * found.std():{form}}" if len(found) > 1 else ""
    return f"{scale * found.mean():{form}}{spread}"


def mean_text(values: pd.Series, form: str) -> str:
    """Returns the mean over seeds; a dash where a seed lacks the figure, or there is none."""
    numbers = pd.to_numeric(values)
    return "–" if not len(numbers) or numbers.isna().any() else f"{numbers.mean():{form}}"


def escaped(text: str) -> str:
    """Returns a text that may stand in a table's cell."""
    return text.replace("|", "\\|").replace("\n", " ")


def markdown_table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Returns a table, its first column to the left.

    Example:
        >>> print(markdown_table(["method", "score"], [["lopa", "78.1"]]))
        | method | score |
        | - | -: |
        | lopa | 78.1 |
    """
    rule = ["-", *["-:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, rule, *body])

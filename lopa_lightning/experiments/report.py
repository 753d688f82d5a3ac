"""Tabulates many runs: pure functions from results to data frames and Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from lopa_lightning.callbacks.run_record import Result
from lopa_lightning.callbacks.summary import ADVICE

_NOT_OFFICIAL = ("loss", "score", "majority_share", "label_variance")
_NOT_IN_POINTS = ("perplexity",)
_FIGURES = ("trained", "frozen", "seconds_per_step", "seconds", "peak_mb", "peak_of", "checkpoint_mb")
_PEAKS = {"cuda": "peak GPU MB", "process": "peak process MB"}
_REACH = 0.95  # share of the best method's mean score
_EDGE = "\\*"
_EDGE_NOTE = (
    f"{_EDGE} The best multiplier is at the edge of the grid: a wider one (`rate_multipliers`) may score better."
)
_EXPLAINED = f"""# Comparison

Score is that of the last validation, not of the best one; mean ± sample standard deviation over seeds, in points; \
where a task has no metric, the negative loss as it is. Figures beside it are means over seeds.
Samples to {100 * _REACH:g} %: training examples seen when the validation score first was {100 * _REACH:g} % of the \
best method's mean final score, as finely as there are validations; – where a seed never gets there.
Checkpoint MB: with the optimizer's state."""


def record(tags: dict[str, Any], result: Result | None) -> dict[str, Any]:
    """Returns a run as a line of a table: its tags, what was measured, and the metrics of its last validation."""
    if result is None:
        return {**tags, "status": "not run"}
    best = max((score for score in result.scores if not math.isnan(score)), default=None)
    scores = {"score": result.score, "best_score": best} if result.done else {}
    return {**tags, "status": result.status, "reason": result.reason, **result.figures, **scores, **result.metrics}


def runs_table(runs: Sequence[tuple[dict[str, Any], Result | None]]) -> pd.DataFrame:
    """Makes a line for each run of a comparison.

    Args:
        runs: Tags and result of each.

    Returns:
        A frame in the order of ``runs``, ready for :func:`csv_text`.
    """
    records = [record(tags, result) for tags, result in runs]
    names = [*runs[0][0], "status", "reason", *_FIGURES, "score", "best_score"]
    names += [key for line in records for key in line]
    table = pd.DataFrame(records, columns=list(dict.fromkeys(names)))
    # The goal is a score on the reported split: a selection run is measured on another.
    reported = table[(table.phase == "seed") & (table.status == "done")]
    best = reported.groupby(["task", "method"]).score.mean().groupby("task").max()
    table["samples_to_reach"] = [
        samples_to_reach(result, target(best[tags["task"]])) if index in reported.index and result else None
        for index, (tags, result) in enumerate(runs)
    ]
    return table


def csv_text(table: pd.DataFrame) -> str:
    """Returns a table as CSV, whole numbers as such."""
    text: str = table.convert_dtypes().to_csv(index=False)
    return text


def target(best: float) -> float:
    """Returns the score to reach: a share of the best, from below where scores are negative losses.

    Example:
        >>> round(target(0.8), 4), round(target(-1.0), 4)
        (0.76, -1.05)
    """
    return best - (1 - _REACH) * abs(best)


def samples_to_reach(result: Result, score: float) -> float | None:
    """Returns the training examples seen when the validation score first was ``score``; None if it never was."""
    return next((entry["samples"] for entry, got in zip(result.history, result.scores) if got >= score), None)


class TaskTable:
    """Tells what the reported runs of one task have in common.

    Args:
        table: As from :func:`runs_table`.
        task: The task.

    Attributes:
        runs: The reported runs.
        done: Those that have ended well.
        accuracy: ``val/accuracy`` of these.
        in_points: Whether the score is a share and not, for want of an official metric, a negative loss.
        majority_share: Share of the most frequent label in the validation split; None where labels are no classes.
        majority_score: The score of always answering it, where the score is an accuracy; else None.
    """

    def __init__(self, table: pd.DataFrame, task: str) -> None:
        self.runs = table[(table.task == task) & (table.phase == "seed")]
        self.done = self.runs[self.runs.status == "done"]
        named = self.done.reindex(columns=["score", "val/loss", "val/accuracy", "val/majority_share"]).astype(float)
        score, loss, self.accuracy, share = (named[name] for name in named)
        self.in_points = len(named) > 0 and not bool((score == -loss).any())
        self.majority_share = None if share.isna().all() else float(share.max())
        is_accuracy = bool(((self.accuracy - score).abs() < 1e-9).all())
        self.majority_score = self.majority_share if is_accuracy else None

    def metrics(self) -> dict[str, str]:
        """Returns column to name of each official metric: ``val/f1`` is ``f1``, ``val_other/f1`` is ``f1 (other)``."""
        names = {}
        for column in map(str, self.done.dropna(axis=1, how="all").columns):
            group, _, metric = column.partition("/")
            if metric and metric not in _NOT_OFFICIAL:
                suffix = group.removeprefix("val").strip("_")
                names[column] = f"{metric} ({suffix})" if suffix else metric
        return names if len(names) > 1 else {}

    def blind_methods(self) -> list[str]:
        """Returns the methods that are no better than always answering the most frequent label."""
        means = self.accuracy.groupby(self.done.method, sort=False).mean()
        return [] if self.majority_share is None else [str(name) for name in means[means <= self.majority_share].index]

    def of(self, method: str) -> tuple[pd.DataFrame, str]:
        """Returns a method's runs that ended well, and its score, or what there is in its place."""
        runs, done = (frame[frame.method == method] for frame in (self.runs, self.done))
        if not len(done):
            return done, "failed" if (runs.status == "failed").any() else "not run yet"
        text = figure_text(done.score, self.in_points)
        return done, text if len(done) == len(runs) else f"{text} ({len(done)} of {len(runs)} seeds)"

    def markdown(self, methods: Sequence[str], multipliers: Sequence[float]) -> str:
        """Returns the table of all methods."""
        metrics, kinds = self.metrics(), list(self.done.peak_of.dropna().unique())
        columns = {
            "trained": ("trained parameters", ",.0f"),
            "checkpoint_mb": ("checkpoint MB", ".2f"),
            "seconds_per_step": ("s/step", ".3g"),
            "peak_mb": (_PEAKS[kinds[0]] if len(kinds) == 1 else "peak MB", ",.0f"),
            "samples_to_reach": (f"samples to {100 * _REACH:g} %", ",.0f"),
        }
        body = []
        for method in methods:
            done, score = self.of(method)
            cells = [figure_text(done[c], name.split(" ")[0] not in _NOT_IN_POINTS) for c, name in metrics.items()]
            cells += [mean_text(done[column], form) for column, (_, form) in columns.items()]
            multiplier = self.runs[self.runs.method == method].multiplier.dropna().max()
            edge = f" {_EDGE}" if at_edge(multiplier, multipliers) else ""
            body.append([escaped(method), score, *cells, "–" if pd.isna(multiplier) else f"{multiplier:g}{edge}"])
        shown = [name for name, _ in columns.values()]
        return markdown_table(["method", "score", *metrics.values(), *shown, "rate multiplier"], body)


def markdown_text(table: pd.DataFrame, multipliers: Sequence[float]) -> str:
    """Returns a report: a table for each task, and one of all.

    Args:
        table: As from :func:`runs_table`.
        multipliers: The grid of multipliers of learning rates.
    """
    missing = int((table.status == "not run").sum())
    parts = [_EXPLAINED + (f"\n{missing} of {len(table)} runs have not ended yet." if missing else "")]
    tasks = {str(task): TaskTable(table, task) for task in table.task.unique()}
    methods = list(map(str, table.method.unique()))
    if len(tasks) > 1:
        parts += ["## All tasks", _summary(tasks, methods)]
    for name, task in tasks.items():
        parts.append(f"## {name}")
        if task.majority_share is not None:
            parts.append(f"Always answering the most frequent label: accuracy {100 * task.majority_share:.1f}.")
        if blind := task.blind_methods():
            parts.append(f"No better than that, so nothing was learned: {', '.join(map(escaped, blind))}. {ADVICE}")
        parts.append(task.markdown(methods, multipliers))
        if _EDGE in parts[-1]:
            parts.append(_EDGE_NOTE)
        failed = table[(table.task == name) & (table.status == "failed")]
        parts += ["\n".join(map(_failure, failed.itertuples()))] * (len(failed) > 0)
    return "\n\n".join(parts) + "\n"


def _failure(run: Any) -> str:
    """Returns the line of a run that failed."""
    which = f"{run.multiplier:g}" if run.phase == "select" else run.seed
    return f"- {run.task} {run.method} {run.phase} {which} failed: {escaped(run.reason)}"


def _summary(tasks: dict[str, TaskTable], methods: Sequence[str]) -> str:
    """Returns the table of all tasks, with the mean of those that can be averaged."""
    body = []
    for method in methods:
        done, scores = zip(*(task.of(method) for task in tasks.values()))
        is_comparable = all(map(len, done)) and all(task.in_points for task in tasks.values())
        mean = f"{100 * sum(runs.score.mean() for runs in done) / len(done):.1f}" if is_comparable else "–"
        body.append([escaped(method), *scores, mean])
    return markdown_table(["method", *tasks, "mean"], body)


def at_edge(multiplier: float, multipliers: Sequence[float]) -> bool:
    """Returns whether a multiplier is the smallest or the largest of several."""
    return len(multipliers) > 1 and multiplier in (min(multipliers), max(multipliers))


def figure_text(values: Iterable[float], in_points: bool = True) -> str:
    """Returns mean ± sample standard deviation.

    Args:
        values: One for each seed; of none a dash.
        in_points: Whether they are shares, to be shown in hundredths.

    Example:
        >>> figure_text([0.74, 0.76, 0.81]), figure_text([-0.5], in_points=False), figure_text([])
        ('77.0 ± 3.6', '-0.5000', '–')
    """
    scale, form = (100, ".1f") if in_points else (1, ".4f")
    found = scale * pd.Series(list(values), dtype=float)
    mean = mean_text(found, form)
    return mean if mean == "–" or len(found) == 1 else f"{mean} ± {found.std():{form}}"


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

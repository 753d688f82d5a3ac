"""A comparison as CSV and Markdown: pure functions from rows to text."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from typing import Any

from lopa_lightning.callbacks.summary import ADVICE
from lopa_lightning.experiments.summary import (
    NO_SHARES,
    Cell,
    Figure,
    Row,
    blind_methods,
    cells_of,
    majority_share,
    metric_names,
    samples_to_reach,
    score_is_share,
    target,
)

_EDGE = "\\*"
_EDGE_NOTE = (
    f"{_EDGE} The best rate factor lies at the edge of the grid: a wider one (`rate_factors`) may give a better score."
)
_COLUMNS = [
    *("task", "method", "phase", "seed", "factor", "status", "reason", "score", "best_score"),
    *("trained", "frozen", "checkpoint_mb", "seconds_per_step", "seconds", "peak_mb", "peak_of", "samples_to_reach"),
]

Cells = dict[str, dict[str, Cell]]
"""By task, then by method."""


def table(rows: Sequence[Row], tasks: Sequence[str], methods: Sequence[str], reach: float, factors: Any) -> Cells:
    """Gathers rows into cells.

    Args:
        rows: Of all runs.
        tasks: In their order.
        methods: In their order.
        reach: Share of the best score that counts as reached.
        factors: The grid of rate factors.
    """
    return {task: cells_of(rows, task, methods, reach, factors) for task in tasks}


def csv_text(rows: Sequence[Row], cells: Cells, reach: float) -> str:
    """A line for each run, with every metric of its last validation.

    Args:
        rows: Of all runs.
        cells: As from :func:`table`.
        reach: Share of the best score that counts as reached.
    """
    metrics = list(dict.fromkeys(name for row in rows if row.result is not None for name in row.result.metrics))
    out = io.StringIO()
    writer = csv.DictWriter(out, [*_COLUMNS, *metrics], lineterminator="\n", restval="")
    writer.writeheader()
    for row in rows:
        means = [cell.score.mean for cell in cells[row.task].values() if cell.score is not None]
        writer.writerow(_csv_row(row, target(means, reach)))
    return out.getvalue()


def _csv_row(row: Row, goal: float) -> dict[str, Any]:
    shown: dict[str, Any] = {name: getattr(row, name) for name in ("task", "method", "phase", "seed", "factor")}
    result = row.result
    if result is None:
        return {**shown, "status": "not run"}
    shown |= {name: getattr(result, name) for name in ("status", "reason", "trained", "frozen", "seconds_per_step")}
    shown |= {name: getattr(result, name) for name in ("seconds", "peak_mb", "peak_of")}
    if result.history:
        shown |= {"score": result.score, "best_score": result.best_score, **result.metrics}
    if result.checkpoint_bytes is not None:
        shown["checkpoint_mb"] = result.checkpoint_bytes / 1e6
    # The target is a score on the reported split: a selection run is measured on another.
    if result.done and row.phase == "seed":
        shown["samples_to_reach"] = samples_to_reach(result, goal)
    return shown


def markdown_text(rows: Sequence[Row], cells: Cells, reach: float) -> str:
    """A table for each task, and one of all.

    Args:
        rows: Of all runs.
        cells: As from :func:`table`.
        reach: Share of the best score that counts as reached.
    """
    parts = ["# Comparison", _explained(rows, reach)]
    if len(cells) > 1:
        parts += ["## All tasks", _summary(cells)]
    for task, methods in cells.items():
        parts.append(f"## {task}")
        share = majority_share(methods.values())
        if share is not None:
            parts.append(f"Always answering the most frequent label: accuracy {100 * share:.1f}.")
        if blind := blind_methods(methods):
            parts.append(f"No better than that, so nothing was learned: {', '.join(map(_escaped, blind))}. {ADVICE}")
        parts.append(_task_table(methods, reach))
        if any(cell.at_edge and cell.score for cell in methods.values()):
            parts.append(_EDGE_NOTE)
        failed = [row for row in rows if row.task == task and row.result is not None and not row.done]
        if failed:
            parts.append(
                "\n".join(f"- {row.name} failed: {_escaped(row.result.reason)}" for row in failed if row.result)
            )
    return "\n\n".join(parts) + "\n"


def _explained(rows: Sequence[Row], reach: float) -> str:
    missing = sum(row.result is None for row in rows)
    lines = [
        "Score is that of the last validation, not of the best one; mean ± sample standard deviation over seeds, in "
        "points; where a task has no metric, the negative loss as it is. Figures beside it are means over seeds.",
        f"Samples to {100 * reach:g} %: training samples seen when the validation score first was {100 * reach:g} % of "
        "the best method's mean final score, as finely as there are validations; – where a seed never gets there.",
        "Checkpoint MB: with the optimizer's state.",
    ]
    if missing:
        lines.append(f"{missing} of {len(rows)} runs have not ended yet.")
    return "\n".join(lines)


def _task_table(methods: dict[str, Cell], reach: float) -> str:
    names = metric_names(result for cell in methods.values() for result in cell.done)
    shown = names if len(names) > 1 else []
    peaks = {result.peak_of for cell in methods.values() for result in cell.done}
    peak = {"cuda": "peak GPU MB", "process": "peak process MB"}.get(str(next(iter(peaks), "")), "peak MB")
    header = ["method", "score", *shown, "trained parameters", "checkpoint MB", "s/step"]
    header += [peak if len(peaks) == 1 else "peak MB", f"samples to {100 * reach:g} %", "rate factor"]
    in_points = score_is_share(methods.values())
    return markdown_table(header, [_task_row(name, cell, shown, in_points) for name, cell in methods.items()])


def _task_row(name: str, cell: Cell, metrics: Sequence[str], in_points: bool) -> list[str]:
    size = cell.mean_of("checkpoint_bytes")
    factor = "–" if cell.factor is None else f"{cell.factor:g}" + (f" {_EDGE}" if cell.at_edge else "")
    return [
        _escaped(name),
        score_text(cell, in_points),
        *(figure_text(cell.metrics.get(metric), metric.split(" ")[0] not in NO_SHARES) for metric in metrics),
        _number(cell.mean_of("trained"), ",.0f"),
        _number(size / 1e6 if size is not None else None, ".2f"),
        _number(cell.mean_of("seconds_per_step"), ".3g"),
        _number(cell.mean_of("peak_mb"), ",.0f"),
        _number(cell.samples, ",.0f"),
        factor,
    ]


def _summary(cells: Cells) -> str:
    methods = list(next(iter(cells.values())))
    points = {task: score_is_share(row.values()) for task, row in cells.items()}
    body = []
    for method in methods:
        row = [cells[task][method] for task in cells]
        means = [cell.score.mean for cell in row if cell.score is not None]
        comparable = len(means) == len(row) and all(points.values())
        mean = f"{100 * sum(means) / len(means):.1f}" if comparable else "–"
        body.append([_escaped(method), *(score_text(cell, points[task]) for task, cell in zip(cells, row)), mean])
    return markdown_table(["method", *cells, "mean"], body)


def score_text(cell: Cell, in_points: bool = True) -> str:
    """A cell's score, or what there is in its place.

    Args:
        cell: A method on a task.
        in_points: Whether the score is a share, to be shown in hundredths.
    """
    results = [row.result for row in cell.rows]
    failed = sum(result is not None and not result.done for result in results)
    if cell.score is None:
        return "failed" if failed else "not run yet"
    text = figure_text(cell.score, in_points)
    return text if len(cell.done) == len(results) else f"{text} ({len(cell.done)} of {len(results)} seeds)"


def figure_text(figure: Figure | None, in_points: bool = True) -> str:
    """Mean ± standard deviation.

    Args:
        figure: The figure; None for a dash.
        in_points: Whether it is a share, to be shown in hundredths.

    Example:
        >>> figure_text(Figure(0.78125, 0.0123)), figure_text(Figure(-0.5), in_points=False)
        ('78.1 ± 1.2', '-0.5000')
    """
    if figure is None or math.isnan(figure.mean):
        return "–"
    scale, form = (100, ".1f") if in_points else (1, ".4f")
    spread = "" if figure.sd is None else f" ± {scale * figure.sd:{form}}"
    return f"{scale * figure.mean:{form}}{spread}"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else f"{value:{form}}"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def markdown_table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table, its first column to the left.

    Args:
        header: Of each column.
        body: Rows.

    Example:
        >>> print(markdown_table(["method", "score"], [["lopa", "78.1"]]))
        | method | score |
        | - | -: |
        | lopa | 78.1 |
    """
    rule = ["-", *["-:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, rule, *body])

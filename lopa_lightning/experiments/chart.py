"""Draws a comparison: score against trained parameters, and against examples seen."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from lopa_lightning.callbacks.run_record import Result
from lopa_lightning.experiments.report import TaskTable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS = 3
_PANEL = (4.6, 3.6)  # inches
_LEGEND = 1.7  # inches
_MARKERS = "osD^vP*X<>"
_FAR = 30  # points below the lowest score, at which the line of the most frequent label would flatten the rest


def svg(table: pd.DataFrame) -> str:
    """Draws scores against trained parameters: a panel for each task, a point with an error bar for each method.

    Args:
        table: As from :func:`~lopa_lightning.experiments.report.runs_table`.
    """
    methods = list(map(str, table.method.unique()))

    def draw(panel: Axes, task: TaskTable) -> None:
        scale = 100 if task.in_points else 1
        drawn = task.done[task.done.trained > 0]
        for method, runs in drawn.groupby("method", sort=False):
            score = scale * runs.score
            spread = None if len(runs) == 1 else score.std()
            style: Any = {"linestyle": "", "capsize": 2.5, **_style(methods.index(str(method)))}
            panel.errorbar(runs.trained.mean(), score.mean(), yerr=spread, label=str(method), **style)
        if len(drawn):
            if task.majority_score is not None and drawn.score.min() - task.majority_score < _FAR / 100:
                panel.axhline(100 * task.majority_score, color="#999999", linestyle="--", label="most frequent label")
            panel.set_xscale("log")

    return _figure(table, "trained parameters", draw)


def curves_svg(table: pd.DataFrame, results: Sequence[Result | None]) -> str:
    """Draws scores against examples seen: a panel for each task, a line for each method, in a band of its spread.

    Args:
        table: As from :func:`~lopa_lightning.experiments.report.runs_table`.
        results: Those of its lines.
    """
    methods = list(map(str, table.method.unique()))

    def draw(panel: Axes, task: TaskTable) -> None:
        scale = 100 if task.in_points else 1
        for method, runs in task.done.groupby("method", sort=False):
            mean, spread = curve([result for index in runs.index if (result := results[index]) is not None])
            mean, spread, style = scale * mean, scale * spread, _style(methods.index(str(method)))
            panel.plot(mean.index, mean, label=str(method), markersize=3, **style)
            panel.fill_between(mean.index, mean - spread, mean + spread, color=style["color"], alpha=0.12, linewidth=0)

    return _figure(table, "training examples seen", draw)


def curve(results: Sequence[Result]) -> tuple[pd.Series, pd.Series]:
    """Returns the mean and the sample standard deviation of ``val/score`` over runs, by training examples seen.

    Runs are averaged by step, and so are the examples: an epoch's one small batch comes early in some, late in others.
    Of several validations at one step, between which batches were accumulated, the last one counts.

    Example:
        >>> history = lambda samples, score: [{"step": 2, "samples": samples, "metrics": {"val/score": score}}]
        >>> mean, spread = curve([Result("done", history=history(32, 0.5)), Result("done", history=history(20, 0.75))])
        >>> mean.to_dict(), round(float(spread[26]), 3)
        ({26.0: 0.625}, 0.177)
    """
    steps = [[entry["step"] for entry in result.history] for result in results]
    seen = [[entry["samples"] for entry in result.history] for result in results]
    samples = pd.DataFrame([dict(zip(*run)) for run in zip(steps, seen)]).sort_index(axis=1).mean()
    scores = pd.DataFrame([dict(zip(own, result.scores)) for own, result in zip(steps, results)])[samples.index]
    return scores.mean().set_axis(samples), scores.std().set_axis(samples)


def _style(index: int) -> dict[str, Any]:
    """Returns how a method is drawn, in both charts alike."""
    return {"marker": _MARKERS[index % len(_MARKERS)], "color": f"C{index % 10}"}


def _figure(table: pd.DataFrame, below: str, draw: Callable[[Axes, TaskTable], None]) -> str:
    """Draws a panel for each task; without runs that ended well it stays empty."""
    import matplotlib
    from matplotlib.figure import Figure

    tasks = {str(task): TaskTable(table, task) for task in table.task.unique()}
    columns = min(_COLUMNS, len(tasks))
    lines = math.ceil(len(tasks) / columns)
    # Text stays text, and the same results give the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "lopa", "font.size": 9}):
        figure = Figure(figsize=(_PANEL[0] * columns + _LEGEND, _PANEL[1] * lines), layout="constrained")
        panels = list(figure.subplots(lines, columns, squeeze=False).flat)
        for panel, (name, task) in zip(panels, tasks.items()):
            panel.set(title=name, xlabel=below, ylabel="score (points)" if task.in_points else "score")
            draw(panel, task)
            panel.margins(0.15)
        drawn = {label: line for panel in panels for line, label in zip(*panel.get_legend_handles_labels())}
        if drawn:
            figure.legend(drawn.values(), drawn.keys(), loc="outside right upper", fontsize=7.5)
        for panel in panels[len(tasks) :]:
            panel.set_visible(False)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()

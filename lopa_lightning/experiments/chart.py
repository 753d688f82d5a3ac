"""Draws a comparison: score against trained parameters."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING, Any

from lopa_lightning.experiments.report import TaskTable

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

_COLUMNS = 3
_PANEL = (4.6, 3.6)  # inches
_MARKERS = "osD^vP*X<>"


def svg(table: pd.DataFrame) -> str:
    """Draws a panel for each task, a point with an error bar for each method.

    Args:
        table: As from :func:`~lopa_lightning.experiments.report.runs_table`.
    """
    import matplotlib
    from matplotlib.figure import Figure

    tasks = {str(task): TaskTable(table, task) for task in table.task.unique()}
    methods = list(map(str, table.method.unique()))
    columns = min(_COLUMNS, len(tasks))
    lines = math.ceil(len(tasks) / columns)
    # Text stays text, and the same results give the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "lopa", "font.size": 9}):
        figure = Figure(figsize=(_PANEL[0] * columns, _PANEL[1] * lines), layout="constrained")
        panels = list(figure.subplots(lines, columns, squeeze=False).flat)
        for panel, (name, task) in zip(panels, tasks.items()):
            panel.set(title=name, xlabel="trained parameters", ylabel="score (points)" if task.in_points else "score")
            _draw(panel, task, methods)
        for panel in panels[len(tasks) :]:
            panel.set_visible(False)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def _draw(panel: Axes, task: TaskTable, methods: list[str]) -> None:
    """Draws a panel; without runs that trained something it stays empty."""
    scale = 100 if task.in_points else 1
    drawn = task.done[task.done.trained > 0]
    if not len(drawn):
        return
    for method, runs in drawn.groupby("method", sort=False):
        index, score = methods.index(str(method)), scale * runs.score
        spread = None if len(runs) == 1 else score.std()
        style: Any = {"fmt": _MARKERS[index % len(_MARKERS)], "color": f"C{index % 10}", "capsize": 2.5}
        panel.errorbar(runs.trained.mean(), score.mean(), yerr=spread, label=str(method), **style)
    if task.majority_score is not None:
        panel.axhline(100 * task.majority_score, color="#999999", linestyle="--", label="most frequent label")
    panel.set_xscale("log")
    panel.margins(0.15)
    panel.legend(fontsize=7.5)

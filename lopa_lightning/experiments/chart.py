"""A comparison as a picture: score against trained parameters."""

from __future__ import annotations

import importlib.util
import io
import math
from typing import TYPE_CHECKING, Any

from lopa_lightning.errors import LoPAError
from lopa_lightning.experiments.report import Cells
from lopa_lightning.experiments.summary import Cell, majority_share, score_is_accuracy, score_is_share

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS = 3
_PANEL = (4.6, 3.6)  # inches
_INK, _FAINT, _POINT = "#333333", "#999999", "#2166ac"
_LINE = 0.055  # height of a label, as a share of the panel's
_GAP = 0.02  # between a point and its label, as a share of the panel's width


def check_installed() -> None:
    """Refuses to begin what could not be drawn.

    Raises:
        LoPAError: If matplotlib is missing.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise LoPAError('the chart needs matplotlib: pip install "lopa-lightning[compare]"')


def svg(cells: Cells) -> str:
    """A panel for each task, a point with an error bar for each method.

    Args:
        cells: As from :func:`~lopa_lightning.experiments.report.table`.
    """
    import matplotlib
    from matplotlib.figure import Figure

    columns = min(_COLUMNS, len(cells))
    lines = math.ceil(len(cells) / columns)
    # Text stays text, and the same results give the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "lopa", "font.size": 9}):
        figure = Figure(figsize=(_PANEL[0] * columns, _PANEL[1] * lines), layout="constrained")
        grid = figure.subplots(lines, columns, squeeze=False)
        panels = list(grid.flat)
        for panel, (task, methods) in zip(panels, cells.items()):
            _draw(panel, task, methods)
        for panel in panels[len(cells) :]:
            panel.set_visible(False)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def _draw(panel: Axes, task: str, methods: dict[str, Cell]) -> None:
    is_share = score_is_share(methods.values())
    scale = 100 if is_share else 1
    points = []
    for name, cell in methods.items():
        trained = cell.mean_of("trained")
        if cell.score is not None and trained and not math.isnan(cell.score.mean):
            points.append((trained, scale * cell.score.mean, scale * (cell.score.sd or 0), name))
    panel.set_title(task, loc="left", color=_INK)
    panel.set_xlabel("trained parameters")
    panel.set_ylabel("score (points)" if is_share else "score")
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="y", color="#e5e5e5", linewidth=0.6)
    panel.set_axisbelow(True)
    if not points:
        panel.set_xticks([])
        panel.set_yticks([])
        return
    share = majority_share(methods.values())
    floor = [100 * share] if share is not None and score_is_accuracy(methods.values()) else []
    _set_limits(panel, points, floor)
    for line in floor:
        panel.axhline(line, color=_FAINT, linewidth=0.8, linestyle=(0, (4, 3)))
        panel.text(0.995, line, "most frequent label", transform=panel.get_yaxis_transform(), **_small(right=True))
    for x, y, sd, _ in points:
        panel.errorbar(x, y, yerr=sd or None, fmt="o", color=_POINT, markersize=5, capsize=2.5, linewidth=1.1)
    _label(panel, points)


def _small(right: bool) -> dict[str, Any]:
    return {"ha": "right" if right else "left", "va": "bottom", "color": _FAINT, "fontsize": 7.5}


def _set_limits(panel: Axes, points: list[tuple[float, float, float, str]], floor: list[float]) -> None:
    panel.set_xscale("log")
    low, high = min(x for x, *_ in points), max(x for x, *_ in points)
    panel.set_xlim(low / 2.5, high * 2.5)
    bottom = min([y - sd for _, y, sd, _ in points] + floor)
    top = max([y + sd for _, y, sd, _ in points] + floor)
    margin = 0.1 * (top - bottom) or 1.0
    panel.set_ylim(bottom - margin, top + margin)


def _label(panel: Axes, points: list[tuple[float, float, float, str]]) -> None:
    """Names each point beside it, from the bottom up, each above the one before where they would overlap."""
    (left, right), (bottom, top) = panel.get_xlim(), panel.get_ylim()
    middle, height = math.sqrt(left * right), _LINE * (top - bottom)
    beside = (right / left) ** _GAP  # the axis is logarithmic
    placed: dict[bool, float] = {}
    for x, y, _, name in sorted(points, key=lambda point: point[1]):
        to_left = x > middle
        at = max(y, placed.get(to_left, -math.inf) + height)
        placed[to_left] = at
        panel.annotate(
            name,
            (x, y),
            xytext=(x / beside if to_left else x * beside, at),
            ha="right" if to_left else "left",
            va="center",
            color=_INK,
            fontsize=8,
            arrowprops=None if at == y else {"arrowstyle": "-", "color": _FAINT, "linewidth": 0.5},
        )

"""Where the time of a training step goes, operator by operator, beside the bare floor's on the same batches.

By torch's profiler, which slows small operators: read the shares, and take times from ``floor``. What the profiler does
not see of a step (Python, the Trainer, the loader) is the row ``outside operators``.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from torch.profiler import ProfilerActivity, profile

from tests.benchmarks.cases import Case, Places, chosen, examples_of, places_of
from tests.benchmarks.floor import KNOWN, data_of, floor_of
from tests.benchmarks.harness import Row, parser, report
from tests.benchmarks.training import fit

_COLUMNS = {
    "case": "case",
    "operator": "operator",
    "ours": "ours, ms a step",
    "ours_calls": "calls a step",
    "floor": "floor, ms a step",
    "floor_calls": "calls a step",
    "more": "ours - floor, share of our step",
}
_OUTSIDE = "outside operators"


class Shares(Callback):
    """Profiles the steps of the second epoch, each followed by the floor on its batch.

    Attributes:
        spent: Milliseconds and calls by operator, of ``ours`` and ``floor``.
        steps: How many.
    """

    def __init__(self) -> None:
        self.spent: dict[str, dict[str, list[float]]] = {name: defaultdict(lambda: [0.0, 0.0]) for name in _SIDES}
        self.steps = 0
        self._profile: Any = None
        self._since = 0.0

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            self._start()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == 0:
            return
        self._stop("ours")
        self._start()
        floor_of(pl_module, batch)
        self._stop("floor")
        self.steps += 1
        self._start()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self._profile is not None:
            self._profile.__exit__(None, None, None)

    def _start(self) -> None:
        self._profile = profile(activities=[ProfilerActivity.CPU])
        self._profile.__enter__()
        self._since = time.perf_counter()

    def _stop(self, side: str) -> None:
        passed = 1000 * (time.perf_counter() - self._since)
        self._profile.__exit__(None, None, None)
        for event in self._profile.key_averages():
            if event.key.startswith(("aten::", "_FrozenHeadLoss")) and event.self_cpu_time_total:
                spent = self.spent[side][event.key]
                spent[0] += event.self_cpu_time_total / 1000
                spent[1] += event.count
                passed -= event.self_cpu_time_total / 1000
        self.spent[side][_OUTSIDE][0] += passed
        self._profile = None


_SIDES = ("ours", "floor")


def measure(case: Case, places: Places, examples: int, folder: Path, top: int) -> list[Row]:
    """A case's lines of the table: the operators in which a step spends most beyond the floor."""
    shares = Shares()
    fit(case.module(places), data_of(case, places, examples, folder), 2, shares)
    ours, floor = (shares.spent[side] for side in _SIDES)
    whole = sum(spent for spent, _ in ours.values())
    rows: list[Row] = []
    for key in {*ours, *floor}:
        values = {
            **{side: shares.spent[side][key][0] / shares.steps for side in _SIDES},
            **{f"{side}_calls": shares.spent[side][key][1] / shares.steps for side in _SIDES},
        }
        rows.append({"case": case.name, "operator": key, **values, "more": (ours[key][0] - floor[key][0]) / whole})
    rows.sort(key=lambda row: -abs(row["more"]))
    total = {side: sum(row[side] for row in rows) for side in _SIDES}
    more = (total["ours"] - total["floor"]) / total["ours"]
    return [{"case": case.name, "operator": "all", **total, "more": more}, *rows[:top]]


def main(arguments: list[str] | None = None) -> None:
    """Runs the profiler."""
    options = parser("shares", __doc__)
    options.add_argument("--examples", type=int, default=None, help="training examples that are profiled")
    options.add_argument("--top", type=int, default=15, help="operators to show")
    given = options.parse_args(arguments)
    places = places_of(given)
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            row
            for case in chosen(given, KNOWN)
            for row in measure(case, places, examples_of(case, given), Path(folder), given.top)
        ]
    report("shares", given, rows, _COLUMNS)


if __name__ == "__main__":
    main(sys.argv[1:])

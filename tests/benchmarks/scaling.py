"""How the time of a training step grows with tokens, batch, m and r, and the start of a run with the data set's size.

Steps are MiniLM's on synthetic texts of one length, all settings in turns. Starts are ``lopa fit`` in a process each,
with a tiny random model, so that what grows is the work on rows: the first from an empty cache, the second from what
the first left. Exponents are of least squares between logarithms.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer

from lopa_lightning import LoPALightningModule
from lopa_lightning.data.text import TextDataModule
from tests.benchmarks.cache import both
from tests.benchmarks.cases import CASES, Places, build_data, places_of
from tests.benchmarks.harness import Row, Spawn, exponent, line, parser, report, spawn, summary
from tests.benchmarks.training import Turns, fit
from tests.tiny import save_tiny

_COLUMNS = {
    "axis": "axis",
    "size": "size",
    "step": "ms a step",
    "first": "first start, s",
    "second": "second start, s",
    "own": "own memory, MiB",
    "peak": "peak with pages of files, MiB",
    "exponent": "exponent of time",
    "per_100k_rows": "more for each 100k rows",
}
_BASE = {"tokens": 64, "batch": 16, "m": 10, "r": 4}
_AXES: dict[str, tuple[int, ...]] = {
    "tokens": (32, 64, 128, 256, 448),
    "batch": (2, 4, 8, 16, 32),
    "m": (1, 5, 10, 25, 50, 100),
    "r": (1, 2, 4, 8, 16),
}
_QUICK: dict[str, tuple[int, ...]] = {"tokens": (8, 16), "batch": (2, 4), "m": (1, 4), "r": (1, 2)}
_ROWS = (1_000, 10_000, 100_000, 1_000_000)
_WORDS = ("film", "great", "cast", "good", "story", "bad", "half", "better", "first", "second")


@dataclass
class Setting:
    """A module with its data and its clock."""

    size: int
    module: LoPALightningModule
    data: TextDataModule
    turns: Turns


def text(row: int, words: int) -> str:
    """A text of some words that hardly another row has."""
    digits = f"{row:06d}"
    return " ".join(_WORDS[int(digits[place % 6])] for place in range(words))


def synthetic(folder: Path, rows: int, words: int) -> dict[str, str]:
    """Parquet files of labelled texts, all of one length, to train and (32 rows) to validate.

    Args:
        folder: Where to.
        rows: To train.
        words: Of each.
    """
    files = {}
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", rows), ("validation", 32)):
        table = {
            "text": [text(row, words) for row in range(count)],
            "label": [("bad", "good")[row % 2] for row in range(count)],
        }
        files[split] = str(folder / f"{split}.parquet")
        Dataset.from_dict(table).to_parquet(files[split])
    return files


def data_config(files: dict[str, str], batch_size: int) -> dict[str, Any]:
    """A data module of these files."""
    options = {"data_files": files, "labels": ["bad", "good"], "batch_size": batch_size}
    return {"class_path": "lopa_lightning.TextClassificationDataModule", "init_args": options}


def settings(axis: str, sizes: Sequence[int], places: Places, steps: int, folder: Path) -> list[Setting]:
    """What is timed along an axis."""
    case = CASES["minilm_sst2"]
    special = AutoTokenizer.from_pretrained(places.model(case.backbone)).num_special_tokens_to_add()
    made = []
    for size in sizes:
        sized = {**_BASE, axis: size}
        files = synthetic(folder / axis / str(size), steps * sized["batch"], sized["tokens"] - special)
        module = case.module(places, num_virtual_tokens=sized["m"], rank=sized["r"])
        made.append(Setting(size, module, build_data(data_config(files, sized["batch"])), Turns()))
    return made


def steps_along(axis: str, sizes: Sequence[int], places: Places, rounds: int, steps: int, folder: Path) -> list[Row]:
    """The table's lines of an axis: in each round an epoch of some steps for every setting."""
    made = settings(axis, sizes, places, steps, folder)
    for number in range(1 + rounds):
        for setting in made[:: -1 if number % 2 else 1]:
            fit(setting.module, setting.data, 1, setting.turns)
    seconds = [[each / steps for each in setting.turns.seconds["ours"]] for setting in made]
    grows = exponent(sizes, [statistics.median(each) for each in seconds])
    return [
        {
            "axis": axis,
            "size": size,
            "step": summary([1000 * each for each in values]),
            "exponent": grows if size == sizes[-1] else None,
            "seconds": values,
        }
        for size, values in zip(sizes, seconds)
    ]


def starts(sizes: Sequence[int], folder: Path, run: Spawn) -> list[Row]:
    """The table's lines of data-set size; the last says how start and memory grow."""
    name = save_tiny("bert_base", folder / "model")
    tiny = dataclasses.replace(CASES["minilm_sst2"], backbone=name)
    rows: list[Row] = []
    for size in sizes:
        files = synthetic(folder / str(size), size, 12)
        first, second = both(tiny.model_config(Places()), data_config(files, 16), run)
        found = {"first": first["first_step"], "second": second["first_step"]}
        rows.append({"axis": "rows", "size": size, **found, "own": second["own"], "peak": second["peak"]})
    more = {key: line(sizes, [row[key] for row in rows])[1] * 1e5 for key in ("first", "second", "own")}
    rows[-1]["exponent"] = exponent(sizes, [row["first"] for row in rows])
    rows[-1]["growth"] = more
    rows[-1]["per_100k_rows"] = ", ".join(
        f"{more[key]:.3g} {unit}" for key, unit in (("first", "s first"), ("second", "s second"), ("own", "MiB"))
    )
    return rows


def main(arguments: list[str] | None = None, run: Spawn = spawn) -> None:
    """Runs the benchmark."""
    options = parser("scaling", __doc__)
    options.add_argument("--axes", nargs="+", choices=[*_AXES, "rows"], default=[*_AXES, "rows"], help="which axes")
    options.add_argument("--steps", type=int, default=4, help="steps of a round")
    options.add_argument("--rows", type=int, nargs="+", default=_ROWS, help="data-set sizes")
    given = options.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        rows = measured(given, places_of(given), Path(folder), run)
    report("scaling", given, rows, _COLUMNS)


def measured(options: argparse.Namespace, places: Places, folder: Path, run: Spawn) -> list[Row]:
    """All lines of the table."""
    axes = _QUICK if options.quick else _AXES
    rounds, steps = (1, 1) if options.quick else (options.rounds, options.steps)
    rows: list[Row] = []
    for axis in options.axes:
        if axis == "rows":
            rows += starts((20, 200) if options.quick else options.rows, folder / "rows", run)
        else:
            rows += steps_along(axis, axes[axis], places, rounds, steps, folder)
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])

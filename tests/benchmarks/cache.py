"""Time to the first training step of ``lopa fit``, the first time and the second, each in a process of its own.

The first run finds an empty cache for data sets (``HF_DATASETS_CACHE`` is a new folder), the second what the first
left in it.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lopa_lightning.files import write_whole
from tests.benchmarks.cases import CASES, Case, Places, chosen, places_of
from tests.benchmarks.harness import Row, Spawn, parser, ratios, report, spawn, summary

_EXAMPLES = {"minilm_sst2": 3000}
_COLUMNS = {
    "case": "case",
    "examples": "training examples",
    "first": "first run, s",
    "second": "second run, s",
    "ratio": "first / second",
    "first_ready": "first run before its first step, s",
    "second_ready": "second run before its first step, s",
}


def config(model: Mapping[str, Any], data: Mapping[str, Any], found: Path) -> dict[str, Any]:
    """What ``lopa fit`` is given: an epoch, which :class:`~tests.benchmarks.resident.FirstStep` ends at its first step.

    Args:
        model: The module's config.
        data: The data module's.
        found: Where to.
    """
    first = {"class_path": "tests.benchmarks.resident.FirstStep", "init_args": {"path": str(found)}}
    trainer = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,  # all of it is asked for, and ended after a step
        "limit_val_batches": 0,
        "num_sanity_val_steps": 0,
        "logger": False,
        "enable_progress_bar": False,
        "default_root_dir": str(found.parent),
        "callbacks": [first],
    }
    return {"seed_everything": 1, "trainer": trainer, "model": dict(model), "data": dict(data)}


def start(folder: Path, settings: Mapping[str, Any], found: Path, run: Spawn) -> dict[str, float]:
    """One run of ``lopa fit``: seconds until the Trainer was ready and until the first step had ended, and memory.

    Args:
        folder: Holds the config, and the cache that the run uses.
        settings: The config.
        found: The file that the run writes.
        run: Runs a module.
    """
    path = folder / "benchmark.yaml"
    write_whole(path, yaml.safe_dump(dict(settings)))
    began = time.time()
    run(["lopa_lightning", "fit", "--config", str(path)], {"HF_DATASETS_CACHE": str(folder / "cache")})
    values = json.loads(found.read_text())
    return {"ready": values["ready"] - began, "first_step": values["at"] - began, **_memory(values)}


def _memory(values: Mapping[str, float]) -> dict[str, float]:
    return {name: values[name] for name in ("peak", "own")}


def both(model: Mapping[str, Any], data: Mapping[str, Any], run: Spawn) -> list[dict[str, float]]:
    """The first run and the second, from an empty cache on. See :func:`start`."""
    with tempfile.TemporaryDirectory() as name:
        found = Path(name) / "found.json"
        settings = config(model, data, found)
        return [start(Path(name), settings, found, run) for _ in range(2)]


def measure(case: Case, places: Places, examples: int | None, rounds: int, run: Spawn) -> Row:
    """A line of the table."""
    pairs = [both(case.model_config(places), case.data_config(places, examples), run) for _ in range(rounds)]
    seconds = {
        f"{name}{suffix}": [pair[place][key] for pair in pairs]
        for place, name in enumerate(("first", "second"))
        for key, suffix in (("first_step", ""), ("ready", "_ready"))
    }
    return {
        "case": case.name,
        "examples": examples or "all",
        **{name: summary(values) for name, values in seconds.items()},
        "ratio": ratios(seconds["first"], seconds["second"]),
        "seconds": seconds,
        "peak": [[each["peak"] for each in pair] for pair in pairs],
    }


def main(arguments: list[str] | None = None, run: Spawn = spawn) -> None:
    """Runs the benchmark."""
    options = parser("cache", __doc__)
    options.add_argument("--examples", type=int, default=None, help="training examples (default: all, of SST-2 3000)")
    given = options.parse_args(arguments)
    places = places_of(given)
    cases = chosen(given) if given.cases or not given.quick else [CASES["minilm_sst2"]]
    limit = 8 if given.quick else given.examples
    rounds = 1 if given.quick else given.rounds
    rows = [measure(case, places, limit or _EXAMPLES.get(case.name), rounds, run) for case in cases]
    report("cache", given, rows, _COLUMNS)


if __name__ == "__main__":
    main(sys.argv[1:])

"""What the benchmarks share: turns by the clock, ratios, facts about the machine, a table and a JSON file."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lopa_lightning.files import write_whole

Row = dict[str, Any]
Seconds = dict[str, list[float]]
Spawn = Callable[[list[str], Mapping[str, str]], None]
"""Runs a Python module with arguments and additions to the environment, and returns when it has ended well."""

_CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
_clock = ["wall"]

ROOT = Path(__file__).parent.parent.parent


def parser(name: str, description: str | None, rounds: int = 5) -> argparse.ArgumentParser:
    """The options of every benchmark.

    Args:
        name: The benchmark's.
        description: Its docstring.
        rounds: How many are counted by default.
    """
    options = argparse.ArgumentParser(f"python -m tests.benchmarks.{name}", description=description)
    options.add_argument("--json", type=Path, default=Path("runs/benchmarks") / f"{name}.json", help="what is written")
    options.add_argument(
        "--models-root",
        type=Path,
        default=_folder("LOPA_REAL_MODELS"),
        help="folder that holds models by hub id; without it they come from the hub (default: $LOPA_REAL_MODELS)",
    )
    options.add_argument(
        "--data-root",
        type=Path,
        default=_folder("LOPA_REAL_DATA"),
        help="folder that holds data sets by hub id (default: $LOPA_REAL_DATA)",
    )
    options.add_argument("--cases", nargs="+", default=None, help="names of cases; by default all that apply")
    options.add_argument("--rounds", type=int, default=rounds, help="rounds that are counted, after one that is not")
    options.add_argument(
        "--clock",
        choices=list(_CLOCKS),
        default="wall",
        help="cpu: the process's own time, for a shared machine; with OMP_NUM_THREADS=1, as waiting threads count too",
    )
    options.add_argument("--quick", action="store_true", help="a few examples and two rounds: does it run at all")
    return options


def now() -> float:
    """Seconds by the chosen clock."""
    return _CLOCKS[_clock[0]]()


def use_clock(name: str) -> None:
    """Chooses the clock of all that this process times."""
    _clock[0] = name


def take_turns(alternatives: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1) -> Seconds:
    """Times alternatives round by round, so that what else the machine does meets all of them.

    Args:
        alternatives: What is timed, by name; every other round in reverse order.
        rounds: How many are counted.
        warmup: Rounds before, not counted.

    Returns:
        Seconds of each round, by name.
    """
    seconds: Seconds = {name: [] for name in alternatives}
    for number in range(warmup + rounds):
        for name in list(alternatives)[:: -1 if number % 2 else 1]:
            start = now()
            alternatives[name]()
            if number >= warmup:
                seconds[name].append(now() - start)
    return seconds


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median and spread.

    Example:
        >>> summary([3.0, 1.0, 2.0])
        {'median': 2.0, 'min': 1.0, 'max': 3.0}
    """
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratios(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Ratio within each round, in summary: a slow minute then slows both sides.

    Example:
        >>> ratios([2.0, 6.0, 2.0], [1.0, 2.0, 2.0])
        {'median': 2.0, 'min': 1.0, 'max': 3.0}
    """
    return summary([a / b for a, b in zip(above, below)])


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The p of values ~ sizes ** p, by least squares between logarithms.

    Example:
        >>> round(exponent([1, 10, 100], [3, 300, 30000]), 6)
        2.0
    """
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def line(sizes: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """Constant and slope of values ~ constant + slope * sizes, by least squares.

    Example:
        >>> [round(number, 6) for number in line([1, 2, 3], [5, 7, 9])]
        [3.0, 2.0]
    """
    slope, constant = np.polyfit(sizes, values, 1)
    return float(constant), float(slope)


def environment() -> dict[str, Any]:
    """What figures depend on beside the code."""
    packages = ("torch", "lightning", "transformers", "datasets", "peft")
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "dtype": "float32",
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def report(name: str, options: argparse.Namespace, rows: Sequence[Row], columns: Mapping[str, str]) -> None:
    """Prints the table and writes the JSON file.

    Args:
        name: The benchmark's.
        options: As they were parsed.
        rows: One for each line of the table; what is no column is written to the file alone.
        columns: Key in a row to the column's title.
    """
    said = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    record = {"benchmark": name, "environment": environment(), "options": said, "rows": list(rows)}
    write_whole(options.json, json.dumps(record, indent=1) + "\n")
    print(table(rows, columns))
    print(f"{options.json}: {record['environment']}")


def table(rows: Sequence[Row], columns: Mapping[str, str]) -> str:
    """A Markdown table; a summary is written as its median and range.

    Example:
        >>> print(table([{"case": "a", "ratio": {"median": 1.5, "min": 1.0, "max": 2.0}}], {"case": "", "ratio": "r"}))
        |  | r |
        |-|-|
        | a | 1.5 (1..2) |
    """
    lines = [list(columns.values()), *([_cell(row.get(key)) for key in columns] for row in rows)]
    head, *body = ["| " + " | ".join(cells) + " |" for cells in lines]
    return "\n".join([head, "|" + "-|" * len(columns), *body])


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{value['median']:.3g} ({value['min']:.3g}..{value['max']:.3g})"
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def spawn(arguments: list[str], additions: Mapping[str, str]) -> None:
    """Runs ``python -m arguments`` in a process of its own.

    Args:
        arguments: Module and its arguments.
        additions: To the environment.

    Raises:
        RuntimeError: If it fails; with what it said.
    """
    found = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    ended = subprocess.run(
        [sys.executable, "-m", *arguments],
        env={**os.environ, "PYTHONPATH": found, **additions},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if ended.returncode:
        raise RuntimeError(f"{' '.join(arguments)} ended with {ended.returncode}:\n{ended.stdout[-4000:]}")


def _folder(variable: str) -> Path | None:
    return Path(os.environ[variable]).expanduser() if variable in os.environ else None

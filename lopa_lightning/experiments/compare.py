"""Compares methods on tasks and seeds, as tables and a chart: ``lopa compare``."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from lopa_lightning.callbacks.run_record import Result
from lopa_lightning.errors import LoPAError
from lopa_lightning.experiments import chart, report
from lopa_lightning.experiments.resolve import Config, resolve, with_rates_times
from lopa_lightning.experiments.runs import Options, Run, Runs, budget, check_limits, folder_of_runs, parsed
from lopa_lightning.files import write_whole

Tags = dict[str, Any]
"""``task``, ``method``, ``phase`` (``select`` or ``seed``), ``seed`` and ``multiplier`` of a run."""

_SELECTION_SEED = 0


@dataclass(frozen=True, kw_only=True)
class Comparison(Options):
    """Trains every method on every task with every seed, and tabulates the scores.

    Args:
        methods: YAML files, each put over every task; a row of the tables each.
        tasks: Complete YAML files; a table each.
        overlays: YAML files put over every task, under the methods.
        seeds: Seeds of the runs that are reported.
        rate_multipliers: Multipliers of all learning rates. Of several, each method's best on each task is chosen
            first, by runs that validate on a part of the training split.
        selection_splits: Role (``train``, ``val``) to the split that serves it in runs that choose, in place of a part
            drawn from the training split.
        virtual_tokens: Number m of virtual tokens, by method and task, in place of the methods' own.
        output: Folder of the tables, the chart and the runs.
    """

    methods: list[str]
    tasks: list[str]
    overlays: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    rate_multipliers: list[float] = field(default_factory=lambda: [1.0])
    selection_splits: dict[str, str] | None = None
    virtual_tokens: dict[str, dict[str, int]] = field(default_factory=dict)
    output: str = "runs/comparison"


def check(comparison: Comparison) -> None:
    """Raises a LoPAError that names an option outside its limits."""
    tasks, splits = {Path(task).stem for task in comparison.tasks}, comparison.selection_splits
    limits = {
        "selection_share": (0 < comparison.selection_share < 1, "above 0 and below 1"),
        "selection_splits": (splits is None or {*splits} == {"train", "val"}, "a split for train and one for val"),
        "virtual_tokens": (
            all(tasks <= {*lengths} for lengths in comparison.virtual_tokens.values()),
            f"for each method of every task ({', '.join(sorted(tasks))})",
        ),
    }
    for name in ("methods", "tasks", "seeds", "rate_multipliers"):
        values = [Path(value).stem if isinstance(value, str) else value for value in getattr(comparison, name)]
        limits[name] = (0 < len(values) == len(set(values)), "at least one, each of a name or value of its own")
    if not all(0 < rate < math.inf for rate in comparison.rate_multipliers):
        limits["rate_multipliers"] = (False, "positive numbers")
    elif len({f"{rate:g}" for rate in comparison.rate_multipliers}) < len(comparison.rate_multipliers):
        limits["rate_multipliers"] = (False, "at least one, different in six digits")
    if not all(0 <= seed < 2**32 for seed in comparison.seeds):
        limits["seeds"] = (False, f"from 0 to {2**32 - 1}")
    check_limits(comparison, **limits)


def configs_of(comparison: Comparison, options: Sequence[str] = ()) -> dict[tuple[str, str], Config]:
    """Resolves every configuration.

    Args:
        comparison: What to compare.
        options: Of every run, put over its configuration.

    Returns:
        By task and method: all methods of the first task, then of the next.

    Raises:
        LoPAError: Naming everything that cannot be run.
    """
    check(comparison)
    if any(option.partition("=")[0] == "--seed_everything" for option in options):
        raise LoPAError("--seed_everything: each run has its own of seeds; give --seeds before the --")
    methods = sorted(Path(method).stem for method in comparison.methods)
    if others := sorted({*comparison.virtual_tokens} - {*methods}):
        rank_zero_warn(f"virtual_tokens has no effect for {', '.join(others)}; compared are {', '.join(methods)}")
    configs, wrong = {}, []
    chooses_on = comparison.selection_splits if len(comparison.rate_multipliers) > 1 else None
    held_out = [f"--data.{name}" for name in _held_out(comparison)]
    for task in comparison.tasks:
        for method in comparison.methods:
            names = Path(task).stem, Path(method).stem
            length = comparison.virtual_tokens.get(names[1], {}).get(names[0])
            own = [] if length is None else [f"--model.prompt_encoder.num_virtual_tokens={length}"]
            files, given = [task, *comparison.overlays, method], [*own, *budget(comparison), *options]
            try:
                config = resolve(files, given)
                if held_out and method == comparison.methods[0]:  # a task's data may refuse them
                    resolve(files, [*given, *held_out])
                for multiplier in comparison.rate_multipliers:
                    with_rates_times(config, multiplier)
                share = config["data"].get("init_args", {}).get("validation_from_train")
                if share and len(comparison.rate_multipliers) > 1 and chooses_on is None:
                    raise LoPAError(
                        f"data.validation_from_train {share:g} would be reported, and rate_multipliers be chosen on "
                        "the same rows: leave it out (runs that choose have selection_share), or give one multiplier"
                    )
                configs[names] = config
            except LoPAError as error:
                wrong.append("{} {}: {}".format(*names, error))
    if wrong:
        raise LoPAError("nothing was run, since\n  " + "\n  ".join(line.replace("\n", "\n    ") for line in wrong))
    return configs


def _held_out(comparison: Comparison) -> list[str]:
    """Returns the options of the data by which runs that choose validate on a part of the training split."""
    if len(comparison.rate_multipliers) == 1:
        return []
    if (splits := comparison.selection_splits) is None:
        return [f"validation_from_train={comparison.selection_share}"]
    return [f"splits.{role}={split}" for role, split in splits.items()]


class Comparing:
    """Makes the runs of a comparison, and keeps its report up to date.

    Args:
        comparison: What to compare.
        configs: As from :func:`configs_of`.
    """

    def __init__(self, comparison: Comparison, configs: dict[tuple[str, str], Config]) -> None:
        self.comparison = comparison
        self.configs = configs
        self.runs = Runs(comparison.output, self.write_report, comparison.workers)
        self.tags: dict[Path, Tags] = {}
        multipliers = comparison.rate_multipliers if len(comparison.rate_multipliers) > 1 else []
        for task, method in configs:
            folder, names = self.runs.folder / task / method, {"task": task, "method": method}
            for multiplier in multipliers:
                tags = {**names, "phase": "select", "seed": _SELECTION_SEED, "multiplier": multiplier}
                self.tags[folder / f"select-{multiplier:g}"] = tags
            for seed in comparison.seeds:
                only = None if multipliers else comparison.rate_multipliers[0]
                self.tags[folder / f"seed-{seed}"] = {**names, "phase": "seed", "seed": seed, "multiplier": only}
        self.runs.total = len(self.tags)

    def run(self) -> None:
        """Makes the runs that choose rates, then those that are reported."""
        self.runs.make([self._run(folder, tags) for folder, tags in self.tags.items() if tags["phase"] == "select"])
        selected = dict(self.runs.results)
        reported = {folder: tags for folder, tags in self.tags.items() if tags["phase"] == "seed"}
        for folder, tags in reported.items():
            if tags["multiplier"] is None:
                found = {
                    self.tags[path]["multiplier"]: r for path, r in selected.items() if path.parent == folder.parent
                }
                tags["multiplier"] = choose_multiplier(found)
            if tags["multiplier"] is None:
                self.runs.results[folder] = Result("failed", reason="every selection run failed")
        self.runs.make([self._run(*item) for item in reported.items() if item[1]["multiplier"] is not None])
        self.write_report()

    def _run(self, folder: Path, tags: Tags) -> Run:
        """Returns a run with its rates, its seed and what it validates on."""
        config = with_rates_times(self.configs[tags["task"], tags["method"]], tags["multiplier"])
        config["seed_everything"] = tags["seed"]
        if tags["phase"] == "select":
            data, splits = config["data"].setdefault("init_args", {}), self.comparison.selection_splits
            if splits is None:
                data["validation_from_train"] = self.comparison.selection_share
            else:
                data |= {"splits": {**(data.get("splits") or {}), **splits}, "validation_from_train": 0.0}
        return Run(folder, config, tags)

    def write_report(self) -> None:
        """Writes ``comparison.csv``, ``.md``, ``.svg`` and ``.curves.svg``."""
        results = [self.runs.results.get(path) for path in self.tags]
        table = report.runs_table(list(zip(self.tags.values(), results)))
        contents = {"csv": report.csv_text(table), "svg": chart.svg(table)}
        contents["curves.svg"] = chart.curves_svg(table, results)
        contents["md"] = report.markdown_text(table, self.comparison.rate_multipliers)
        for kind, text in contents.items():
            write_whole(Path(self.comparison.output) / f"comparison.{kind}", text)


def choose_multiplier(results: dict[float, Result]) -> float | None:
    """Returns the multiplier whose run ended with the best score; among equals the lowest loss decides.

    Args:
        results: Of selection runs, by multiplier.

    Returns:
        None if no run has ended well.
    """

    def merit(multiplier: float) -> tuple[float, float]:
        result = results[multiplier]
        return result.score, -result.metrics.get("val/loss", math.inf)

    return max((multiplier for multiplier, result in results.items() if result.done), key=merit, default=None)


def main(args: Sequence[str]) -> None:
    """Runs ``lopa compare``.

    Args:
        args: What follows on the command line.

    Raises:
        LoPAError: If something cannot be run; nothing is, then.
        SystemExit: With status 1 if a run failed.
    """
    comparison, options = parsed(Comparison, "lopa compare", args)
    if importlib.util.find_spec("matplotlib") is None:
        raise LoPAError('the chart needs matplotlib: pip install "lopa-lightning[compare]"')
    with folder_of_runs(comparison.output):
        comparing = Comparing(comparison, configs_of(comparison, options))
        comparing.run()
    print(f"Report in {Path(comparison.output, 'comparison.md')}, .csv, .svg and .curves.svg")
    comparing.runs.end_command()

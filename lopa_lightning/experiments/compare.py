"""``lopa compare``: methods on tasks and seeds, as tables and a chart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lopa_lightning.callbacks.run_record import Result
from lopa_lightning.errors import LoPAError
from lopa_lightning.experiments import chart, report
from lopa_lightning.experiments.command import alone_in, end_with, interruptible, parsed
from lopa_lightning.experiments.report import Row, choose_factor
from lopa_lightning.experiments.resolve import Config, resolve, with_rates_times
from lopa_lightning.experiments.run import Run, launch
from lopa_lightning.files import write_whole

_ONLY_TASK = "task"  # its name where methods are complete configs


@dataclass(frozen=True)
class Comparison:
    """Trains every method on every task with every seed, and tabulates the scores.

    Args:
        methods: YAML files, a row of the table each: put over every task or, without tasks, complete.
        tasks: Complete YAML files, a column each.
        overlays: YAML files put over every task, under the methods; without tasks, over the methods.
        seeds: Seeds of the runs that are reported.
        rate_factors: Multipliers of all learning rates. Of several, each method's best on each task is chosen
            first, by runs that validate on a part of the training split.
        selection_seed: Seed of these runs.
        selection_share: Share of the training split that they validate on.
        max_epochs: Epochs of every run, in place of the tasks'.
        max_steps: Optimizer steps of every run, in place of the tasks'; what comes first of it and the epochs ends it.
        reach: Share of the best method's mean score, for the samples that it takes to get there.
        output: Folder of the tables, the chart and the runs.
        keep_checkpoints: Whether the checkpoints of finished runs stay.
        workers: Runs at once; by default one on each visible GPU, or one where there is none.
    """

    methods: list[str]
    tasks: list[str] = field(default_factory=list)
    overlays: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    rate_factors: list[float] = field(default_factory=lambda: [1.0])
    selection_seed: int = 0
    selection_share: float = 0.2
    max_epochs: int | None = None
    max_steps: int | None = None
    reach: float = 0.95
    output: str = "runs/comparison"
    keep_checkpoints: bool = False
    workers: int | None = None

    @property
    def selects(self) -> bool:
        """Whether there are rate factors to choose from."""
        return len(self.rate_factors) > 1

    def check(self) -> list[str]:
        """What cannot be right, a line each."""
        wrong = []
        for name in ("methods", "seeds", "rate_factors"):
            if not getattr(self, name):
                wrong.append(f"{name}: give at least one")
        for name in ("methods", "tasks"):
            wrong += [f"{name}: {stem!r} is the name of two" for stem in _repeated(map(_stem, getattr(self, name)))]
        for name in ("seeds", "rate_factors"):
            wrong += [f"{name}: {value:g} is given twice" for value in _repeated(getattr(self, name))]
        if any(factor <= 0 for factor in self.rate_factors):
            wrong.append(f"rate_factors must be positive, got {self.rate_factors}")
        for name, highest in (("selection_share", "below 1"), ("reach", "at most 1")):
            value = getattr(self, name)
            if not 0 < value <= 1 or (value == 1 and name == "selection_share"):
                wrong.append(f"{name} must be above 0 and {highest}, got {value:g}")
        if self.workers is not None and self.workers < 1:
            wrong.append(f"workers must be at least 1, got {self.workers}")
        return wrong


@dataclass(frozen=True)
class Pair:
    """A method on a task.

    Attributes:
        task: Its column.
        method: Its row.
        config: What is run for the report, but for seed and rates.
        selection: The same, validated on a part of the training split; None where nothing is chosen.
    """

    task: str
    method: str
    config: Config
    selection: Config | None


def _stem(path: str) -> str:
    return Path(path).stem


def _repeated(values: Any) -> list[Any]:
    found = list(values)
    return [value for value in dict.fromkeys(found) if found.count(value) > 1]


def plan(comparison: Comparison, options: Sequence[str] = ()) -> list[Pair]:
    """Resolves every configuration.

    Args:
        comparison: What to compare.
        options: Of every run, put over its configuration.

    Returns:
        All methods of the first task, then of the next.

    Raises:
        LoPAError: Naming everything that cannot be run.
    """
    wrong = comparison.check()
    budget = {"max_epochs": comparison.max_epochs, "max_steps": comparison.max_steps}
    fixed = [*options, *(f"--trainer.{name}={value}" for name, value in budget.items() if value is not None)]
    held_out = f"--data.init_args.validation_from_train={comparison.selection_share}"
    pairs = []
    columns: Sequence[str | None] = comparison.tasks or [None]
    for task in columns:
        for method in comparison.methods:
            layers = [task, *comparison.overlays, method] if task is not None else [method, *comparison.overlays]
            configs = [path for path in layers if path is not None]
            name = _ONLY_TASK if task is None else _stem(task)
            try:
                config = resolve(configs, fixed)
                selection = resolve(configs, [*fixed, held_out]) if comparison.selects else None
                for factor in comparison.rate_factors:
                    with_rates_times(config, factor)
                pairs.append(Pair(name, _stem(method), config, selection))
            except LoPAError as error:
                wrong.append(f"{name} {_stem(method)}: {error}")
    if wrong:
        raise LoPAError("nothing was run, since\n  " + "\n  ".join(line.replace("\n", "\n    ") for line in wrong))
    return pairs if comparison.tasks else _named_by_task(pairs)


def _named_by_task(pairs: list[Pair]) -> list[Pair]:
    tasks = {str(pair.config["data"]["init_args"].get("task") or _ONLY_TASK) for pair in pairs}
    name = tasks.pop() if len(tasks) == 1 else _ONLY_TASK
    return [replace(pair, task=name) for pair in pairs]


class Comparing:
    """Runs a comparison, and keeps its report up to date.

    Args:
        comparison: What to compare.
        pairs: As from :func:`plan`.
        say: Takes the lines of progress.
    """

    def __init__(self, comparison: Comparison, pairs: Sequence[Pair], say: Callable[[str], None] = print) -> None:
        self.comparison = comparison
        self.pairs = pairs
        self.say = say
        self.folder = Path(comparison.output)
        self.rows: dict[Path, Row] = {}
        self.ended = 0
        only = None if comparison.selects else comparison.rate_factors[0]
        for pair in pairs:
            rows = [Row(pair.task, pair.method, "seed", seed, only) for seed in comparison.seeds]
            if comparison.selects:
                seed = comparison.selection_seed
                rows = [Row(pair.task, pair.method, "select", seed, f) for f in comparison.rate_factors] + rows
            for row in rows:
                name = f"select-{row.factor:g}" if row.phase == "select" else f"seed-{row.seed}"
                self.rows[self.folder / "runs" / row.task / row.method / name] = row

    def run(self) -> list[Row]:
        """Runs what has not been run, first to choose rates and then to report.

        Returns:
            All rows.
        """
        self._launch("select")
        if self.comparison.selects:
            for pair in self.pairs:
                self._choose(pair)
        self._launch("seed")
        self.write_report()
        return list(self.rows.values())

    def _choose(self, pair: Pair) -> None:
        """Takes the best multiplier of a method on a task; where there is none, its seeds have failed."""
        of_pair = {path: r for path, r in self.rows.items() if (r.task, r.method) == (pair.task, pair.method)}
        factor = choose_factor([row for row in of_pair.values() if row.phase == "select"])
        for path, row in of_pair.items():
            if row.phase == "seed":
                nothing = None if factor is not None else Result("failed", "", "every selection run failed")
                self.rows[path] = replace(row, factor=factor, result=nothing)
                self.ended += factor is None

    def _run(self, folder: Path, row: Row) -> Run:
        pair = next(pair for pair in self.pairs if (pair.task, pair.method) == (row.task, row.method))
        base = pair.selection if row.phase == "select" else pair.config
        assert base is not None
        assert row.factor is not None
        config = {**with_rates_times(base, row.factor), "seed_everything": row.seed}
        tags = {"task": row.task, "method": row.method, "phase": row.phase, "seed": row.seed, "factor": row.factor}
        return Run(folder, config, tags, self.comparison.keep_checkpoints)

    def _launch(self, phase: str) -> None:
        chosen = {path: r for path, r in self.rows.items() if r.phase == phase and r.factor is not None}
        todo = []
        for folder, row in chosen.items():
            run = self._run(folder, row)
            if (result := run.finished()) is not None:
                self.rows[folder] = replace(row, result=result)
                self.ended += 1
                continue
            todo.append(run)
            if run.is_changed():
                self.say(f"{row.name}: its configuration has changed; the old run is put aside, and it starts again")
        if len(todo) < len(chosen):
            self.say(f"{len(chosen) - len(todo)} of {len(chosen)} {phase} runs have ended before")
        launch(todo, self._on_end, self.comparison.workers)

    def _on_end(self, run: Run, result: Result) -> None:
        self.ended += 1
        row = self.rows[run.folder] = replace(self.rows[run.folder], result=result)
        self.say(f"[{self.ended}/{len(self.rows)}] {row.name}: {run.outcome(result)}")
        self.write_report()

    def write_report(self) -> None:
        """Writes ``comparison.csv``, ``.md`` and ``.svg``."""
        comparison = self.comparison
        table = report.runs_table(list(self.rows.values()), comparison.reach)
        text = report.markdown_text(table, comparison.reach, comparison.rate_factors)
        write_whole(self.folder / "comparison.csv", report.csv_text(table))
        write_whole(self.folder / "comparison.md", text)
        write_whole(self.folder / "comparison.svg", chart.svg(table))


def main(args: Sequence[str]) -> None:
    """Runs ``lopa compare``.

    Args:
        args: What follows on the command line.

    Raises:
        LoPAError: If something cannot be run; nothing is, then.
        SystemExit: With status 1 if a run failed, 130 if interrupted.
    """
    comparison, options = parsed(Comparison, "lopa compare", args)
    chart.check_installed()
    with interruptible():
        comparing = Comparing(comparison, plan(comparison, options), lambda line: print(line, flush=True))
        with alone_in(comparing.folder):
            rows = comparing.run()
    print(f"Report in {comparing.folder / 'comparison.md'}, .csv and .svg")
    end_with(len(rows), "runs", [row.name for row in rows if not row.done])

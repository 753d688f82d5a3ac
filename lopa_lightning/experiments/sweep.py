"""``lopa sweep``: a search over hyperparameters with Optuna."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import pandas as pd
import torch
import yaml

from lopa_lightning.callbacks.run_record import Result
from lopa_lightning.errors import LoPAError
from lopa_lightning.experiments.command import alone_in, end_with, interruptible, parsed
from lopa_lightning.experiments.report import csv_text, markdown_table, measured
from lopa_lightning.experiments.resolve import Config, resolve
from lopa_lightning.experiments.run import Run, launch
from lopa_lightning.files import write_whole

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

Sampler = Literal["grid", "tpe", "random"]
Trial = tuple[dict[str, Any], Result]
"""Option to value, and what came out."""

_SEED = "seed_everything"


@dataclass(frozen=True)
class Sweep:
    """Searches the best hyperparameters, and tabulates all that were tried.

    Args:
        configs: YAML files, each put over the one before, as for lopa fit.
        space: Option by its whole name (model.init_args.prompt_encoder.init_args.rank) to a list of values, or to
            {low, high} with log: true or step. seed_everything may be one: seeds are repetitions.
        sampler: grid for every combination of lists; tpe (Optuna's default) or random for so many trials.
        trials: How many, with tpe and random.
        seed: Of the search.
        selection_share: Share of the training split to validate on; 0 for the validation split itself, whose
            scores are then no longer those of unseen data.
        max_epochs: Epochs of every trial, in place of the configs'.
        max_steps: Optimizer steps of every trial, in place of the configs'.
        output: Folder of the study, its tables and the runs.
        workers: Trials at once; by default one on each visible GPU, or one where there is none.
    """

    configs: list[str]
    space: dict[str, Any]
    sampler: Sampler = "tpe"
    trials: int = 20
    seed: int = 0
    selection_share: float = 0.2
    max_epochs: int | None = None
    max_steps: int | None = None
    output: str = "runs/sweep"
    workers: int | None = None

    def check(self) -> None:
        """Raises a LoPAError that names what cannot be right."""
        wrong = [f"{name}: give at least one" for name in ("configs", "space") if not getattr(self, name)]
        if self.sampler not in get_args(Sampler):
            wrong.append(f"sampler must be one of {', '.join(get_args(Sampler))}, got {self.sampler!r}")
        if self.trials < 1:
            wrong.append(f"trials must be at least 1, got {self.trials}")
        if not 0 <= self.selection_share < 1:
            wrong.append(f"selection_share must be a share below 1, got {self.selection_share:g}")
        for name, choice in self.space.items():
            try:
                distribution(choice)
            except LoPAError as error:
                wrong.append(f"space: {name}: {error}")
            else:
                if self.sampler == "grid" and isinstance(choice, dict):
                    wrong.append(f"space: {name}: a grid needs lists of values, got {choice}")
        if wrong:
            raise LoPAError("nothing was run, since\n  " + "\n  ".join(wrong))


def distribution(choice: Any) -> BaseDistribution:
    """Returns what Optuna draws an option's value from.

    Args:
        choice: A list of values, or ``{low, high}`` with ``log: true`` or ``step``; whole numbers where both ends are.

    Raises:
        LoPAError: If it is neither, or Optuna is not installed or has no such distribution.
    """
    try:
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
    except ImportError:
        raise LoPAError('sweeps run on Optuna: pip install "lopa-lightning[sweep]"') from None
    is_range = isinstance(choice, dict) and {"low", "high"} <= set(choice) <= {"low", "high", "log", "step"}
    if not is_range and not isinstance(choice, list):
        raise LoPAError(f"must be a list of values or {{low, high}} with log or step, got {choice}")
    try:
        if isinstance(choice, list):
            if repeated := [value for value in choice if choice.count(value) > 1]:
                raise LoPAError(f"{repeated[0]!r} is given twice")
            if odd := [value for value in choice if isinstance(value, (list, dict))]:
                raise LoPAError(f"values must be numbers, texts, true, false or null, got {odd[0]}")
            return CategoricalDistribution(choice)
        ends = [choice["low"], choice["high"]]
        if any(type(end) not in (int, float) for end in ends) or not ends[0] < ends[1]:
            raise LoPAError(f"needs numbers low < high, got {choice}")
        whole = all(isinstance(end, int) for end in ends)
        return IntDistribution(**choice) if whole else FloatDistribution(**choice)
    except (ValueError, TypeError) as error:
        raise LoPAError(str(error)) from None


class Sweeping:
    """Runs a sweep, and keeps its report up to date.

    Optuna chooses; what has been tried is in the folders of the runs, and nowhere else.

    Args:
        sweep: What to search.
        options: Of every trial, put over its configuration.
        say: Takes the lines of progress.

    Raises:
        LoPAError: If an option is not there, a value cannot be, or the folder holds another sweep.
    """

    def __init__(self, sweep: Sweep, options: Sequence[str] = (), say: Callable[[str], None] = print) -> None:
        self.sweep = sweep
        self.say = say
        self.folder = Path(sweep.output)
        budget = {"max_epochs": sweep.max_epochs, "max_steps": sweep.max_steps}
        self.fixed = [*options, *(f"--trainer.{name}={value}" for name, value in budget.items() if value is not None)]
        self.drawn_from = {name: distribution(choice) for name, choice in sweep.space.items()}
        self.results: list[Trial] = []
        self._check_space()
        self._check_folder()

    def config(self, values: dict[str, Any]) -> Config:
        """Returns the whole configuration of a trial.

        Args:
            values: Option to value.
        """
        written = {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}
        share = self.sweep.selection_share
        held_out = [f"--data.init_args.validation_from_train={share}"] if share else []
        chosen = [f"--{name}={value}" for name, value in written.items()]
        return resolve(self.sweep.configs, [*self.fixed, *held_out, *chosen])

    def _check_space(self) -> None:
        """Refuses options that are not there, and values that the ends of a range or a list cannot have."""
        self.plain = self.config({})
        for name, choice in self.sweep.space.items():
            *path, last = name.split(".")
            here: Any = self.plain
            # A group of parameters has an entry there only where the configs give it a rate of its own.
            for part in path if path[-1:] == ["learning_rates"] else [*path, last]:
                if not isinstance(here, dict) or part not in here:
                    raise LoPAError(f"space: the configs have no option {name!r}; name it as --print_config shows it")
                here = here[part]
            for value in choice if isinstance(choice, list) else (choice["low"], choice["high"]):
                self.config({name: value})

    def _check_folder(self) -> None:
        given = {"space": self.sweep.space, "configuration": self.plain}
        path, written = self.folder / "sweep.json", json.dumps(given, sort_keys=True, default=str)
        if path.is_file():
            known = json.loads(path.read_text(encoding="utf-8"))
            for what, value in json.loads(written).items():
                if known.get(what) != value:
                    raise LoPAError(f"{self.folder} holds a sweep of another {what}; give another output")
        else:
            write_whole(path, written)

    def run(self) -> list[Trial]:
        """Runs what has not been run.

        Returns:
            Values and result of every trial.
        """
        study, waiting = self._study()
        done = len(self.results)
        total = len(waiting) + done if self.sweep.sampler == "grid" else max(self.sweep.trials, done)
        if done:
            self.say(f"{done} of {total} trials have ended before")
        at_once = self.sweep.workers or max(1, torch.cuda.device_count())
        for start in range(done, total, at_once):
            self._run_trials(study, min(at_once, total - start), total)
        self.write_report()
        return self.results

    def _study(self) -> tuple[optuna.Study, list[dict[str, Any]]]:
        """Tells Optuna what the folders hold, and queues what was interrupted or is left of a grid.

        Failed trials of a grid run again; others are not drawn on purpose.
        """
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        kept = [result for path in sorted(self.folder.glob("runs/*")) if (result := Result.read(path)) is not None]
        trials = [(result.tags, result) for result in kept if self._run(result.tags).finished() == result]
        self.results = sorted(trials, key=lambda trial: json.dumps(trial[0], sort_keys=True))
        # Else a sweep that goes on would draw what it drew at first.
        seed = self.sweep.seed + len(self.results)
        # A grid's values are all in the queue, so that nothing is drawn.
        tpe = self.sweep.sampler == "tpe"
        sampler = optuna.samplers.TPESampler(seed=seed) if tpe else optuna.samplers.RandomSampler(seed=seed)
        study = optuna.create_study(direction="maximize", sampler=sampler)
        for values, result in self.results:
            study.add_trial(optuna.trial.create_trial(params=values, distributions=self.drawn_from, value=result.score))
        waiting = [result.tags for result in kept if result.status == "running"]
        if self.sweep.sampler == "grid":
            waiting = combinations(self.sweep.space)
        waiting = [values for values in waiting if values not in [done for done, _ in self.results]]
        for values in waiting:
            study.enqueue_trial(values)
        return study, waiting

    def _run(self, values: dict[str, Any]) -> Run:
        return Run(self.folder / "runs" / _name(values), self.config(values), tags=values)

    def _run_trials(self, study: optuna.Study, count: int, total: int) -> None:
        asked = [study.ask(self.drawn_from) for _ in range(count)]
        trials = {(run := self._run(trial.params)).folder: (trial, run) for trial in asked}

        def on_end(run: Run, result: Result) -> None:
            trial = trials[run.folder][0]
            if result.done:
                study.tell(trial, result.score)
            else:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
            self.results.append((run.tags, result))
            self.say(f"[{len(self.results)}/{total}] {run.folder.name}: {run.outcome(result)}")
            self.write_report()

        import optuna

        todo = []
        for _, run in trials.values():
            if (result := run.finished()) is not None:  # drawn a second time
                on_end(run, result)
            else:
                todo.append(run)
        launch(todo, on_end, self.sweep.workers)

    def write_report(self) -> None:
        """Writes ``sweep.csv``, ``sweep.md`` and, as an overlay for lopa fit, ``best.yaml``."""
        options = list(self.sweep.space)
        table = trials_table(self.results)
        write_whole(self.folder / "sweep.csv", csv_text(table))
        settings = by_settings(table, options)
        if len(settings):
            write_whole(self.folder / "sweep.md", settings_markdown(settings))
            best = {name: value for name, value in settings.iloc[0].items() if name in options}
            write_whole(self.folder / "best.yaml", yaml.safe_dump(nested(best), sort_keys=False))


def trials_table(trials: Sequence[Trial]) -> pd.DataFrame:
    """Returns a line for each trial: its options, and what was measured."""
    lines = [{**values, **measured(result)} for values, result in trials]
    return pd.DataFrame(lines, dtype=object)  # whole numbers stay whole


def by_settings(table: pd.DataFrame, options: Sequence[str]) -> pd.DataFrame:
    """Returns ``score``, ``sd`` and ``runs`` of the trials that ended well, by what is not the seed; the best first."""
    settings = [name for name in options if name != _SEED]
    done = table[(table.status == "done") & table.score.notna()] if len(table) else table
    if not len(done):
        return done
    keys = done[settings].map(json.dumps).agg(tuple, axis=1)  # None and true are values like others
    groups = [
        {**group.iloc[0][settings], "score": group.score.mean(), "sd": group.score.std(), "runs": len(group)}
        for _, group in done.groupby(keys, sort=False)
    ]
    return pd.DataFrame(groups).astype(object).sort_values("score", ascending=False, kind="stable")


def settings_markdown(settings: pd.DataFrame) -> str:
    """Returns a table of what :func:`by_settings` found."""
    *options, _, _, _ = settings.columns
    body = [
        [
            *(shown_value(line[name]) for name in options),
            f"{line.score:.4f}",
            "–" if pd.isna(line.sd) else f"{line.sd:.4f}",
            str(line.runs),
        ]
        for _, line in settings.iterrows()
    ]
    return markdown_table([*short_names(options).values(), "score", "sd", "runs"], body) + "\n"


def combinations(space: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Returns all combinations of the values of a grid.

    Example:
        >>> combinations({"rank": [1, 2], "seed": [0]})
        [{'rank': 1, 'seed': 0}, {'rank': 2, 'seed': 0}]
    """
    return [dict(zip(space, values)) for values in itertools.product(*space.values())]


def nested(values: dict[str, Any]) -> dict[str, Any]:
    """Returns options by dotted names as a YAML file has them.

    Example:
        >>> nested({"trainer.max_epochs": 3, "model.init_args.warmup": 0.1})
        {'trainer': {'max_epochs': 3}, 'model': {'init_args': {'warmup': 0.1}}}
    """
    tree: dict[str, Any] = {}
    for name, value in values.items():
        *path, last = name.split(".")
        functools.reduce(lambda here, part: here.setdefault(part, {}), path, tree)[last] = value
    return tree


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Returns the shortest ends of options' dotted names that tell them apart, by name.

    Example:
        >>> short_names(["model.optimizer.lr", "model.backbone.name", "model.instance_encoder.name"])
        {'model.optimizer.lr': 'lr', 'model.backbone.name': 'backbone.name', \
'model.instance_encoder.name': 'instance_encoder.name'}
    """
    names = list(names)

    def end(name: str, parts: int) -> str:
        return ".".join(name.split(".")[-parts:])

    def is_unique(name: str, parts: int) -> bool:
        return sum(end(other, parts) == end(name, parts) for other in names) == 1

    return {name: end(name, next(n for n in itertools.count(1) if is_unique(name, n))) for name in names}


def shown_value(value: Any) -> str:
    """Returns a value for people: a number in four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _name(values: dict[str, Any]) -> str:
    """A folder's name: readable, and different where values differ."""
    names = short_names(values)
    shown = ",".join(f"{names[name]}={shown_value(value)}" for name, value in values.items())
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:6]
    return re.sub(r"[^\w=,.+-]+", "_", shown)[:100] + f"-{digest}"


def main(args: Sequence[str]) -> None:
    """Runs ``lopa sweep``.

    Args:
        args: What follows on the command line.

    Raises:
        LoPAError: If something cannot be run; nothing is, then.
        SystemExit: With status 1 if a trial failed, 130 if interrupted.
    """
    sweep, options = parsed(Sweep, "lopa sweep", args)
    sweep.check()
    with interruptible(), alone_in(Path(sweep.output)):
        sweeping = Sweeping(sweep, options, lambda line: print(line, flush=True))
        trials = sweeping.run()
    print(f"Report in {sweeping.folder / 'sweep.md'} and .csv; the best settings in best.yaml")
    print(f"  tensorboard --logdir {sweeping.folder / 'runs'}")
    end_with(len(trials), "trials", [_name(values) for values, result in trials if not result.done])

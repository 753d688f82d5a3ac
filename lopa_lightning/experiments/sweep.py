"""Searches hyperparameters with Optuna: ``lopa sweep``."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from lopa_lightning.callbacks.run_record import Result
from lopa_lightning.command_line import yaml_files
from lopa_lightning.errors import LoPAError, imported
from lopa_lightning.experiments.report import csv_text, markdown_table, record
from lopa_lightning.experiments.resolve import Config, resolve
from lopa_lightning.experiments.runs import Options, Run, Runs, budget, check_limits, folder_of_runs, parsed
from lopa_lightning.files import write_whole

Values = dict[str, Any]
"""Option to value, of a trial."""

_SEED = "seed_everything"
_OF_THE_BEST = ("sweep.md", "best.yaml")


@dataclass(frozen=True, kw_only=True)
class Sweep(Options):
    """Searches the best hyperparameters, and tabulates all that were tried.

    Args:
        configs: YAML files, each put over the one before, as for lopa fit.
        space: Option by its whole name (model.init_args.prompt_encoder.init_args.rank) to a list of values, or to
            {low, high} with log: true or step. seed_everything may be one: seeds are repetitions.
        sampler: grid for every combination of lists; tpe (Optuna's default) or random for so many trials.
        trials: How many, with tpe and random.
        seed: Of the search.
        selection_share: Share of the training split to validate on; 0 for the validation split itself, whose
            scores are then those of data that was chosen by.
        output: Folder of the tables and the runs.
    """

    configs: list[str]
    space: dict[str, Any]
    sampler: Literal["grid", "tpe", "random"] = "tpe"
    trials: int = 20
    seed: int = 0
    output: str = "runs/sweep"


def check(sweep: Sweep) -> None:
    """Raises a LoPAError that names an option outside its limits."""
    is_list = all(isinstance(choice, list) for choice in sweep.space.values())
    limits = {name: (len(getattr(sweep, name)) > 0, "at least one") for name in ("configs", "space")}
    limits["sampler"] = (is_list or sweep.sampler != "grid", "tpe or random where the space has ranges")
    check_limits(sweep, trials=(sweep.trials > 0, "at least 1"), **limits)


def distribution(name: str, choice: Any) -> Any:
    """Returns what Optuna draws an option's value from.

    Args:
        name: The option.
        choice: A list of values, or ``{low, high}`` with ``log: true`` or ``step``; whole numbers where all of
            these are.

    Raises:
        LoPAError: If it is neither, or Optuna is not installed or has no such distribution.
    """
    distributions = _optuna().distributions
    try:
        if isinstance(choice, list) and not any(isinstance(value, (list, dict)) for value in choice):
            if len(set(map(json.dumps, choice))) < len(choice):
                raise ValueError(f"values must differ, got {choice}")
            return distributions.CategoricalDistribution(choice)
        if isinstance(choice, dict) and {"low", "high"} <= set(choice) <= {"low", "high", "log", "step"}:
            whole = all(isinstance(choice.get(part, 1), int) for part in ("low", "high", "step"))
            return (distributions.IntDistribution if whole else distributions.FloatDistribution)(**choice)
    except (ValueError, TypeError) as error:
        raise LoPAError(f"space: {name}: {error}") from None
    raise LoPAError(f"space: {name} must be a list of plain values, or {{low, high}} with log or step, got {choice}")


def _optuna() -> Any:
    return imported("optuna", "sweep", "sweeps run on Optuna")


class Sweeping:
    """Makes the runs of a sweep, and keeps its report up to date.

    Optuna chooses; what has been tried is in the folders of the runs, and nowhere else.

    Args:
        sweep: What to search.
        options: Of every run, put over its configuration.

    Raises:
        LoPAError: If an option is not there, or a value cannot be.
    """

    def __init__(self, sweep: Sweep, options: Sequence[str] = ()) -> None:
        check(sweep)
        self.sweep = sweep
        held_out = f"--data.init_args.validation_from_train={sweep.selection_share}"
        self.fixed = [*budget(sweep), *([held_out] if sweep.selection_share else []), *options]
        self.distributions = {name: distribution(name, choice) for name, choice in sweep.space.items()}
        self.runs = Runs(sweep.output, self.write_report, sweep.workers)
        self.tried: dict[Path, Run] = {}
        choices = [each if isinstance(each, list) else [each["low"], each["high"]] for each in sweep.space.values()]
        for number in range(max(map(len, choices))):  # every value once, as many as can be at a time
            values = dict(zip(sweep.space, (each[min(number, len(each) - 1)] for each in choices)))
            config = self.config(values)
            share = config["data"].get("init_args", {}).get("validation_from_train")
            if share and not sweep.selection_share:
                raise LoPAError(
                    "selection_share 0 is for the validation split itself, and data.validation_from_train "
                    f"{share:g} would be validated on; leave one of them out"
                )
            overlay(config, values)

    def config(self, values: Values) -> Config:
        """Returns the whole configuration of a trial."""
        written = {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}
        return resolve(self.sweep.configs, [*self.fixed, *(f"--{name}={value}" for name, value in written.items())])

    def run(self) -> None:
        """Makes what was begun before or is a grid's, then what Optuna draws."""
        optuna, queue = _optuna(), self._queue()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        # With the same seed, a sweep that goes on would draw what it drew at first.
        kind = optuna.samplers.TPESampler if self.sweep.sampler == "tpe" else optuna.samplers.RandomSampler
        study = optuna.create_study(direction="maximize", sampler=kind(seed=self.sweep.seed + len(queue)))
        for values in queue:
            study.enqueue_trial(values)
        asked, self.runs.total = 0, len(queue) if self.sweep.sampler == "grid" else max(self.sweep.trials, len(queue))
        while asked < self.runs.total:
            count = len(queue) if asked < len(queue) else min(self.runs.workers, self.runs.total - asked)
            trials = [study.ask(self.distributions) for _ in range(count)]
            runs = {self.runs.folder / _name(trial.params): trial.params for trial in trials}  # two may be alike
            self.runs.make([run for run in itertools.starmap(self._run, runs.items()) if run is not None])
            for trial in trials:
                result = self.runs.results[self.runs.folder / _name(trial.params)]
                failure = None if result.done else optuna.trial.TrialState.FAIL
                study.tell(trial, result.score if result.done else None, failure)
            asked += count
        self.write_report()

    def _run(self, folder: Path, values: Values) -> Run | None:
        """Returns the run of a trial; None, with a result that says why, where its values do not go together."""
        try:
            self.tried[folder] = Run(folder, self.config(values), values)
        except LoPAError as error:
            self.tried[folder] = Run(folder, {}, values)
            self.runs.results[folder] = Result("failed", reason=str(error), tags=values)
            print(f"{folder.name}: failed: {error}", flush=True)
            return None
        return self.tried[folder]

    def _queue(self) -> list[Values]:
        """Returns a grid, or what the folders hold of this space, but for what has failed.

        That is not drawn again, and counts in the report, if its configuration is still the same.
        """
        if self.sweep.sampler == "grid":
            return [dict(zip(self.sweep.space, values)) for values in itertools.product(*self.sweep.space.values())]
        queue = []
        for folder in sorted(self.runs.folder.glob("*")):
            result = Result.read(folder)
            if result is None or folder.name != _name(result.tags) or not self._has(result.tags):
                continue
            if result.status != "failed":
                queue.append(result.tags)
            elif (run := self._run(folder, result.tags)) is not None:
                if run.config_hash == result.config_hash:
                    self.runs.results[folder] = result
                else:
                    del self.tried[folder]
        return queue

    def _has(self, values: Values) -> bool:
        """Whether values are of this space."""
        try:
            _optuna().trial.create_trial(value=0.0, params=values, distributions=self.distributions)
        except ValueError:
            return False
        return True

    def write_report(self) -> None:
        """Writes ``sweep.csv``, ``sweep.md`` and, as an overlay for lopa fit, ``best.yaml``."""
        folder, results = Path(self.sweep.output), self.runs.results
        # As objects, whole numbers stay whole.
        lines = pd.DataFrame([record(self.tried[path].tags, r) for path, r in results.items()], dtype=object)
        write_whole(folder / "sweep.csv", csv_text(lines))
        ended = [(self.tried[path].tags, r.score if r.done else None) for path, r in results.items()]
        ranked = ranking(ended)
        if not ranked:  # nor is what an earlier sweep found
            for name in _OF_THE_BEST:
                (folder / name).unlink(missing_ok=True)
            return
        write_whole(folder / "sweep.md", settings_markdown(ranked))
        best = next(run for run in self.tried.values() if run.config and _setting(run.tags) == _setting(ranked[0][0]))
        write_whole(folder / "best.yaml", yaml_files.dump(overlay(best.config, ranked[0][0])))


def ranking(ended: Iterable[tuple[Values, float | None]]) -> list[tuple[Values, list[float], int]]:
    """Ranks settings, which are all values but the seed, by the mean of their scores.

    Args:
        ended: The values and the score of each run; None of one that has failed.

    Returns:
        Each setting with its scores and the number of its runs, the best first; those of which a run has failed come
        after all others, and those without a score are left out.

    Example:
        >>> ranking([({"rank": 1}, 0.8), ({"rank": 4}, 0.9), ({"rank": 4}, None), ({"rank": 8}, None)])
        [({'rank': 1}, [0.8], 1), ({'rank': 4}, [0.9], 2)]
    """
    groups: dict[str, list[float | None]] = {}
    for values, score in ended:
        groups.setdefault(_setting(values), []).append(score)
    found = [(json.loads(setting), [s for s in all_ if s is not None], len(all_)) for setting, all_ in groups.items()]
    return sorted(
        (each for each in found if each[1]), key=lambda each: (len(each[1]) < each[2], -statistics.mean(each[1]))
    )


def _setting(values: Values) -> str:
    """Returns all values but the seed, in a form in which 1 and true differ."""
    return json.dumps({name: value for name, value in values.items() if name != _SEED})


def settings_markdown(ranked: Sequence[tuple[Values, list[float], int]]) -> str:
    """Returns a table of what :func:`ranking` found."""
    body = []
    for values, scores, runs in ranked:
        deviation = f"{statistics.stdev(scores):.4f}" if len(scores) > 1 else "–"
        shown = map(shown_value, values.values())
        count = str(runs) if len(scores) == runs else f"{len(scores)} of {runs}"
        body.append([*shown, f"{statistics.mean(scores):.4f}", deviation, count])
    return markdown_table([*short_names(ranked[0][0]), "score", "sd", "runs"], body) + "\n"


def overlay(config: Config, names: Iterable[str]) -> dict[str, Any]:
    """Returns the YAML that gives options of a configuration to another one.

    A group such as ``learning_rates`` is there as a whole, since in YAML one mapping replaces another.

    Args:
        config: As from :func:`~lopa_lightning.experiments.resolve.resolve`.
        names: Dotted names.

    Raises:
        LoPAError: If there is no such option.

    Example:
        >>> overlay({"trainer": {"max_epochs": 3, "precision": 32}}, ["trainer.max_epochs"])
        {'trainer': {'max_epochs': 3}}
        >>> overlay({"model": {"init_args": {"rates": {"a": 1, "b": 2}}}}, ["model.init_args.rates.a"])
        {'model': {'init_args': {'rates': {'a': 1, 'b': 2}}}}
    """
    found: dict[str, Any] = {}
    for name in names:
        *path, last = name.split(".")
        try:
            group = functools.reduce(lambda here, part: here[part], path, config)
            value = group[last]
        except (KeyError, TypeError):
            raise LoPAError(f"space: no option {name!r}; name it as --print_config shows it") from None
        if len(path) > 1 and path[-1] != "init_args":
            *path, last = path
            value = group
        functools.reduce(lambda here, part: here.setdefault(part, {}), path, found)[last] = value
    return found


def short_names(names: Iterable[str]) -> list[str]:
    """Returns the shortest ends of options' dotted names that tell them apart.

    Example:
        >>> short_names(["model.backbone.name", "model.instance_encoder.name"])
        ['backbone.name', 'instance_encoder.name']
    """
    parts = [name.split(".") for name in names]
    ends = ([".".join(name[-depth:]) for name in parts] for depth in itertools.count(1))
    return next(end for end in ends if len(set(end)) == len(end))


def shown_value(value: Any) -> str:
    """Returns a value for people: a number in four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _name(values: Values) -> str:
    """Returns a folder's name: readable, and different where values differ."""
    shown = ",".join(f"{name}={shown_value(value)}" for name, value in zip(short_names(values), values.values()))
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:6]
    return re.sub(r"[^\w=,.+-]+", "_", shown)[:100] + f"-{digest}"


def main(args: Sequence[str]) -> None:
    """Runs ``lopa sweep``.

    Args:
        args: What follows on the command line.

    Raises:
        LoPAError: If something cannot be run; nothing is, then.
        SystemExit: With status 1 if a run failed.
    """
    sweep, options = parsed(Sweep, "lopa sweep", args)
    with folder_of_runs(sweep.output):
        sweeping = Sweeping(sweep, options)
        sweeping.run()
    folder = Path(sweep.output)
    if (folder / "best.yaml").exists():
        print(f"Report in {folder / 'sweep.md'} and .csv; the best settings in best.yaml")
    else:
        print(f"Report in {folder / 'sweep.csv'}; no trial ended well")
    print(f"  tensorboard --logdir {sweeping.runs.folder}")
    sweeping.runs.end_command()

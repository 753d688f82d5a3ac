"""``lopa sweep``: a search over hyperparameters with Optuna."""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import yaml
from lightning.pytorch.loggers import TensorBoardLogger

from lopa_lightning.errors import LoPAError
from lopa_lightning.experiments.command import interruptible, parsed
from lopa_lightning.experiments.launch import launch
from lopa_lightning.experiments.report import markdown_table
from lopa_lightning.experiments.resolve import Config, resolve
from lopa_lightning.experiments.result import Result
from lopa_lightning.experiments.run import LOG_FILE, Run
from lopa_lightning.experiments.summary import Figure
from lopa_lightning.files import write_whole

if TYPE_CHECKING:
    import optuna

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
        for name, values in self.space.items():
            if isinstance(values, list) and values:
                continue
            bounds = isinstance(values, dict) and {"low", "high"} <= set(values) <= {"low", "high", "log", "step"}
            if not bounds:
                wrong.append(f"space: {name} must be a list of values or {{low, high}} with log or step, got {values}")
            elif self.sampler == "grid":
                wrong.append(f"space: a grid needs lists of values, got {values} for {name}")
            elif not values["low"] < values["high"]:
                wrong.append(f"space: {name} needs low < high, got {values}")
        if wrong:
            raise LoPAError("nothing was run, since\n  " + "\n  ".join(wrong))


def combinations(space: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """All combinations of the values of a grid.

    Args:
        space: Option to values.

    Example:
        >>> combinations({"rank": [1, 2], "seed": [0]})
        [{'rank': 1, 'seed': 0}, {'rank': 2, 'seed': 0}]
    """
    return [dict(zip(space, values)) for values in itertools.product(*space.values())]


def suggest(trial: optuna.Trial, space: dict[str, Any]) -> dict[str, Any]:
    """Asks Optuna for a value of each option.

    Args:
        trial: Optuna's.
        space: As in :class:`Sweep`.
    """
    values: dict[str, Any] = {}
    for name, choice in space.items():
        if isinstance(choice, list):
            values[name] = trial.suggest_categorical(name, choice)
        elif isinstance(choice["low"], int) and isinstance(choice["high"], int):
            options = {"step": choice.get("step", 1), "log": choice.get("log", False)}
            values[name] = trial.suggest_int(name, choice["low"], choice["high"], **options)
        else:
            options = {"step": choice.get("step"), "log": choice.get("log", False)}
            values[name] = trial.suggest_float(name, float(choice["low"]), float(choice["high"]), **options)
    return values


class Sweeping:
    """Runs a sweep, and keeps its report up to date.

    Args:
        sweep: What to search.
        options: Of every trial, put over its configuration.
        say: Takes the lines of progress.
    """

    def __init__(self, sweep: Sweep, options: Sequence[str] = (), say: Callable[[str], None] = print) -> None:
        self.sweep = sweep
        self.say = say
        self.folder = Path(sweep.output)
        budget = {"max_epochs": sweep.max_epochs, "max_steps": sweep.max_steps}
        self.fixed = [*options, *(f"--trainer.{name}={value}" for name, value in budget.items() if value is not None)]
        self.held_out = [f"--data.init_args.validation_from_train={sweep.selection_share}"]
        self._check_space()
        self.study = self._open()
        self.results: list[tuple[dict[str, Any], Result]] = []

    def config(self, values: dict[str, Any], held_out: bool = True) -> Config:
        """The whole configuration of a trial.

        Args:
            values: Option to value.
            held_out: Whether it validates on a part of the training split, if the sweep does at all.
        """
        written = {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}
        chosen = [f"--{name}={value}" for name, value in written.items()]
        extra = self.held_out if held_out and self.sweep.selection_share else []
        return resolve(self.sweep.configs, [*self.fixed, *extra, *chosen])

    def _check_space(self) -> None:
        """Refuses options that are not there, and values that the ends of a range or a list cannot have."""
        config = self.config({})
        for name, choice in self.sweep.space.items():
            here: Any = config
            for part in name.split("."):
                if not isinstance(here, dict) or part not in here:
                    raise LoPAError(f"space: the configs have no option {name!r}; name it as --print_config shows it")
                here = here[part]
            for value in choice if isinstance(choice, list) else (choice["low"], choice["high"]):
                self.config({name: value})

    def _open(self) -> optuna.Study:
        try:
            import optuna
        except ImportError:
            raise LoPAError('sweeps run on Optuna: pip install "lopa-lightning[sweep]"') from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.folder.mkdir(parents=True, exist_ok=True)
        study = optuna.create_study(
            storage=f"sqlite:///{self.folder / 'study.db'}",
            study_name="sweep",
            direction="maximize",
            load_if_exists=True,
        )
        # Else a sweep that goes on would draw what it drew at first.
        seed = self.sweep.seed + len(study.trials)
        # A grid's values are all in the study's queue, so that nothing is drawn.
        tpe = self.sweep.sampler == "tpe"
        study.sampler = optuna.samplers.TPESampler(seed=seed) if tpe else optuna.samplers.RandomSampler(seed=seed)
        space = json.dumps(self.sweep.space, sort_keys=True)
        if study.user_attrs.setdefault("space", space) != space:
            raise LoPAError(f"{self.folder} holds a sweep of another space; give another output")
        study.set_user_attr("space", space)
        return study

    def run(self) -> list[Trial]:
        """Runs what has not been run.

        Returns:
            Values and result of every trial.
        """
        done = self._prepare()
        self.results = [(values, result) for values in done if (result := self._run(values).finished())]
        grid = self.sweep.sampler == "grid"
        total = len(combinations(self.sweep.space)) if grid else max(self.sweep.trials, len(done))
        if done:
            self.say(f"{len(done)} of {total} trials have ended before")
        at_once = self.sweep.workers or max(1, torch.cuda.device_count())
        for start in range(len(done), total, at_once):
            self._run_trials(min(at_once, total - start), total)
        self.write_report()
        return self.results

    def _prepare(self) -> list[dict[str, Any]]:
        """Puts what was interrupted, or is left of a grid, in the study's queue; returns the values of what is done."""
        from optuna.trial import TrialState

        def values_of(*states: TrialState) -> list[dict[str, Any]]:
            trials = self.study.get_trials(states=states)
            return [trial.params or trial.system_attrs.get("fixed_params", {}) for trial in trials]

        for trial in self.study.get_trials(states=[TrialState.RUNNING]):
            self.study.tell(trial.number, state=TrialState.FAIL)
            if set(trial.params) == set(self.sweep.space):
                self.study.enqueue_trial(trial.params)
        done = values_of(TrialState.COMPLETE)
        if self.sweep.sampler == "grid":
            known = [*done, *values_of(TrialState.WAITING)]
            for values in combinations(self.sweep.space):
                if values not in known:
                    self.study.enqueue_trial(values)
        return done

    def _run(self, values: dict[str, Any]) -> Run:
        return Run(self.folder / "runs" / _name(values), self.config(values), tags=values)

    def _run_trials(self, count: int, total: int) -> None:
        asked = [self.study.ask() for _ in range(count)]
        trials = {(run := self._run(suggest(trial, self.sweep.space))).folder: (trial, run) for trial in asked}

        def on_end(run: Run, result: Result) -> None:
            self._tell(trials[run.folder][0], result)
            self.results.append((run.tags, result))
            outcome = f"failed: {result.reason} (see {run.folder / LOG_FILE})"
            if result.done:
                outcome = f"score {result.score:.4f}, {result.seconds:.0f} s"
            self.say(f"[{len(self.results)}/{total}] {run.folder.name}: {outcome}")
            self.write_report()

        todo = []
        for _, run in trials.values():
            if (result := run.finished()) is not None:  # drawn a second time
                on_end(run, result)
            else:
                todo.append(run)
        launch(todo, on_end, self.sweep.workers)

    def _tell(self, trial: optuna.Trial, result: Result) -> None:
        """Tells the study, and TensorBoard's HParams."""
        from optuna.trial import TrialState

        if not result.done or math.isnan(result.score):
            self.study.tell(trial, state=TrialState.FAIL)
            return
        self.study.tell(trial, result.score)
        logger = TensorBoardLogger(self.folder, name="hparams", version=_name(trial.params), default_hp_metric=False)
        shown = {_short(name): value for name, value in trial.params.items()}
        logger.log_hyperparams(shown, {"val/score": result.score, "val/best_score": result.best_score})
        logger.finalize("success")

    def write_report(self) -> None:
        """Writes ``sweep.csv``, ``sweep.md`` and, as an overlay for lopa fit, ``best.yaml``."""
        write_whole(self.folder / "sweep.csv", trials_csv(self.results))
        groups = by_settings(self.results)
        if groups:
            write_whole(self.folder / "sweep.md", settings_markdown(groups))
            write_whole(self.folder / "best.yaml", yaml.safe_dump(nested(groups[0][0]), sort_keys=False))


def by_settings(trials: Sequence[Trial]) -> list[tuple[dict[str, Any], Figure, int]]:
    """Scores by what is not the seed, the best first.

    Args:
        trials: Of a sweep; those that failed are left out.

    Returns:
        Settings, mean and spread of their scores over the seeds, and how many.
    """
    groups: dict[str, tuple[dict[str, Any], list[float]]] = {}
    for values, result in trials:
        settings = {name: value for name, value in values.items() if name != _SEED}
        if result.done and not math.isnan(result.score):
            groups.setdefault(json.dumps(settings), (settings, []))[1].append(result.score)
    found = [(settings, figure, len(s)) for settings, s in groups.values() if (figure := Figure.of(s)) is not None]
    return sorted(found, key=lambda group: -group[1].mean)


def settings_markdown(groups: Sequence[tuple[dict[str, Any], Figure, int]]) -> str:
    """A table of settings and scores.

    Args:
        groups: As from :func:`by_settings`.
    """
    header = [*map(_short, groups[0][0]), "score", "sd", "runs"]
    body = []
    for settings, score, count in groups:
        sd = "–" if score.sd is None else f"{score.sd:.4f}"
        body.append([*map(_shown, settings.values()), f"{score.mean:.4f}", sd, str(count)])
    return markdown_table(header, body) + "\n"


def trials_csv(trials: Sequence[Trial]) -> str:
    """A line for each trial.

    Args:
        trials: Of a sweep.
    """
    names = list(dict.fromkeys(name for values, _ in trials for name in values))
    measured = ["status", "reason", "score", "best_score", "trained", "seconds_per_step", "seconds", "peak_mb"]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*names, *measured])
    for values, result in trials:
        writer.writerow([*(values[name] for name in names), *(getattr(result, name) for name in measured)])
    return out.getvalue()


def nested(values: dict[str, Any]) -> dict[str, Any]:
    """Options by dotted names as a YAML file has them.

    Args:
        values: Dotted name to value.

    Example:
        >>> nested({"trainer.max_epochs": 3, "model.init_args.warmup": 0.1})
        {'trainer': {'max_epochs': 3}, 'model': {'init_args': {'warmup': 0.1}}}
    """
    tree: dict[str, Any] = {}
    for name, value in values.items():
        *path, last = name.split(".")
        here = tree
        for part in path:
            here = here.setdefault(part, {})
        here[last] = value
    return tree


def _short(name: str) -> str:
    return name.rpartition(".")[2]


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _name(values: dict[str, Any]) -> str:
    """A folder's name: readable, and different where values differ."""
    shown = ",".join(f"{_short(name)}={_shown(value)}" for name, value in values.items())
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
    sweeping = Sweeping(sweep, options, lambda line: print(line, flush=True))
    with interruptible():
        trials = sweeping.run()
    print(f"Report in {sweeping.folder / 'sweep.md'} and .csv; the best settings in best.yaml")
    print(f"  tensorboard --logdir {sweeping.folder / 'hparams'}")
    if failed := [_name(values) for values, result in trials if not result.done]:
        sys.stderr.write(f"{len(failed)} of {len(trials)} trials failed: {', '.join(failed)}\n")
        raise SystemExit(1)

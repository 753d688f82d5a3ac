"""``lopa sweep``: a search over hyperparameters with Optuna."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import yaml
from lightning.pytorch.loggers import TensorBoardLogger

from lopa_lightning.errors import LoPAError
from lopa_lightning.experiments.command import alone_in, end_with, interruptible, parsed
from lopa_lightning.experiments.launch import launch
from lopa_lightning.experiments.resolve import Config, resolve
from lopa_lightning.experiments.result import Result
from lopa_lightning.experiments.run import LOG_FILE, Run
from lopa_lightning.experiments.trials import (
    Trial,
    by_settings,
    combinations,
    nested,
    settings_markdown,
    short_names,
    shown_value,
    trials_csv,
)
from lopa_lightning.files import write_whole

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

Sampler = Literal["grid", "tpe", "random"]


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
            except (LoPAError, ValueError, TypeError) as error:
                wrong.append(f"space: {name}: {error}")
            else:
                if self.sampler == "grid" and isinstance(choice, dict):
                    wrong.append(f"space: {name}: a grid needs lists of values, got {choice}")
        if wrong:
            raise LoPAError("nothing was run, since\n  " + "\n  ".join(wrong))


def distribution(choice: Any) -> BaseDistribution:
    """What Optuna draws an option's value from.

    Args:
        choice: A list of values, or ``{low, high}`` with ``log: true`` or ``step``; whole numbers where both ends are.

    Raises:
        LoPAError: If it is neither, or Optuna is not installed.
        ValueError: If Optuna has no such distribution.
    """
    try:
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
    except ImportError:
        raise LoPAError('sweeps run on Optuna: pip install "lopa-lightning[sweep]"') from None
    if isinstance(choice, list):
        if odd := [value for value in choice if not isinstance(value, (bool, int, float, str, type(None)))]:
            raise LoPAError(f"values must be numbers, texts, true, false or null, got {odd[0]}")
        if repeated := [value for value in choice if choice.count(value) > 1]:
            raise LoPAError(f"{repeated[0]!r} is given twice")
        return CategoricalDistribution(choice)
    if not isinstance(choice, dict) or not {"low", "high"} <= set(choice) <= {"low", "high", "log", "step"}:
        raise LoPAError(f"must be a list of values or {{low, high}} with log or step, got {choice}")
    low, high, log = choice["low"], choice["high"], choice.get("log", False)
    if any(isinstance(end, bool) or not isinstance(end, (int, float)) for end in (low, high)) or not low < high:
        raise LoPAError(f"needs numbers low < high, got {choice}")
    if isinstance(low, int) and isinstance(high, int):
        return IntDistribution(low, high, log=log, step=choice.get("step", 1))
    return FloatDistribution(float(low), float(high), log=log, step=choice.get("step"))


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

    def _open(self) -> optuna.Study:
        import optuna

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
        for what, given in {"space": self.sweep.space, "configuration": self.plain}.items():
            written = json.dumps(given, sort_keys=True, default=str)
            if study.user_attrs.get(what, written) != written:
                raise LoPAError(f"{self.folder} holds a sweep of another {what}; give another output")
            study.set_user_attr(what, written)
        return study

    def run(self) -> list[Trial]:
        """Runs what has not been run.

        Returns:
            Values and result of every trial.
        """
        self.results = self._prepare()
        done = len(self.results)
        grid = self.sweep.sampler == "grid"
        total = len(combinations(self.sweep.space)) if grid else max(self.sweep.trials, done)
        if done:
            self.say(f"{done} of {total} trials have ended before")
        at_once = self.sweep.workers or max(1, torch.cuda.device_count())
        for start in range(done, total, at_once):
            self._run_trials(min(at_once, total - start), total)
        self.write_report()
        return self.results

    def _prepare(self) -> list[Trial]:
        """Puts what was interrupted, or is left of a grid, in the study's queue.

        Returns:
            Values and result of what is done.
        """
        from optuna.trial import TrialState

        def values_of(*states: TrialState) -> list[dict[str, Any]]:
            trials = self.study.get_trials(states=states)
            return [trial.params or trial.system_attrs.get("fixed_params", {}) for trial in trials]

        left = values_of(TrialState.RUNNING)
        for trial in self.study.get_trials(states=[TrialState.RUNNING]):
            self.study.tell(trial.number, state=TrialState.FAIL)
        done: list[Trial] = []
        for values in values_of(TrialState.COMPLETE):
            result = self._run(values).finished()
            if result is not None:
                done.append((values, result))
            else:  # somebody has deleted its folder
                left.append(values)
        if self.sweep.sampler == "grid":
            left = combinations(self.sweep.space)
        known = [*(values for values, _ in done), *values_of(TrialState.WAITING)]
        for values in left:
            if set(values) == set(self.sweep.space) and values not in known:
                self.study.enqueue_trial(values)
                known.append(values)
        return done

    def _run(self, values: dict[str, Any]) -> Run:
        return Run(self.folder / "runs" / _name(values), self.config(values), tags=values)

    def _run_trials(self, count: int, total: int) -> None:
        drawn_from = {name: distribution(choice) for name, choice in self.sweep.space.items()}
        asked = [self.study.ask(drawn_from) for _ in range(count)]
        trials = {(run := self._run(trial.params)).folder: (trial, run) for trial in asked}

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

        if not result.done:
            self.study.tell(trial, state=TrialState.FAIL)
            return
        self.study.tell(trial, result.score)
        logger = TensorBoardLogger(self.folder, name="hparams", version=_name(trial.params), default_hp_metric=False)
        names = short_names(trial.params)
        shown = {names[name]: value for name, value in trial.params.items()}
        logger.log_hyperparams(shown, {"val/score": result.score, "val/best_score": result.best_score})
        logger.finalize("success")

    def write_report(self) -> None:
        """Writes ``sweep.csv``, ``sweep.md`` and, as an overlay for lopa fit, ``best.yaml``."""
        write_whole(self.folder / "sweep.csv", trials_csv(self.results))
        groups = by_settings(self.results)
        if groups:
            write_whole(self.folder / "sweep.md", settings_markdown(groups))
            write_whole(self.folder / "best.yaml", yaml.safe_dump(nested(groups[0][0]), sort_keys=False))


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
    print(f"  tensorboard --logdir {sweeping.folder / 'hparams'}")
    end_with(len(trials), "trials", [_name(values) for values, result in trials if not result.done])

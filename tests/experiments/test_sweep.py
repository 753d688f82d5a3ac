"""``lopa sweep``, with real runs of a tiny model."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lopa_lightning.callbacks.run_record import Result
from lopa_lightning.cli import main
from lopa_lightning.errors import LoPAError
from lopa_lightning.experiments.resolve import resolve
from lopa_lightning.experiments.runs import Run, Runs
from lopa_lightning.experiments.sweep import (
    Sweep,
    Sweeping,
    Values,
    _name,
    check,
    distribution,
    ranking,
    settings_markdown,
)
from tests.experiments.conftest import write_yaml

Configs = dict[str, str]

ROOT = Path(__file__).parent.parent.parent
RANK = "model.init_args.prompt_encoder.init_args.rank"
LR = "model.init_args.optimizer.init_args.lr"
SEED = "seed_everything"

pytestmark = pytest.mark.usefixtures("in_forks")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def sweep(output: Path, configs: Configs, space: dict[str, Any], *arguments: str) -> None:
    given = {"configs": [configs["reviews"], configs["lopa"]], "space": space, "output": str(output), "max_epochs": 1}
    main(["sweep", "--config", write_yaml(Path("sweep.yaml"), given), *arguments])


def options(folder: Path, configs: Configs, space: dict[str, Any]) -> Sweep:
    return Sweep(configs=[configs["reviews"], configs["lopa"]], space=space, output=str(folder / "out"), max_epochs=1)


def rows(output: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((output / "sweep.csv").read_text().splitlines()))


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory, configs: Configs, in_forks: None) -> Path:
    folder = tmp_path_factory.mktemp("grid")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        sweep(
            folder / "out",
            configs,
            {RANK: [1, 2], "seed_everything": [1, 2]},
            "--sampler=grid",
            "--workers=2",
            "--",
            "--monitor.enabled=true",
        )
    return folder / "out"


# Of real runs; below, a grid is gone through by one that fails, settings are ranked, and the best become an overlay.
@pytest.mark.slow
def test_a_grid_is_run_once_each_and_averaged_over_seeds(grid: Path) -> None:
    found = rows(grid)
    assert sorted((row[RANK], row["seed_everything"]) for row in found) == [
        ("1", "1"),
        ("1", "2"),
        ("2", "1"),
        ("2", "2"),
    ]
    for row in found:
        folder = next(
            path
            for path in (grid / "runs").iterdir()
            if path.name.startswith(f"rank={row[RANK]},seed_everything={row['seed_everything']}-")
        )
        config = yaml.safe_load((folder / "config.yaml").read_text())
        assert config["model"]["init_args"]["prompt_encoder"]["init_args"]["rank"] == int(row[RANK])
        assert config["seed_everything"] == int(row[SEED])
        assert config["data"]["init_args"]["validation_from_train"] == 0.2
        assert float(row["score"]) == json.loads((folder / "result.json").read_text())["metrics"]["val/score"]
        assert "_hparams_/session_start_info" in EventAccumulator(str(folder / "logs")).Reload().summary_metadata
    table = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in (grid / "sweep.md").read_text().splitlines()
    ]
    assert table[0] == ["rank", "score", "sd", "runs"]
    for rank, score, sd, runs in table[2:]:
        scores = [float(row["score"]) for row in found if row[RANK] == rank]
        assert (score, sd, runs) == (f"{statistics.mean(scores):.4f}", f"{statistics.stdev(scores):.4f}", "2")
    assert [float(line[1]) for line in table[2:]] == sorted((float(line[1]) for line in table[2:]), reverse=True)


@pytest.mark.slow
def test_the_best_settings_are_an_overlay(grid: Path, configs: Configs) -> None:
    best = resolve([configs["reviews"], configs["lopa"], str(grid / "best.yaml")])
    first = (grid / "sweep.md").read_text().splitlines()[2].split("|")[1].strip()
    assert best["model"]["init_args"]["prompt_encoder"]["init_args"]["rank"] == int(first)


@pytest.mark.slow
def test_a_sweep_goes_on_with_what_was_begun_and_runs_nothing_twice(
    tmp_path: Path, configs: Configs, capsys: pytest.CaptureFixture[str]
) -> None:
    space = {LR: {"low": 1e-3, "high": 1e-1, "log": True}}
    runs = tmp_path / "out" / "runs"
    begun = {LR: 0.0123}
    Run(runs / _name(begun), resolve([configs["reviews"]]), begun).prepare()  # as if the machine had stopped then
    sweep(tmp_path / "out", configs, space, "--trials=2")
    first = {path: path.stat().st_mtime_ns for path in runs.glob("*/result.json")}
    drawn = [float(row[LR]) for row in rows(tmp_path / "out")]
    assert drawn[0] == 0.0123
    assert 1e-3 <= drawn[1] <= 1e-1
    capsys.readouterr()
    (tmp_path / "out" / "sweep.csv").unlink()
    sweep(tmp_path / "out", configs, space, "--trials=2")
    assert {path: path.stat().st_mtime_ns for path in runs.glob("*/result.json")} == first
    assert "2 of 2 runs have ended before" in capsys.readouterr().out
    assert sorted(float(row[LR]) for row in rows(tmp_path / "out")) == sorted(drawn)
    other = Sweeping(options(tmp_path, configs, {LR: {"low": 0.05, "high": 0.1}}))
    assert all(values[LR] >= 0.05 for values in other._queue())  # what is of another space is left alone


def test_a_failed_trial_is_told_and_the_others_go_on(
    tmp_path: Path, configs: Configs, capsys: pytest.CaptureFixture[str]
) -> None:
    space = {"data.init_args.path": [None], "data.init_args.label_column": ["label", "lable"]}
    with pytest.raises(SystemExit, match="1"):
        sweep(tmp_path / "out", configs, space, "--sampler=grid", "--", "--monitor.enabled=true")
    assert sorted(row["status"] for row in rows(tmp_path / "out")) == ["done", "failed"]
    assert "no column 'lable'" in next(row["reason"] for row in rows(tmp_path / "out") if row["status"] == "failed")
    assert "1 of 2 runs failed" in capsys.readouterr().err
    (log,) = (path for path in (tmp_path / "out").glob("runs/*/logs") if list(path.glob("events*")))
    assert "_hparams_/session_start_info" in EventAccumulator(str(log)).Reload().summary_metadata


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"space": {}}, "space must be at least one, got {}"),
        ({"configs": []}, "configs must be at least one"),
        ({"trials": 0}, "trials must be at least 1, got 0"),
        ({"workers": -1}, "workers must be at least 1, got -1"),
        ({"space": {LR: {"low": 0, "high": 1}}, "sampler": "grid"}, "sampler must be tpe or random where"),
    ],
)
def test_sweeps_that_cannot_be_are_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(LoPAError, match=named):
        check(Sweep(**{"configs": ["a.yaml"], "space": {LR: [0.1]}, **changes}))


@pytest.mark.parametrize(
    ("choice", "named"),
    [
        (0.1, "must be a list of plain values, or {low, high}"),
        ([{"a": 1}], "must be a list of plain values"),
        ({"low": 0, "high": 1, "logs": True}, "with log or step, got"),
        ({"low": 1, "high": 0}, "low"),
        ({"low": "a", "high": "b"}, "space: lr: "),
        ({"low": 0, "high": 1.0, "log": True}, "low"),
        ({"low": 1, "high": 8, "log": True, "step": 2}, "step"),
        ([1e-3, 1e-3], r"values must differ, got \[0.001, 0.001\]"),
        ([], "space: lr: "),
    ],
)
def test_spaces_that_cannot_be_are_refused(choice: Any, named: str) -> None:
    with pytest.raises(LoPAError, match=named):
        distribution("lr", choice)


def test_whole_ends_with_a_step_that_is_none_are_a_range_of_numbers() -> None:
    drawn = distribution("dropout", {"low": 0, "high": 1, "step": 0.25})
    assert (drawn.low, drawn.high, drawn.step) == (0.0, 1.0, 0.25)
    assert isinstance(drawn.low, float)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("space", "named"),
    [
        ({"model.init_args.prompt_encoder.init_args.rnak": [1]}, "rnak"),
        ({RANK: [1, "many"]}, "rank"),
        ({"data.batch_size": [1]}, "no option 'data.batch_size'; name it as --print_config shows it"),
    ],
)
def test_options_and_values_are_checked_before_anything_runs(
    tmp_path: Path, configs: Configs, space: dict[str, Any], named: str
) -> None:
    with pytest.raises(LoPAError, match=named):
        Sweeping(options(tmp_path, configs, space))
    assert not (tmp_path / "out").exists()


def test_the_best_overlay_gives_the_trial_that_was_run(tmp_path: Path, configs: Configs) -> None:
    """A group's rate that was found stands beside those of the other groups, which YAML would replace."""
    values = {"model.init_args.learning_rates.low_rank": 0.5}
    sweeping = Sweeping(options(tmp_path, configs, {name: [value] for name, value in values.items()}))
    run = Run(sweeping.runs.folder / "run", sweeping.config(values), values)
    assert run.config["model"]["init_args"]["learning_rates"] == {"head": 0.02, "low_rank": 0.5}
    sweeping.tried[run.folder] = run
    sweeping.runs.results[run.folder] = done(0.5)
    sweeping.write_report()
    again = resolve([*sweeping.sweep.configs, str(tmp_path / "out" / "best.yaml")], sweeping.fixed)
    assert again == run.config


def scripted(
    monkeypatch: pytest.MonkeyPatch, fails: Callable[[Values], bool], score: Callable[[Values], float]
) -> None:
    """Makes runs without training: what fails and what comes out is said."""

    def make(runs: Runs, wanted: Sequence[Run]) -> None:
        for run in wanted:
            run.folder.mkdir(parents=True, exist_ok=True)
            found = Result("failed", run.config_hash, "so", run.tags) if fails(run.tags) else done(score(run.tags))
            found = replace(found, config_hash=run.config_hash, tags=run.tags)
            found.write(run.folder)
            runs.results[run.folder] = found

    monkeypatch.setattr(Runs, "make", make)


def test_a_sweep_that_goes_on_still_counts_what_has_failed(
    tmp_path: Path, configs: Configs, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, lambda values: values == {RANK: 4, SEED: 3}, lambda values: values[RANK] / 10)
    given = replace(options(tmp_path, configs, {RANK: [1, 4], SEED: [1, 2, 3]}), sampler="random", trials=12, seed=4)
    reports = []
    for _ in range(2):
        Sweeping(given).run()
        reports.append((tmp_path / "out" / "sweep.md").read_text())
        assert {(row[RANK], row[SEED], row["status"]) for row in rows(tmp_path / "out")} >= {("4", "3", "failed")}
    for report in reports:
        first, last = ([cell.strip() for cell in line.split("|")] for line in report.splitlines()[2:])
        assert (first[1], last[1], last[4]) == ("1", "4", "2 of 3")
    changed = Sweeping(given, ["--data.batch_size=2"])  # its failure was that of another configuration
    changed.run()
    assert sum(row["status"] == "failed" for row in rows(tmp_path / "out")) == 1


def test_values_that_do_not_go_together_are_a_failed_trial(
    tmp_path: Path, configs: Configs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted(monkeypatch, lambda values: False, lambda values: 0.5)
    space = {"trainer.max_steps": [10, 100], "model.init_args.warmup": [5, 50]}
    Sweeping(replace(options(tmp_path, configs, space), sampler="grid", max_epochs=None)).run()
    (failed,) = (row for row in rows(tmp_path / "out") if row["status"] == "failed")
    assert (failed["trainer.max_steps"], failed["model.init_args.warmup"]) == ("10", "50")
    assert "warmup must be less than trainer.max_steps, 10, got 50" in failed["reason"]
    assert "warmup must be less" in capsys.readouterr().out
    assert len(rows(tmp_path / "out")) == 4


def test_without_a_trial_that_ended_well_there_are_no_best_settings(
    tmp_path: Path, configs: Configs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted(monkeypatch, lambda values: False, lambda values: 0.5)
    sweep(tmp_path / "out", configs, {RANK: [1, 2]}, "--sampler=grid")
    assert "the best settings in best.yaml" in capsys.readouterr().out
    scripted(monkeypatch, lambda values: True, lambda values: 0.5)
    with pytest.raises(SystemExit):
        sweep(tmp_path / "out", configs, {RANK: [1, 2]}, "--sampler=grid", "--", "--data.batch_size=2")
    assert "sweep.csv; no trial ended well" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").glob("*.*")) == ["sweep.csv"]


def done(score: float) -> Result:
    return Result("done", "", history=[{"samples": 1, "metrics": {"val/score": score}}])


def test_settings_are_ranked_by_their_mean_over_seeds() -> None:
    scores = [(1, 0.5), (1, 0.7), (2, 0.9), (3, 1.0), (3, None), (4, None)]
    ended = [({"r": r, SEED: seed}, score) for seed, (r, score) in enumerate(scores)]
    found = ranking(ended)
    assert found == [({"r": 2}, [0.9], 1), ({"r": 1}, [0.5, 0.7], 2), ({"r": 3}, [1.0], 2)]
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in settings_markdown(found).splitlines()]
    assert table[0] == ["r", "score", "sd", "runs"]
    complete = [["2", "0.9000", "–", "1"], ["1", "0.6000", f"{0.2 / 2**0.5:.4f}", "2"]]
    assert table[2:] == [*complete, ["3", "1.0000", "–", "1 of 2"]]  # with a failed seed after all others


def test_the_validation_split_itself_is_not_asked_for_beside_a_part_of_train(tmp_path: Path, configs: Configs) -> None:
    given = replace(options(tmp_path, configs, {"model.init_args.warmup": [0, 1]}), selection_share=0)
    Sweeping(given)
    with pytest.raises(LoPAError, match=r"data.validation_from_train 0.3 would be validated on; leave one of them out"):
        Sweeping(given, ["--data.init_args.validation_from_train=0.3"])


@pytest.mark.sampled(2)
@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_sweeps_name_options_that_exist(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    given = yaml.safe_load(path.read_text())
    sweeping = Sweeping(Sweep(**{**given, "output": str(tmp_path / "out")}))
    if path.stem == "rank":
        assert [values[RANK] for values in sweeping._queue()] == [1, 1, 1, 2, 2, 2, 4, 4, 4]
    if path.stem == "length":
        lengths = given["space"]["model.init_args.prompt_encoder.init_args.num_virtual_tokens"]
        assert lengths == [5, 10, 25, 50, 100]
    assert list(sweeping.distributions) == list(given["space"])

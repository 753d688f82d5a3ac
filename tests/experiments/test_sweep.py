"""``lopa sweep``, with real runs of a tiny model."""

from __future__ import annotations

import csv
import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lopa_lightning.callbacks.run_record import Result
from lopa_lightning.cli import main
from lopa_lightning.errors import LoPAError
from lopa_lightning.experiments.command import alone_in
from lopa_lightning.experiments.resolve import resolve
from lopa_lightning.experiments.sweep import Sweep, Sweeping, by_settings, combinations, trials_table
from tests.experiments.conftest import write_yaml

Configs = dict[str, str]

ROOT = Path(__file__).parent.parent.parent
RANK = "model.init_args.prompt_encoder.init_args.rank"
LR = "model.init_args.optimizer.init_args.lr"
SEED = "seed_everything"


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def sweep(output: Path, configs: Configs, space: dict[str, Any], *arguments: str) -> None:
    given = {"configs": [configs["reviews"], configs["lopa"]], "space": space, "output": str(output), "max_epochs": 1}
    main(["sweep", "--config", write_yaml(Path("sweep.yaml"), given), *arguments])


def rows(output: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((output / "sweep.csv").read_text().splitlines()))


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory, configs: Configs) -> Path:
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
    table = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in (grid / "sweep.md").read_text().splitlines()
    ]
    assert table[0] == ["rank", "score", "sd", "runs"]
    for rank, score, sd, runs in table[2:]:
        scores = [float(row["score"]) for row in found if row[RANK] == rank]
        assert (score, sd, runs) == (f"{statistics.mean(scores):.4f}", f"{statistics.stdev(scores):.4f}", "2")
    assert [float(line[1]) for line in table[2:]] == sorted((float(line[1]) for line in table[2:]), reverse=True)


def test_the_best_settings_are_an_overlay(grid: Path, configs: Configs) -> None:
    best = resolve([configs["reviews"], configs["lopa"], str(grid / "best.yaml")])
    first = (grid / "sweep.md").read_text().splitlines()[2].split("|")[1].strip()
    assert best["model"]["init_args"]["prompt_encoder"]["init_args"]["rank"] == int(first)


def test_tensorboards_hparams_have_every_trial(grid: Path) -> None:
    logs = sorted(grid.glob("runs/*/logs"))
    assert len(logs) == 4
    for log in logs:
        events = EventAccumulator(str(log)).Reload()
        assert "_hparams_/session_start_info" in events.summary_metadata
        assert yaml.safe_load((log / "hparams.yaml").read_text())["prompt_encoder"]["init_args"]["rank"] in (1, 2)


def test_a_second_call_runs_nothing_and_more_trials_only_the_new_ones(
    tmp_path: Path, configs: Configs, capsys: pytest.CaptureFixture[str]
) -> None:
    space = {LR: {"low": 1e-3, "high": 1e-1, "log": True}}
    sweep(tmp_path / "out", configs, space, "--trials=2")
    first = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/runs/*/result.json")}
    assert len(first) == 2
    assert all(1e-3 <= float(row[LR]) <= 1e-1 for row in rows(tmp_path / "out"))
    sweep(tmp_path / "out", configs, space, "--trials=3")
    again = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/runs/*/result.json")}
    assert len(again) == 3
    assert first.items() <= again.items()
    assert "2 of 3 trials have ended before" in capsys.readouterr().out
    sweep(tmp_path / "out", configs, space, "--trials=3")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/runs/*/result.json")} == again


def test_an_interrupted_trial_is_run_again_with_its_values(tmp_path: Path, configs: Configs) -> None:
    options = Sweep(
        [configs["reviews"], configs["lopa"]],
        {LR: {"low": 1e-3, "high": 1e-1}},
        trials=1,
        output=str(tmp_path / "out"),
        max_epochs=1,
    )
    Sweeping(options)._run({LR: 0.0123}).prepare()  # as if the machine had stopped in the middle of it
    trials = Sweeping(options, say=lambda line: None).run()
    assert [values for values, _ in trials] == [{LR: 0.0123}]


def test_a_failed_trial_is_told_and_the_others_go_on(
    tmp_path: Path, configs: Configs, capsys: pytest.CaptureFixture[str]
) -> None:
    space = {"data.init_args.path": [None], "data.init_args.label_column": ["label", "lable"]}
    with pytest.raises(SystemExit, match="1"):
        sweep(tmp_path / "out", configs, space, "--sampler=grid")
    assert sorted(row["status"] for row in rows(tmp_path / "out")) == ["done", "failed"]
    assert "no column 'lable'" in next(row["reason"] for row in rows(tmp_path / "out") if row["status"] == "failed")
    assert "1 of 2 trials failed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"space": {}}, "space: give at least one"),
        ({"sampler": "bayes"}, "sampler must be one of grid, tpe, random, got 'bayes'"),
        ({"trials": 0}, "trials must be at least 1, got 0"),
        ({"selection_share": 1.0}, "selection_share must be a share below 1, got 1"),
        ({"space": {LR: 0.1}}, "must be a list of values or {low, high}"),
        ({"space": {LR: {"low": 1, "high": 0}}}, "needs numbers low < high"),
        ({"space": {LR: {"low": "a", "high": "b"}}}, "needs numbers low < high"),
        ({"space": {LR: {"low": 0, "high": 1.0, "log": True}}}, "lr: .*low"),
        ({"space": {RANK: {"low": 1, "high": 8, "log": True, "step": 2}}}, "rank: .*step"),
        ({"space": {LR: [1e-3, 1e-3]}}, "lr: 0.001 is given twice"),
        ({"space": {LR: [{"a": 1}]}}, "lr: values must be numbers, texts, true, false or null"),
        ({"space": {LR: []}}, "lr: "),
        ({"space": {LR: {"low": 0, "high": 1}}, "sampler": "grid"}, "a grid needs lists"),
        ({"space": {LR: {"low": 0, "high": 1, "logs": True}}}, "with log or step"),
    ],
)
def test_sweeps_that_cannot_be_are_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(LoPAError, match=named):
        Sweep(**{"configs": ["a.yaml"], "space": {LR: [0.1]}, **changes}).check()


@pytest.mark.parametrize(
    ("space", "named"),
    [
        ({"model.init_args.prompt_encoder.init_args.rnak": [1]}, "the configs have no option 'model.*rnak'"),
        ({RANK: [1, "many"]}, "rank"),
    ],
)
def test_options_and_values_are_checked_before_anything_runs(
    tmp_path: Path, configs: Configs, space: dict[str, Any], named: str
) -> None:
    with pytest.raises(LoPAError, match=named):
        Sweeping(Sweep([configs["reviews"], configs["lopa"]], space, output=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("space", "options", "what"),
    [({RANK: [1, 4]}, [], "space"), ({RANK: [1, 2]}, ["--data.init_args.batch_size=2"], "configuration")],
)
def test_another_sweep_needs_another_folder(
    tmp_path: Path, configs: Configs, space: dict[str, Any], options: list[str], what: str
) -> None:
    files, output = [configs["reviews"], configs["lopa"]], str(tmp_path / "out")
    Sweeping(Sweep(files, {RANK: [1, 2]}, output=output))
    with pytest.raises(LoPAError, match=f"holds a sweep of another {what}"):
        Sweeping(Sweep(files, space, output=output), options)


def test_a_group_without_a_rate_of_its_own_can_be_given_one(tmp_path: Path, configs: Configs) -> None:
    name = "model.init_args.learning_rates.low_rank"
    sweeping = Sweeping(Sweep([configs["reviews"], configs["lopa"]], {name: [0.5]}, output=str(tmp_path / "out")))
    rates = sweeping.config({name: 0.5})["model"]["init_args"]["learning_rates"]
    assert rates == {"head": 0.02, "low_rank": 0.5}


def test_two_commands_in_one_folder_are_refused(tmp_path: Path) -> None:
    in_use = pytest.raises(LoPAError, match=r"out' is in use by another lopa command")
    with alone_in(tmp_path / "out"), in_use, alone_in(tmp_path / "out"):
        pass
    with alone_in(tmp_path / "out"):  # free again
        pass
    (tmp_path / "file").touch()
    with pytest.raises(LoPAError, match=r"file' cannot be written to"), alone_in(tmp_path / "file"):
        pass


def test_failed_trials_have_no_part_in_a_mean() -> None:
    def done(score: float) -> Result:
        return Result("done", "", history=[{"samples": 1, "metrics": {"val/score": score}}])

    trials = [({"r": 1, "seed_everything": i}, done(score)) for i, score in enumerate([0.5, 0.7])]
    trials += [({"r": 2, "seed_everything": 0}, done(0.9)), ({"r": 1, "seed_everything": 2}, Result("failed", ""))]
    groups = by_settings(trials_table(trials), ["r", "seed_everything"])
    assert groups[["r", "runs"]].to_numpy().tolist() == [[2, 1], [1, 2]]
    assert groups.score.tolist() == pytest.approx([0.9, 0.6])
    assert groups.sd.iloc[1] == pytest.approx(statistics.stdev([0.5, 0.7]))


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_sweeps_name_options_that_exist(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    given = yaml.safe_load(path.read_text())
    sweeping = Sweeping(Sweep(**{**given, "output": str(tmp_path / "out")}))
    if path.stem == "rank":
        assert [values[RANK] for values in combinations(given["space"])] == [1, 1, 1, 2, 2, 2, 4, 4, 4]
    if path.stem == "length":
        lengths = given["space"]["model.init_args.prompt_encoder.init_args.num_virtual_tokens"]
        assert lengths == [5, 10, 25, 50, 100]
    assert list(sweeping.drawn_from) == list(given["space"])

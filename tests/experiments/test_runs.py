"""Runs by themselves: what is measured, put aside and ended."""

from __future__ import annotations

import multiprocessing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lopa_lightning.callbacks.run_record import Result
from lopa_lightning.errors import LoPAError
from lopa_lightning.experiments.resolve import resolve, with_rates_times
from lopa_lightning.experiments.runs import Run, Runs, _started, folder_of_runs
from lopa_lightning.files import write_whole

Configs = dict[str, str]


def runs_in(folder: Path, workers: int = 1) -> Runs:
    return Runs(str(folder), lambda: None, workers)


@pytest.mark.slow
def test_a_budget_of_steps_that_ends_within_an_epoch_is_validated_at_its_end(tmp_path: Path, configs: Configs) -> None:
    runs = runs_in(tmp_path)
    run = Run(runs.folder / "run", resolve([configs["reviews"], configs["soft"]], ["--trainer.max_steps=7"]), {"a": 1})
    runs.make([run])
    result = runs.results[run.folder]
    assert (result.status, result.reason, result.tags) == ("done", "", {"a": 1})
    assert [(e["step"], e["samples"]) for e in result.history] == [(5, 20), (7, 28)]
    assert run.finished() == result


@pytest.mark.slow
def test_processes_are_ended_when_a_command_is_left(tmp_path: Path, configs: Configs) -> None:
    config = resolve([configs["reviews"], configs["soft"]])
    endless = {**config, "trainer": {**config["trainer"], "max_epochs": 100_000}}
    broken = {**config, "trainer": {**config["trainer"], "max_epochs": "many"}}

    def interrupted() -> None:
        raise KeyboardInterrupt

    runs = Runs(str(tmp_path), interrupted, workers=2)
    names = {"endless": endless, "broken": broken}
    with pytest.raises(KeyboardInterrupt):
        runs.make([Run(runs.folder / name, config, {}) for name, config in names.items()])
    assert [result.status for result in runs.results.values()] == ["failed"]
    assert not multiprocessing.active_children()
    left = Result.read(runs.folder / "endless")
    assert left is not None
    assert left.status == "running"


def test_what_is_finished_is_so_for_its_own_config_alone(
    tmp_path: Path, configs: Configs, capsys: pytest.CaptureFixture[str]
) -> None:
    config = resolve([configs["reviews"], configs["soft"]])
    run = Run(tmp_path / "run", config, {})
    run.prepare()
    run.last_checkpoint.parent.mkdir()
    run.last_checkpoint.touch()
    Result("done", run.config_hash, history=[{"metrics": {"val/score": 0.5}}]).write(run.folder)
    assert run.finished() is not None

    other = Run(tmp_path / "run", {**config, "seed_everything": 7}, {})
    assert other.finished() is None
    run.prepare()  # the same again: what an interrupted run left is gone on from, its result is not
    assert run.last_checkpoint.exists()
    assert run.finished() is None
    assert capsys.readouterr().out == ""
    other.prepare()
    assert "its configuration has changed; the old run is now run.replaced-1" in capsys.readouterr().out
    assert not run.last_checkpoint.exists()
    assert (tmp_path / "run.replaced-1" / run.last_checkpoint.relative_to(run.folder)).exists()

    other.last_checkpoint.parent.mkdir()
    other.last_checkpoint.touch()
    (other.folder / "result.json").write_text("{")  # of which configuration the checkpoint is, nothing says
    other.prepare()
    assert "nothing says what was run; the old run is now run.replaced-2" in capsys.readouterr().out
    assert not other.last_checkpoint.exists()

    Result("failed", other.config_hash, "why").write(other.folder)
    assert other.finished() is None
    (other.folder / "result.json").write_text("{")
    assert Result.read(other.folder) is None


def test_why_a_run_failed_is_what_its_last_start_says(tmp_path: Path, configs: Configs) -> None:
    run = Run(tmp_path / "run", resolve([configs["reviews"], configs["soft"]]), {})
    for said, reason in [
        ("error: no data found for 'x'\n", "no data found for 'x'"),
        ("Traceback\ntorch.OutOfMemoryError: no memory\n", "torch.OutOfMemoryError: no memory"),
        ("", "its process ended with status 1"),
    ]:
        run.prepare()
        with (run.folder / "log.txt").open("a") as log:
            log.write(said)
        assert run.result(1).reason == reason
    assert "no data found" in (run.folder / "log.txt").read_text()


@pytest.mark.parametrize("changed", ["data_files", "path", "backbone", "instance_encoder"])
def test_what_is_finished_is_so_for_the_files_that_it_read(
    changed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {name: tmp_path / name / "file.csv" for name in ("data_files", "path", "backbone", "instance_encoder")}
    for path in files.values():
        write_whole(path, "text")
    data = {"path": str(files["path"].parent), "data_files": {"train": [str(files["data_files"])], "test": "a/*.csv"}}
    model = {name: {"name": str(files[name].parent)} for name in ("backbone", "instance_encoder")}
    config: dict[str, Any] = {
        "data": {"init_args": data},
        "model": {"init_args": model},
        "trainer": {"logger": False, "callbacks": None},
        "checkpoint": {},
        "last_checkpoint": {},
    }

    def end(run: Run) -> None:
        run.prepare()
        write_whole(run.last_checkpoint, "")
        begun = Result.read(run.folder)
        assert begun is not None
        replace(begun, status="done", history=[{"metrics": {"val/score": 0.5}}]).write(run.folder)

    end(Run(tmp_path / "run", config, {}))
    run = Run(tmp_path / "run", config, {})
    assert run.finished() is not None
    write_whole(files[changed], "another text")
    run = Run(tmp_path / "run", config, {})
    assert run.finished() is None
    run.prepare()
    said = "a file of its data or models has changed, by size or time; the old run is now run.replaced-1"
    assert said in capsys.readouterr().out
    assert not run.last_checkpoint.exists()

    end(run)
    for path in files.values():
        path.unlink()
    assert Run(tmp_path / "run", config, {}).finished() is not None  # what is gone has not changed

    old = Result("done", run.config_hash, history=[{"metrics": {"val/score": 0.5}}])
    old.write(run.folder)  # by a version that did not look at files
    assert run.finished() == old


def test_what_a_run_writes_beside_its_data_is_not_its_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_whole(Path("train/good/1.png"), "image")
    write_whole(Path("backbone/notes.txt"), "text")  # not what an instance encoder of that name means
    model = {"backbone": {"name": "hub/model"}, "instance_encoder": {"name": "backbone"}}

    def version(path: str | None) -> str:
        config = {"data": {"init_args": {"path": path}}, "model": {"init_args": model}}
        return Run(Path("runs", "compare", "runs", "task", "lopa", "seed-1"), config, {}).read_version

    before = version(".")
    write_whole(Path("runs/compare/comparison.csv"), "text")
    write_whole(Path("runs/compare/runs/task/lopa/seed-1/result.json"), "text")
    assert version(".") == before != ""
    write_whole(Path("train/good/2.png"), "image")
    assert version(".") != before
    assert version(None) == ""


def test_resolving_is_merging_in_order(configs: Configs) -> None:
    config = resolve([configs["reviews"], configs["soft"]], ["--trainer.max_epochs=9"])
    model = config["model"]["init_args"]
    assert model["prompt_encoder"]["class_path"] == "lopa_lightning.PromptTuning"
    assert model["learning_rates"] == {"shared_prompt": 0.05, "head": 0.02}
    assert (model["optimizer"]["init_args"]["lr"], config["trainer"]["max_epochs"]) == (0.01, 9)


def test_a_rate_multiplier_multiplies_every_rate_and_nothing_else() -> None:
    def config(lr: float, prompt: float) -> dict[str, object]:
        optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": lr, "weight_decay": 0.1}}
        others = {"head": {"class_path": "torch.optim.SGD", "init_args": {"lr": 3 * lr, "momentum": 0.9}}}
        rates = {"optimizer": optimizer, "optimizers": others, "learning_rates": {"prompt": prompt}}
        return {"model": {"init_args": {**rates, "warmup": 3}}}

    before = config(0.25, 0.5)
    assert with_rates_times(before, 4.0) == config(1.0, 2.0)
    assert before == config(0.25, 0.5)


def test_a_rate_multiplier_multiplies_the_rates_of_a_schedule() -> None:
    def config(scheduler: object, lr: float = 0.5) -> dict[str, object]:
        optimizer = {"class_path": "torch.optim.SGD", "init_args": {"lr": lr}}
        return {"model": {"init_args": {"optimizer": optimizer, "lr_scheduler": scheduler}}}

    def scheduler(**rates: object) -> dict[str, object]:
        return {"class_path": "OneCycleLR", "init_args": {"total_steps": 8, **rates}}

    before = config(scheduler(max_lr=0.5, eta_min=0.25, base_lr=[0.5, 1.0], pct_start=0.25))
    after = config(scheduler(max_lr=1.0, eta_min=0.5, base_lr=[1.0, 2.0], pct_start=0.25), lr=1.0)
    assert with_rates_times(before, 2.0) == after
    for unchanged in (None, {"class_path": "StepLR"}, {"class_path": "StepLR", "init_args": {"step_size": 3}}):
        assert with_rates_times(config(unchanged), 2.0) == config(unchanged, lr=1.0)


def test_a_rate_multiplier_needs_a_rate() -> None:
    config = {"model": {"init_args": {"optimizer": {"class_path": "torch.optim.LBFGS", "init_args": {}}}}}
    assert with_rates_times(config, 1.0) == config
    with pytest.raises(LoPAError, match=r"a rate multiplier of 3 needs model.init_args.optimizer.init_args.lr"):
        with_rates_times(config, 3.0)
    given = {"class_path": "torch.optim.SGD", "init_args": {"lr": 1.0}}
    config = {"model": {"init_args": {"optimizer": given, "optimizers": {"head": {**given, "init_args": {}}}}}}
    with pytest.raises(LoPAError, match=r"a rate multiplier of 3 needs model.init_args.optimizers.head.init_args.lr"):
        with_rates_times(config, 3.0)


def test_two_commands_in_one_folder_are_refused(tmp_path: Path) -> None:
    def refused() -> None:
        with (
            pytest.raises(LoPAError, match=r"output '.*out' is in use by another lopa command"),
            folder_of_runs(str(tmp_path / "out")),
        ):
            pass

    with folder_of_runs(str(tmp_path / "out")):
        other = multiprocessing.get_context("fork").Process(target=refused)
        other.start()
        other.join()
        assert other.exitcode == 0
    assert not (tmp_path / "out").exists()  # nothing was written to it
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"), folder_of_runs(str(tmp_path / "file")):
        pass


@pytest.mark.parametrize(
    ("visible", "count", "devices"),
    [("3,5", 2, ["3", "5", "3"]), (None, 2, ["0", "1", "0"]), ("", 0, [None, None, None])],
)
def test_each_gpu_has_a_run(
    visible: str | None, count: int, devices: list[str | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str | None] = []

    class Process:
        def __init__(self, target: Any, args: tuple[Run, str | None, int]) -> None:
            started.append(args[1])

        def start(self) -> None:
            pass

    context = SimpleNamespace(Process=Process, set_forkserver_preload=lambda names: None)
    monkeypatch.setattr(multiprocessing, "get_context", lambda kind: context)
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    monkeypatch.setattr(Run, "prepare", lambda self: None)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    for slot in range(3):
        _started(Run(tmp_path, {}, {}), slot, 3)
    assert started == devices
    assert runs_in(tmp_path, 0).workers == max(1, count)

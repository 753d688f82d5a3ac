"""Single runs: what is measured, resumed and begun anew."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from lopa_lightning.callbacks.run_record import Result
from lopa_lightning.errors import LoPAError
from lopa_lightning.experiments.resolve import resolve, with_rates_times
from lopa_lightning.experiments.run import Run, launch

Configs = dict[str, str]


def run_one(run: Run) -> Result:
    results: list[Result] = []
    launch([run], lambda _, result: results.append(result), workers=1)
    return results[0]


def test_a_budget_of_steps_that_ends_within_an_epoch_is_validated_at_its_end(tmp_path: Path, configs: Configs) -> None:
    options = ["--trainer.max_steps=7", "--trainer.accumulate_grad_batches=1"]
    run = Run(tmp_path / "run", resolve([configs["reviews"], configs["soft"]], options), keep_checkpoints=True)
    result = run_one(run)
    assert result.reason == ""
    assert [(e["epoch"], e["step"], e["samples"]) for e in result.history] == [(0, 5, 20), (1, 7, 28)]
    assert result.checkpoint_bytes == run.last_checkpoint.stat().st_size
    assert run.finished() == result

    (run.folder / "result.json").unlink()
    assert run_one(run).history == result.history


def test_a_run_whose_result_was_lost_ends_as_it_did(tmp_path: Path, configs: Configs) -> None:
    run = Run(tmp_path / "run", resolve([configs["reviews"], configs["soft"]]), keep_checkpoints=True)
    before = run_one(run)
    (run.folder / "result.json").unlink()
    after = run_one(run)
    assert (after.history, after.trained, after.frozen) == (before.history, before.trained, before.frozen)
    assert after.checkpoint_bytes == before.checkpoint_bytes
    assert after.seconds_per_step == before.seconds_per_step


def test_processes_are_ended_when_a_launch_is_left(tmp_path: Path, configs: Configs) -> None:
    config = resolve([configs["reviews"], configs["soft"]])
    endless = {**config, "trainer": {**config["trainer"], "max_epochs": 100_000}}
    broken = {**config, "trainer": {**config["trainer"], "max_epochs": "many"}}
    ended: list[Result] = []

    def interrupted(run: Run, result: Result) -> None:
        ended.append(result)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        launch([Run(tmp_path / "endless", endless), Run(tmp_path / "broken", broken)], interrupted, workers=2)
    assert [result.status for result in ended] == ["failed"]
    assert not multiprocessing.active_children()
    left = Result.read(tmp_path / "endless")
    assert left is not None
    assert left.status == "running"


def test_what_is_finished_is_so_for_its_own_config_alone(tmp_path: Path, configs: Configs) -> None:
    config = resolve([configs["reviews"], configs["soft"]])
    run = Run(tmp_path / "run", config)
    assert not run.is_changed()
    run.prepare()
    run.last_checkpoint.parent.mkdir()
    run.last_checkpoint.touch()
    Result("done", run.config_hash, history=[{"metrics": {"val/score": 0.5}}]).write(run.folder)
    assert run.finished() is not None

    other = Run(tmp_path / "run", {**config, "seed_everything": 7})
    assert other.finished() is None
    assert other.is_changed()
    run.prepare()  # the same again: what an interrupted run left is gone on from, its result is not
    assert run.last_checkpoint.exists()
    assert run.finished() is None
    other.prepare()
    assert not run.last_checkpoint.exists()
    assert (tmp_path / "run.replaced-1" / run.last_checkpoint.relative_to(run.folder)).exists()

    Result("failed", other.config_hash, "why").write(other.folder)
    assert other.finished() is None
    (other.folder / "result.json").write_text("{")
    assert Result.read(other.folder) is None


def test_resolving_is_merging_in_order(configs: Configs) -> None:
    config = resolve([configs["reviews"], configs["soft"]], ["--trainer.max_epochs=9"])
    model = config["model"]["init_args"]
    assert model["prompt_encoder"]["class_path"] == "lopa_lightning.PromptTuning"
    assert model["learning_rates"] == {"shared_prompt": 0.05, "head": 0.02}
    assert (model["optimizer"]["init_args"]["lr"], config["trainer"]["max_epochs"]) == (0.01, 9)


def test_a_rate_factor_multiplies_every_rate(configs: Configs) -> None:
    config = resolve([configs["reviews"], configs["soft"]])
    changed = with_rates_times(config, 3.0)["model"]["init_args"]
    assert changed["optimizer"]["init_args"]["lr"] == pytest.approx(0.03)
    assert changed["learning_rates"] == pytest.approx({"shared_prompt": 0.15, "head": 0.06})
    before = config["model"]["init_args"]
    assert (before["optimizer"]["init_args"]["lr"], before["learning_rates"]["head"]) == (0.01, 0.02)
    changed["optimizer"], before["optimizer"] = before["optimizer"], changed["optimizer"]
    changed["learning_rates"] = before["learning_rates"]
    before["optimizer"] = changed["optimizer"]
    assert changed == before


def test_a_rate_factor_needs_a_rate() -> None:
    config = {"model": {"init_args": {"optimizer": {"class_path": "torch.optim.LBFGS", "init_args": {}}}}}
    assert with_rates_times(config, 1.0) == config
    with pytest.raises(LoPAError, match=r"a rate factor of 3 needs model.init_args.optimizer.init_args.lr"):
        with_rates_times(config, 3.0)

"""Runs that were stopped anywhere go on as if nothing had happened."""

from __future__ import annotations

import dataclasses
import errno
import functools
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback

from lopa_lightning import ClassificationModule, PretrainedSpec
from lopa_lightning.checkpoint_io import WholeFiles
from lopa_lightning.cli import main
from lopa_lightning.errors import LoPAError
from tests.modules.helpers import LoPATiny, module, reviews, trainer, write_reviews
from tests.processes import forked, logs, on_two
from tests.resumed_run import ROWS, Signal, fit, killed_while_writing, two_processes

Tiny = Callable[[str], str]

ROOT = Path(__file__).parent.parent
STEPS = 12  # of two epochs


class Keep(Callback):
    """Saves within an epoch, after a step."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(value, other[name]) for name, value in one.items())


@dataclasses.dataclass
class Whole:
    """A run that was never stopped."""

    model: Any
    rows: list[list[int]]
    folder: Path

    def after(self, step: int) -> Path:
        """Its checkpoint of a step."""
        return self.folder / f"{step}.ckpt"


@pytest.fixture(scope="module")
def whole(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("whole") / "run"
    keep = tuple(Keep(step, folder / f"{step}.ckpt") for step in (1, 2, 4, 6, 9))
    model, rows = fit(tiny("bert_base"), folder, keep)
    assert len(rows.seen) == STEPS
    return Whole(model, rows.seen, folder)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("step", "workers"), [(1, 0), (6, 0), (9, 0), (4, 1)])
def test_a_run_resumed_within_an_epoch_is_the_whole_one_bit_for_bit(
    tiny: Tiny, tmp_path: Path, whole: Whole, step: int, workers: int, recwarn: pytest.WarningsRecorder
) -> None:
    parts, rest = fit(tiny("bert_base"), tmp_path / "parts", resume=whole.after(step), workers=workers)
    assert rest.seen == whole.rows[step:]
    assert equal(whole.model.state_dict(), parts.state_dict())
    saved, again = (
        torch.load(folder / "last.ckpt", weights_only=True) for folder in (whole.folder, tmp_path / "parts")
    )
    assert saved["global_step"] == again["global_step"] == STEPS
    assert saved["lr_schedulers"] == again["lr_schedulers"]
    moments, others = (each["optimizer_states"][0]["state"] for each in (saved, again))
    assert all(torch.equal(entry["exp_avg_sq"], others[index]["exp_avg_sq"]) for index, entry in moments.items())
    assert not [str(w.message) for w in recwarn if "within an epoch" in str(w.message)]


class Eager(ClassificationModule):
    """Has the training data set up before Lightning knows how far the run had come."""

    def configure_optimizers(self) -> Any:
        assert self.trainer.estimated_stepping_batches
        return super().configure_optimizers()


def test_a_position_that_is_lost_is_an_error(tiny: Tiny, tmp_path: Path, whole: Whole) -> None:
    model = Eager(backbone=PretrainedSpec(tiny("bert_base")), objective="head", prompt_encoder=LoPATiny)
    with pytest.raises(LoPAError, match="after 2 batches of an epoch, but the training data were set up before"):
        trainer(tmp_path, 1).fit(model, reviews(tmp_path, rows=ROWS), ckpt_path=whole.after(2))


def test_other_batches_than_before_are_said(tiny: Tiny, tmp_path: Path, whole: Whole) -> None:
    seed_everything(5)  # as the run's
    data = reviews(tmp_path, rows=ROWS, batch_size=5)
    with pytest.warns(UserWarning, match=r"its batches were others \(batch_size 4, now 5\)"):
        trainer(tmp_path, 1).fit(module(tiny("bert_base"), objective="head"), data, ckpt_path=whole.after(2))


@pytest.mark.parametrize(("changed", "step"), [(("film", "cast"), 2), ((",good", ",bad"), 6), (None, 2), (None, 6)])
def test_data_of_other_texts_or_labels_is_said(
    changed: tuple[str, str] | None,
    step: int,
    tiny: Tiny,
    tmp_path: Path,
    whole: Whole,
    recwarn: pytest.WarningsRecorder,
) -> None:
    data = reviews(tmp_path, rows=ROWS)  # the same data in another file
    train = tmp_path / "train.csv"
    if changed is not None:
        train.write_text(train.read_text().replace(*changed, 1))
    seed_everything(5)  # as the run's
    model = module(tiny("bert_base"), objective="head", warmup=3)
    trainer(tmp_path, 1 + step // 6).fit(model, data, ckpt_path=whole.after(step))
    said = [str(w.message) for w in recwarn if "training data has changed since the checkpoint" in str(w.message)]
    assert len(said) == (changed is not None)


def test_killed_while_writing_it_goes_on_from_the_checkpoint_before(tiny: Tiny, tmp_path: Path, whole: Whole) -> None:
    step = random.SystemRandom().randint(2, STEPS - 1)
    write_all(tmp_path)
    log = tmp_path / "log.txt"
    status = forked(lambda: killed_while_writing(tiny("bert_base"), tmp_path / "killed", step), log)
    assert status == -signal.SIGKILL, log.read_text()[-2000:]
    last = tmp_path / "killed" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == step - 1
    assert len(list(last.parent.glob(".last.ckpt.*"))) == 1
    resumed, rest = fit(tiny("bert_base"), tmp_path / "killed", resume=last)
    assert rest.seen == whole.rows[step - 1 :], step
    assert equal(whole.model.state_dict(), resumed.state_dict()), step
    assert [path.name for path in last.parent.iterdir()] == ["last.ckpt"]


def write_all(folder: Path) -> None:
    for split in ("train", "validation", "test"):
        write_reviews(folder / f"{split}.csv", ROWS)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_go_on_where_one_was_killed(tiny: Tiny, tmp_path: Path) -> None:
    step = random.SystemRandom().randint(2, STEPS // 2 - 1)
    write_all(tmp_path)
    run = functools.partial(on_two, two_processes, tiny("bert_base"), tmp_path, step, folder=tmp_path)
    assert run("killed")[1] == -signal.SIGKILL, logs(tmp_path)
    assert run("resumed") == [0, 0], logs(tmp_path)
    for rank in (0, 1):
        whole, resumed = (torch.load(tmp_path / f"{name}{rank}.pt", weights_only=True) for name in ("whole", "resumed"))
        taken = len(whole["rows"]) - len(resumed["rows"])
        assert taken in (step - 1, step)  # the other process may have saved the step before it heard
        assert resumed["rows"] == whole["rows"][taken:]
        for name, value in whole["state"].items():
            torch.testing.assert_close(resumed["state"][name], value, rtol=0, atol=1e-6)
        assert resumed["ended"] == [143, 130, 130]
    saved = [torch.load(tmp_path / f"asked{i}" / "last.ckpt", weights_only=True)["global_step"] for i in range(3)]
    assert saved == [step, step, STEPS // 4]  # the last one before the validation of the first epoch


def test_slurm_asks_for_a_checkpoint_and_the_queue(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm = {"JOB_ID": "77", "JOB_NAME": "job", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    command = tmp_path / "bin" / "scontrol"
    command.parent.mkdir()
    command.write_text(f"#!/bin/sh\necho $* >> {tmp_path}/asked.txt\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
    whole, rows = fit(tiny("bert_base"), tmp_path / "queued", (Signal(signal.SIGUSR1, 3),))
    assert (tmp_path / "asked.txt").read_text() == "requeue 77\n"
    assert torch.load(tmp_path / "queued" / "hpc_ckpt_1.ckpt", weights_only=True)["global_step"] == 3
    resumed, rest = fit(tiny("bert_base"), tmp_path / "queued")  # as the job that is queued again
    assert rest.seen == rows.seen[3:]
    assert equal(whole.state_dict(), resumed.state_dict())


@pytest.mark.slow
def test_the_command_line_finds_the_last_run(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_all(tmp_path)
    arguments = [
        *("fit", "--config", str(ROOT / "configs" / "own_csv.yaml"), f"--model.backbone.name={tiny('bert_base')}"),
        *("--data.data_files", '{"train": "train.csv", "validation": "validation.csv"}', "--data.batch_size=4"),
        *("--data.labels", '["good", "bad"]', "--trainer.accelerator=cpu", "--ckpt_path=last"),
    ]
    with pytest.warns(UserWarning, match="no checkpoint last.ckpt under runs/lopa yet: the run starts from scratch"):
        main([*arguments, "--trainer.max_epochs=1"])
    main([*arguments, "--trainer.max_epochs=2"])
    steps = [
        torch.load(path, weights_only=True)["global_step"] for path in sorted(tmp_path.rglob("version_*/**/last.ckpt"))
    ]
    assert steps == [6, 12]
    monkeypatch.setattr(
        "lopa_lightning.modules.ClassificationModule.on_train_start", lambda self: os.kill(os.getpid(), 15)
    )
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--trainer.max_epochs=3"])
    assert stop.value.code == 143
    newest = Path("runs", "lopa", "version_2", "checkpoints", "last.ckpt")
    assert f"--ckpt_path {newest} goes on there" in capsys.readouterr().err
    assert torch.load(newest, weights_only=True)["global_step"] == 13


def test_a_full_disk_is_one_line_and_the_checkpoint_before_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.ckpt"
    WholeFiles().save_checkpoint({"step": 1}, path)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LoPAError, match=r"last.ckpt' cannot be written \(No space left on device\); the one before"):
        WholeFiles().save_checkpoint({"step": 2}, path)
    assert torch.load(path) == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]

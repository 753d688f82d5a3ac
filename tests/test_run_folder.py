"""A run's folder is made when the run starts, and is its alone."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.loggers import Logger

from lopa_lightning.callbacks import LastCheckpoint, PredictionWriter, RunLogger
from lopa_lightning.callbacks.streamed_predictions import PredictionStream
from lopa_lightning.cli import main
from lopa_lightning.errors import LoPAError
from lopa_lightning.files import Claim, check_writable, clear_unfinished
from lopa_lightning.modules import ClassificationModule
from tests.modules.helpers import module, reviews, trainer
from tests.refusals import Refused
from tests.test_distributed import ROOT
from tests.test_resume import write_all

Tiny = Callable[[str], str]
Command = Callable[..., list[str]]


@pytest.fixture
def command(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Arguments of a small ``lopa fit`` in an empty folder."""
    data = tmp_path / "data"
    data.mkdir()
    write_all(data)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(sys, "argv", ["lopa"])
    files = {split: str(data / f"{split}.csv") for split in ("train", "validation")}

    def arguments(*more: str) -> list[str]:
        return [
            *("fit", "--config", str(ROOT / "configs" / "own_csv.yaml"), f"--model.backbone.name={tiny('bert_base')}"),
            *(f"--data.data_files={json.dumps(files)}", '--data.labels=["good", "bad"]', "--trainer.accelerator=cpu"),
            *("--trainer.max_epochs=2", "--model.prompt_encoder.num_virtual_tokens=3", *more),
        ]

    return arguments


@contextmanager
def process(function: Callable[..., Any], *arguments: Any) -> Iterator[BaseProcess]:
    """A fork of this process, which has everything imported; killed at the end."""
    forked = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    forked.start()
    try:
        yield forked
    finally:
        forked.kill()
        forked.join()


def contents(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)).partition("events.out")[0] for path in folder.rglob("*")}


RUN = {"", "config.yaml", "hparams.yaml", "checkpoints", "checkpoints/best.ckpt", "checkpoints/last.ckpt"}


def test_runs_that_are_started_together_have_folders_of_their_own(tmp_path: Path) -> None:
    loggers = [RunLogger(tmp_path, "lopa") for _ in range(3)]
    assert [logger.version for logger in loggers] == [0, 0, 0]
    assert contents(tmp_path) == set()
    for logger in loggers:
        logger.start()
        logger.start()
    assert [logger.version for logger in loggers] == [0, 1, 2]
    assert len({logger.experiment.log_dir for logger in loggers}) == 3


def test_a_folder_that_was_named_may_be_there(tmp_path: Path) -> None:
    for version, name in ((3, "version_3"), ("mine", "mine")):
        (tmp_path / "lopa" / name).mkdir(parents=True)
        logger = RunLogger(tmp_path, "lopa", version)
        logger.start()
        assert Path(logger.log_dir) == tmp_path / "lopa" / name


def test_where_another_run_comes_first_all_files_are_in_the_next_folder(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure = ClassificationModule.configure_model

    def after_another(self: ClassificationModule) -> None:
        assert not Path("runs").exists()
        Path("runs/lopa/version_0").mkdir(parents=True)
        configure(self)

    monkeypatch.setattr(ClassificationModule, "configure_model", after_another)
    main(command("--trainer.log_every_n_steps=1"))
    assert contents(Path("runs/lopa/version_0")) == set()
    assert contents(Path("runs/lopa/version_1")) == RUN
    assert yaml.safe_load(Path("runs/lopa/version_1/config.yaml").read_text())["trainer"]["max_epochs"] == 2


@pytest.mark.slow
def test_a_run_that_is_refused_leaves_no_folder(
    command: Command, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    main(command())
    runs = contents(Path())
    last = "--ckpt_path=runs/lopa/version_0/checkpoints/last.ckpt"
    for wrong in (
        ["--model.learning_rates.heads=0.1"],
        [last, "--model.prompt_encoder.num_virtual_tokens=4"],
        [last, "--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0.1"],
        ["--last_checkpoint.dirpath=other", "--model.learning_rates.heads=0.1"],
    ):
        with pytest.raises(SystemExit) as stop:
            main(command(*wrong))
        assert stop.value.code == 1, wrong
        assert contents(Path()) == runs, wrong


@pytest.mark.slow
def test_two_commands_at_once_do_not_mix(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    together = multiprocessing.get_context("fork").Barrier(2)
    configure = ClassificationModule.configure_model

    def configure_together(self: ClassificationModule) -> None:
        together.wait(60)  # both know by now which folder is to be theirs
        configure(self)

    monkeypatch.setattr(ClassificationModule, "configure_model", configure_together)
    with process(main, command("--seed_everything=1")) as one, process(main, command("--seed_everything=2")) as two:
        one.join()
        two.join()
    assert (one.exitcode, two.exitcode) == (0, 0)
    folders = sorted(Path("runs/lopa").iterdir())
    assert [folder.name for folder in folders] == ["version_0", "version_1"]
    seeds = {yaml.safe_load((folder / "config.yaml").read_text())["seed_everything"] for folder in folders}
    assert seeds == {1, 2}
    assert [contents(folder) for folder in folders] == [RUN, RUN]


def hold(folder: Path, what: str, *name: str) -> None:
    claim = Claim(folder, what, *name)
    (folder / "held").touch()
    time.sleep(600)
    claim.release()


@contextmanager
def held(folder: Path, *arguments: str) -> Iterator[BaseProcess]:
    """Another process that has claimed a folder."""
    with process(hold, folder, *arguments) as other:
        while not (folder / "held").is_file():
            assert other.is_alive()
            time.sleep(0.01)
        yield other


@pytest.mark.parametrize("option", ["checkpoint.dirpath", "last_checkpoint.dirpath"])
def test_a_second_run_with_one_dirpath_is_refused_until_the_first_has_ended(
    option: str, command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(_: ClassificationModule) -> None:
        raise AssertionError("weights were read")

    folder = Path("shared").absolute()
    with held(folder, "dirpath") as first:
        monkeypatch.setattr(ClassificationModule, "configure_model", never)
        with pytest.raises(SystemExit) as stop:
            main(command(f"--{option}=shared"))
        assert stop.value.code == 1
        last_line = capsys.readouterr().err.rstrip("\n").rpartition("\n")[2]
        assert last_line == f"error: dirpath {str(folder)!r} is in use by another lopa command; give another"
        assert not Path("runs").exists()
        assert first.pid is not None
        os.kill(first.pid, signal.SIGKILL)
        first.join()
    (folder / "held").unlink()
    again = Claim(folder, "dirpath")
    again.release()
    assert folder.is_dir()
    assert contents(folder) == set()


def test_two_commands_do_not_write_to_one_file_of_predictions(tmp_path: Path) -> None:
    stream = PredictionStream(tmp_path / "out", "predictions", {"weights": "abc"}, rank=0)
    in_use = pytest.raises(LoPAError, match=r"predictions.folder '.*/out' is in use by another lopa command")
    with held(tmp_path / "out", "predictions.folder", ".predictions.lock"), in_use:
        stream.open()
    (tmp_path / "out" / "held").unlink()
    stream.open()
    stream.start()
    stream.close()
    assert contents(tmp_path / "out") == {"predictions.jsonl"}


def test_a_claim_leaves_nothing_where_nothing_was(tmp_path: Path) -> None:
    Claim(tmp_path / "new", "dirpath").release()
    assert contents(tmp_path) == set()


def test_what_was_left_half_written_is_cleared_once_its_writer_is_dead(tmp_path: Path) -> None:
    with process(int) as ended:
        ended.join()
    here, dead = platform.node(), ended.pid
    files = [
        *(f".last.ckpt.{here}.{dead}.x1_z", f".best.ckpt.{here}.{dead}.abc"),
        *(f".last.ckpt.{here}.{os.getpid()}.abc", f".last.ckpt.elsewhere.{dead}.abc", "last.ckpt", ".hidden"),
    ]
    for name in files:
        (tmp_path / name).touch()
    clear_unfinished(tmp_path)
    assert contents(tmp_path) == set(files[2:])


def test_the_next_run_clears_what_a_killed_one_left(command: Command) -> None:
    with process(int) as ended:
        ended.join()
    left = Path(f"runs/lopa/version_0/checkpoints/.last.ckpt.{platform.node()}.{ended.pid}.abc")
    left.parent.mkdir(parents=True)
    left.touch()
    main(command())
    assert not left.exists()
    assert Path("runs/lopa/version_1/checkpoints/last.ckpt").is_file()


def test_without_a_logger_a_users_config_stays_as_it_is(command: Command) -> None:
    Path("config.yaml").write_text("mine: true")
    with pytest.warns(UserWarning, match=r"config\.yaml is there already and stays as it is"):
        main(command("--trainer.logger=false", "--trainer.max_epochs=1"))
    assert Path("config.yaml").read_text() == "mine: true"


class Silent(Logger):
    """Somebody's logger, which has no folder."""

    name, version = "silent", 0

    def log_metrics(self, metrics: Any, step: int | None = None) -> None: ...

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None: ...


def test_a_logger_without_a_folder_logs_and_the_config_is_saved(command: Command) -> None:
    main(command(f"--trainer.logger={__name__}.Silent", "--trainer.max_epochs=1"))
    assert yaml.safe_load(Path("config.yaml").read_text())["trainer"]["logger"]["class_path"].endswith("Silent")
    assert Path("checkpoints/best.ckpt").is_file() or list(Path().rglob("best.ckpt"))


def test_whether_a_folder_can_be_written_to_is_seen_without_making_it(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    check_writable(tmp_path / "new" / "newer", "dirpath")
    nowhere = [Path("/proc/x")] if sys.platform == "linux" else []  # which permissions do not tell
    for folder in (tmp_path / "taken", tmp_path / "taken" / "new", *nowhere):
        with pytest.raises(LoPAError, match=f"dirpath '{folder}' cannot be written to: "):
            check_writable(folder, "dirpath")
    assert contents(tmp_path) == {"taken"}


@pytest.mark.parametrize(
    ("do", "name", "options"),
    [
        ("fit", "trainer.logger.save_dir", lambda folder: {"logger": RunLogger(folder)}),
        ("predict", "trainer.logger.save_dir", lambda folder: {"logger": RunLogger(folder)}),
        ("fit", "dirpath", lambda folder: {"callbacks": [LastCheckpoint(str(folder))]}),
        ("fit", "dirpath", lambda folder: {"callbacks": [LastCheckpoint()], "default_root_dir": folder}),
        ("predict", "predictions.folder", lambda folder: {"callbacks": [PredictionWriter(str(folder))]}),
    ],
)
def test_a_folder_that_cannot_be_written_to_is_refused_before_texts_are_tokenised(
    do: str,
    name: str,
    options: Callable[[Path], dict[str, Any]],
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refused: Refused,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").touch()
    run, data = trainer(tmp_path, **options(tmp_path / "taken" / "x")), reviews(tmp_path)
    with refused(f"{name} '{tmp_path}/taken/x", "cannot be written to: Not a directory"):
        getattr(run, do)(module(tiny("bert_base"), objective="head"), data)


def test_a_dirpath_that_is_claimed_is_free_after_the_run(tiny: Tiny, tmp_path: Path) -> None:
    for _ in range(2):
        run = trainer(tmp_path, callbacks=[LastCheckpoint(str(tmp_path / "kept"))], max_steps=1)
        run.fit(module(tiny("bert_base"), objective="head"), reviews(tmp_path))
    assert contents(tmp_path / "kept") == {"last.ckpt"}
    with process(Claim, tmp_path / "kept", "dirpath") as other:
        other.join()
    assert other.exitcode == 0


def test_a_claim_of_another_process_is_an_error(tmp_path: Path) -> None:
    def refused() -> None:
        with pytest.raises(LoPAError, match=r"dirpath '.*' is in use by another lopa command"):
            Claim(tmp_path, "dirpath")

    claim = Claim(tmp_path, "dirpath")
    with process(refused) as other:
        other.join()
    assert other.exitcode == 0
    claim.release()


def test_runs_go_below_the_root_folder_that_is_given(command: Command) -> None:
    main(command("--trainer.default_root_dir=out", "--trainer.max_steps=1"))
    main(command("--trainer.default_root_dir=out", "--trainer.logger.save_dir=logs", "--trainer.max_steps=1"))
    assert [Path("out/lopa/version_0/checkpoints/last.ckpt").exists(), Path("logs/lopa/version_0").is_dir()] == [
        True
    ] * 2
    assert not Path("runs").exists()

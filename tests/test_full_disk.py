"""A disk that is full ends a command in a line, and what was whole before stays whole."""

from __future__ import annotations

import contextlib
import errno
from pathlib import Path
from typing import Any

import pytest
import torch

from lopa_lightning.callbacks.streamed_predictions import PredictionStream
from lopa_lightning.cli import main
from lopa_lightning.files import write_whole
from lopa_lightning.modules import ClassificationModule
from tests.test_run_folder import Command, command

__all__ = ["command"]  # a fixture

IDENTITY = {"weights": "abc"}


def fill(disk: Path) -> None:
    with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1024))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--trainer.logger.save_dir={disk}", "--last_checkpoint.dirpath={kept}", "--checkpoint.dirpath={kept}"],
            "[Errno 28] No space left on device: "
            "'{disk}/lopa/version_0, which trainer.logger.init_args.save_dir moves'",
        ),
        (
            ["--last_checkpoint.dirpath={disk}"],
            "checkpoint '{disk}/last.ckpt' cannot be written (No space left on device); the one before is kept",
        ),
    ],
    ids=["TensorBoard", "checkpoint"],
)
def test_a_run_ends_in_a_line_with_its_last_checkpoint_whole(
    options: list[str],
    message: str,
    command: Command,
    small_disk: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    step = ClassificationModule.training_step

    def full_from_the_second(self: ClassificationModule, *arguments: Any) -> torch.Tensor:
        if self.global_step == 1:
            fill(small_disk)
        return step(self, *arguments)

    monkeypatch.setattr(ClassificationModule, "training_step", full_from_the_second)
    places = {"disk": small_disk, "kept": tmp_path / "kept"}
    given = [option.format(**places) for option in options]
    given += ["--last_checkpoint.every_n_train_steps=1", "--trainer.log_every_n_steps=1"]
    with pytest.raises(SystemExit) as stop:
        main(
            command(
                *given,
                "--model.prompt_encoder.hidden_dim=8",
                "--last_checkpoint.every_n_train_steps=1",
                "--trainer.log_every_n_steps=1",
            )
        )
    assert stop.value.code == 1
    err = capsys.readouterr().err
    assert err.rstrip("\n").rpartition("\n")[2] == f"error: {message.format(**places)}"
    assert "Traceback" not in err
    last = next(path for path in tmp_path.rglob("last.ckpt"))
    assert torch.load(last, weights_only=True)["global_step"] >= 1
    assert not list(tmp_path.rglob(".last.ckpt.*"))


def test_predictions_name_their_file_and_are_gone_on_with(small_disk: Path) -> None:
    stream = PredictionStream(small_disk, "predictions", IDENTITY, rank=0)
    stream.start()
    stream.add([{"index": 0}])
    fill(small_disk)
    with pytest.raises(OSError, match=r"No space left on device: '.*/predictions.jsonl'") as full:
        stream.add({"index": index, "text": "a" * 1000} for index in range(1, 100))
    assert full.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match=r"No space left on device: '.*/predictions.csv'"):
        write_whole(small_disk / "predictions.csv", "a" * 10000)
    (small_disk / "filler").unlink()
    stream.add([{"index": 200}])  # its line is joined with the one that was cut off
    stream.add([{"index": 201}])
    again = PredictionStream(small_disk, "predictions", IDENTITY, rank=0)
    again.open()
    found = [row["index"] for row in again.found]
    assert found[0] == 0
    assert found[-1] == 201
    assert 200 not in found


@pytest.mark.parametrize("state", ["", "{", "[1]", "null", "\udcff"])
def test_predictions_with_a_damaged_state_start_over(state: str, tmp_path: Path) -> None:
    (tmp_path / ".predictions.unfinished.json").write_bytes(state.encode(errors="surrogateescape"))
    (tmp_path / "predictions.jsonl").write_text('{"index": 0}\n')
    stream = PredictionStream(tmp_path, "predictions", IDENTITY, rank=0)
    with pytest.warns(UserWarning, match="its .predictions.unfinished.json is damaged: starting over"):
        stream.open()
    assert stream.found == []
    stream.start()
    assert (tmp_path / "predictions.jsonl").read_text() == ""


@pytest.mark.parametrize("line", ["", "{", "null", "[0]", '{"inde": 1}', '{"index": 1'])
def test_a_damaged_line_of_predictions_is_left_out(line: str, tmp_path: Path, recwarn: Any) -> None:
    stream = PredictionStream(tmp_path, "predictions", IDENTITY, rank=0)
    stream.start()
    (tmp_path / "predictions.jsonl").write_text(f'{{"index": 0}}\n{line}\n{{"index": 2}}\n')
    stream.open()
    assert [row["index"] for row in stream.found] == [0, 2]

"""SIGTERM and Ctrl-C end a run soon, and what is then said is true."""

from __future__ import annotations

import os
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback

import lopa_lightning.__main__
from lopa_lightning.cli import main
from lopa_lightning.modules import CausalLMModule, ClassificationModule
from lopa_lightning.signals import Stopped
from tests.modules.helpers import COMPLETIONS, completions
from tests.resumed_run import Signal, fit
from tests.test_distributed import ROOT
from tests.test_resume import equal, write_all
from tests.test_run_folder import process

Tiny = Callable[[str], str]


class SignalIn(Callback):
    """Sends its own process signals in a hook, when it is called for the n-th time."""

    def __init__(self, hook: str, call: int, *numbers: signal.Signals) -> None:
        self.calls = 0

        def send(*_: Any) -> None:
            self.calls += 1
            if self.calls == call:
                for number in numbers:
                    os.kill(os.getpid(), number)

        setattr(self, hook, send)


def stopped(*arguments: Any, **options: Any) -> Stopped:
    with pytest.raises(Stopped) as stop:
        fit(*arguments, **options)
    return stop.value


def saved_step(folder: Path) -> int:
    step: int = torch.load(folder / "last.ckpt", weights_only=True)["global_step"]
    return step


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_after_the_step_with_a_checkpoint(
    number: signal.Signals, tiny: Tiny, tmp_path: Path
) -> None:
    before = signal.getsignal(number)
    stop = stopped(tiny("bert_base"), tmp_path / "asked", (Signal(number, 3),))
    last = tmp_path / "asked" / "last.ckpt"
    assert stop.code == 128 + number
    assert str(stop) == (
        f"ended by {number.name}: {last} holds step 3, and the same command with --ckpt_path {last} goes on there"
    )
    assert signal.getsignal(number) == before
    assert saved_step(tmp_path / "asked") == 3
    if number == signal.SIGINT:
        return  # its checkpoint is written as that of SIGTERM
    resumed, _ = fit(tiny("bert_base"), tmp_path / "asked", resume=last)
    whole, _ = fit(tiny("bert_base"), tmp_path / "whole")
    assert equal(whole.state_dict(), resumed.state_dict())


def test_a_second_ctrl_c_ends_within_the_step(tiny: Tiny, tmp_path: Path) -> None:
    twice = SignalIn("on_before_optimizer_step", 3, signal.SIGINT, signal.SIGTERM, signal.SIGINT)
    stop = stopped(tiny("bert_base"), tmp_path / "asked", (twice,))
    assert (stop.code, twice.calls) == (130, 3)
    assert "last.ckpt holds step 2" in str(stop)
    assert saved_step(tmp_path / "asked") == 2


def test_a_stop_within_an_accumulated_step_takes_effect_at_its_end(tiny: Tiny, tmp_path: Path) -> None:
    asked = SignalIn("on_train_batch_start", 3, signal.SIGTERM)
    stop = stopped(tiny("bert_base"), tmp_path / "asked", (asked,), accumulate_grad_batches=2)
    assert "holds step 2" in str(stop)
    assert saved_step(tmp_path / "asked") == 2
    assert asked.calls == 4


def test_a_validation_is_ended_at_once_with_the_checkpoint_from_before_it(tiny: Tiny, tmp_path: Path) -> None:
    asked = SignalIn("on_validation_batch_start", 2, signal.SIGINT)
    stop = stopped(tiny("bert_base"), tmp_path / "asked", (asked,), num_sanity_val_steps=0)
    assert "last.ckpt holds step 6" in str(stop)
    assert (saved_step(tmp_path / "asked"), asked.calls) == (6, 2)


def test_handlers_of_the_calling_program_and_ignored_signals_stay(tiny: Tiny, tmp_path: Path) -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number)), signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(SystemExit):  # Lightning's own, which tells the calling program first
            fit(tiny("bert_base"), tmp_path / "asked", (Signal(signal.SIGINT, 1), Signal(signal.SIGTERM, 2)))
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])
    assert heard == [signal.SIGTERM]
    assert saved_step(tmp_path / "asked") == 2


def ended(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[Any, str]:
    """Exit status and last line of a command."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    return stop.value.code, capsys.readouterr().err.rstrip("\n").rpartition("\n")[2]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_modules_are_imported_ends_in_a_line(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    class Importing(ModuleType):
        def __getattr__(self, name: str) -> Any:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(sys, "argv", ["lopa", "fit"])
    monkeypatch.setitem(sys.modules, "lopa_lightning.cli", Importing("lopa_lightning.cli"))
    with process(lopa_lightning.__main__.main) as command:
        command.join()
    assert command.exitcode == 128 + number
    assert capfd.readouterr().err == f"ended by {number.name}: nothing was there to save\n"


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_there_is_one_module_to_run() -> None:
    with pytest.raises(SystemExit, match="run `python -m lopa_lightning`"):
        runpy.run_module("lopa_lightning.cli", run_name="__main__")
    assert "-m lopa_lightning.cli" not in (ROOT / "README.md").read_text()


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("subcommand", "method", "number"),
    [
        ("fit", "setup", signal.SIGINT),
        ("fit", "validation_step", signal.SIGTERM),
        ("test", "test_step", signal.SIGTERM),
        ("predict", "predict_step", signal.SIGINT),
    ],
)
def test_where_nothing_is_to_be_saved_a_command_ends_at_once_in_a_line(
    subcommand: str,
    method: str,
    number: signal.Signals,
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_all(tmp_path)
    monkeypatch.setattr(ClassificationModule, method, lambda *_, **__: os.kill(os.getpid(), number))
    arguments = [
        *(subcommand, "--config", str(ROOT / "configs" / "own_csv.yaml"), "--trainer.logger=false"),
        *(f"--model.backbone.name={tiny('bert')}", '--data.labels=["good", "bad"]', "--trainer.accelerator=cpu"),
        *("--model.objective=masked_lm", '--data.template=["{text} {mask}"]', '--data.words=["good", "bad"]'),
        '--data.data_files={"train": "train.csv", "validation": "validation.csv", "test": "test.csv"}',
    ]
    if subcommand in ("test", "predict"):  # which want something trained, or nothing to train
        arguments += ["--model.prompt_encoder=lopa_lightning.NoPrompt", "--model.learning_rates={}"]
    line = f"ended by {number.name}: nothing was there to save"
    assert ended(arguments, capsys) == (128 + number, line)


def test_predictions_that_are_written_as_they_come_are_gone_on_with(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    completions(tmp_path / "data")
    complete = CausalLMModule.complete
    asked: list[int] = []
    stop_at = 9

    def counted(module: CausalLMModule, batch: dict[str, Any]) -> list[list[str]]:
        if len(asked) >= stop_at:
            os.kill(os.getpid(), signal.SIGINT)
        asked.extend(batch["index"].tolist())
        return complete(module, batch)

    monkeypatch.setattr(CausalLMModule, "complete", counted)
    arguments = [
        *("predict", "--model=CausalLMModule", f"--model.backbone.name={tiny('llama')}"),
        *("--data=CompletionDataModule", '--data.data_files={"test": "data/test.jsonl"}', "--data.eval_batch_size=4"),
        *("--trainer.logger=false", "--trainer.accelerator=cpu", "--model.generation.max_new_tokens=2"),
        *("--model.prompt_encoder=lopa_lightning.NoPrompt", "--predictions.folder=out"),
    ]
    line = (
        "ended by SIGINT: out/predictions.jsonl holds what was done, and the same command with "
        "--predictions.folder out goes on after it"
    )
    assert ended(arguments, capsys) == (130, line)
    done = len(Path("out/predictions.jsonl").read_text().splitlines())
    assert 9 <= done < len(COMPLETIONS)
    asked.clear()
    stop_at = 100
    main(arguments)
    assert len(Path("out/predictions.jsonl").read_text().splitlines()) == len(COMPLETIONS)
    assert len(asked) == len(COMPLETIONS) - done

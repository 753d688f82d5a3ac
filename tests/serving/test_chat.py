"""`lopa chat` and `lopa predict --file` for chats: from lines and files to answers."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lopa_lightning import CausalLMModule, LoPALightningModule
from lopa_lightning.cli import main
from tests.modules.helpers import causal, completions, module, reviews, trainer

Tiny = Callable[[str], str]
ASKED, TOLD = "film", "story"
CHAT = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": "great"}]


@pytest.fixture(scope="module")
def checkpoints(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A checkpoint for each placement."""
    folder = tmp_path_factory.mktemp("chat")
    torch.manual_seed(0)
    saved = {}
    for placement in ("system", "before"):
        model = causal(tiny("chat"), placement=placement, generation={"max_new_tokens": 3})
        run = trainer(folder, callbacks=[], max_steps=1, limit_val_batches=0)
        run.fit(model, completions(folder / "data", [{"messages": CHAT}] * 4))
        saved[placement] = str(folder / f"{placement}.ckpt")
        run.save_checkpoint(saved[placement])
    return saved


def talk(lines: list[str], arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    main(["chat", *arguments])


def test_a_chat_goes_on_until_another_begins(
    checkpoints: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = LoPALightningModule.load_from_checkpoint(checkpoints["system"])
    ((first,),) = loaded.generate([{"role": "user", "content": ASKED}])
    chat = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": first.strip()}]
    chats = [chat[:1], [*chat, {"role": "user", "content": TOLD}], [{"role": "user", "content": TOLD}]]
    wanted = [text.strip() for (text,) in loaded.generate(chats)]
    asked: list[Any] = []
    generate = CausalLMModule.generate

    def recorded(self: CausalLMModule, *args: Any) -> list[list[str]]:
        asked.append(args)
        return generate(self, *args)

    monkeypatch.setattr(CausalLMModule, "generate", recorded)
    arguments = ["--ckpt_path", checkpoints["system"]]
    capsys.readouterr()
    talk([ASKED, "", TOLD, "/new", TOLD], arguments, monkeypatch)
    assert capsys.readouterr().out == "".join(f"{text}\n" for text in wanted)
    assert asked == [(each, {}, 1) for each in chats]
    talk([ASKED, TOLD * 20, "/new", TOLD], [*arguments, "--max_new_tokens", "2"], monkeypatch)
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 2
    assert "it is not cut; /new begins another chat" in said.err
    assert asked[-1] == (chats[2], {"max_new_tokens": 2}, 1)


def test_where_no_chat_was_trained_each_line_is_a_prompt(
    checkpoints: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = LoPALightningModule.load_from_checkpoint(checkpoints["before"])
    wanted = [text.strip() for (text,) in loaded.generate([ASKED, TOLD])]
    capsys.readouterr()
    talk([ASKED, TOLD], ["--ckpt_path", checkpoints["before"]], monkeypatch)
    assert capsys.readouterr().out == "".join(f"{text}\n" for text in wanted)


def test_a_classifier_does_not_talk(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trainer(tmp_path, callbacks=[], max_steps=1, limit_val_batches=0)
    run.fit(module(tiny("bert")), reviews(tmp_path))
    run.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(SystemExit):
        main(["chat", "--ckpt_path", str(tmp_path / "a.ckpt")])
    assert "error: ClassificationModule generates no text; lopa predict answers" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["chat", "--ckpt_path", "none.ckpt", "--max_new_tokens", "0"])
    assert "max_new_tokens must be at least 1, got 0" in capsys.readouterr().err


def test_chats_of_a_file_are_answered(
    checkpoints: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chats = [CHAT, [{"role": "user", "content": TOLD}], [*CHAT, {"role": "user", "content": TOLD}]]
    (tmp_path / "chats.jsonl").write_text(
        "".join(json.dumps({"id": n, "messages": c}) + "\n" for n, c in enumerate(chats))
    )
    loaded = LoPALightningModule.load_from_checkpoint(checkpoints["system"])
    wanted = loaded.generate([CHAT[:1], *chats[1:]])
    capsys.readouterr()
    predict = ["predict", "--ckpt_path", checkpoints["system"], "--file"]
    main([*predict, str(tmp_path / "chats.jsonl")])
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["input"]["id"], row["completions"]) for row in found] == list(enumerate(wanted))
    (tmp_path / "bad.jsonl").write_text(
        json.dumps({"messages": CHAT}) + "\n" + json.dumps({"messages": CHAT[1:]}) + "\n"
    )
    with pytest.raises(SystemExit):
        main([*predict, str(tmp_path / "bad.jsonl")])
    said = capsys.readouterr().err
    assert "bad.jsonl: row 2 (counted from 1): a chat must have a question before its last answer" in said


def test_a_trainers_predictions_name_their_chats(checkpoints: dict[str, str], tmp_path: Path) -> None:
    data = completions(tmp_path, [{"messages": CHAT}])
    data.connect(LoPALightningModule.load_from_checkpoint(checkpoints["system"]).input_spec)
    assert data.named(0, [{"index": 0, "completions": ["x"]}]) == [
        {"index": 0, "input": {"messages": CHAT[:1]}, "gold": "great", "completions": ["x"]}
    ]

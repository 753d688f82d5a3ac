"""What ``lopa plan`` says beside what a run of the same configuration takes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel

from lopa_lightning.cli import main
from lopa_lightning.experiments.plan import Sizes, kept_for_backward, sizes
from lopa_lightning.experiments.resolve import built
from lopa_lightning.frozen import loading
from tests.modules.helpers import trainer, write_reviews
from tests.tiny import WIDTH

Tiny = Callable[[str], str]

ROOT = Path(__file__).parents[2]
BATCH, TOKENS = 6, 24


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lopa"])


def arguments(backbone: str, *options: str) -> list[str]:
    write_reviews(Path("train.csv"), 20)
    return [
        *("--config", str(ROOT / "configs" / "own_csv.yaml"), f"--model.backbone.name={backbone}"),
        *("--data.data_files", '{"train": "train.csv"}', "--data.labels", '["good", "bad"]', *options),
    ]


def step_of(module: Any) -> tuple[int, int]:
    """Operations of a real step, and bytes that it keeps for the backward pass."""
    module.configure_model()
    ids = torch.full((BATCH, TOKENS), 7)
    rows = torch.zeros(BATCH, dtype=torch.long)
    batch = {"index": rows, "labels": rows, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if module.instance_spec.cache:
        batch["instance"] = torch.ones(BATCH, WIDTH)
    else:
        batch |= {"instance_input_ids": ids, "instance_attention_mask": torch.ones_like(ids)}
    own = {tensor.untyped_storage()._cdata for tensor in [*module.net.parameters(), *module.net.buffers()]}
    with kept_for_backward() as kept, FlopCounterMode(display=False) as flops:
        module.loss(module.net(batch)[0], batch).backward()
    return flops.get_total_flops(), sum(size for storage, size in kept.items() if storage not in own)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("bert_base", ()),
        ("llama", ("--model.backbone.dtype=bfloat16",)),
        ("gpt2", ("--model.backbone.gradient_checkpointing=true",)),
        ("bert_base", ("--model.instance_encoder.cache=false",)),
    ],
)
def test_it_says_what_a_step_takes(
    tiny: Tiny, kind: str, options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, _ = built(arguments(tiny(kind), *options))
    with monkeypatch.context() as patched:
        for auto_class in loading._AUTO_CLASSES.values():
            patched.setattr(auto_class, "from_pretrained", None)
        said = sizes(module, BATCH, TOKENS)
    assert module.net is None
    flops, kept = step_of(module)
    assert said.flops == flops
    assert said.kept_bytes == pytest.approx(kept, rel=0.15)
    trained = [p for p in module.parameters() if p.requires_grad]
    frozen = [p for p in module.parameters() if not p.requires_grad]
    assert (said.trained, said.frozen) == (sum(p.numel() for p in trained), sum(p.numel() for p in frozen))
    assert said.frozen_bytes == sum(p.numel() * p.element_size() for p in frozen)
    assert said.state_bytes == 2 * said.trained_bytes == 8 * said.trained  # AdamW's two moments


def test_a_checkpoint_is_as_large_as_it_says(tiny: Tiny, tmp_path: Path) -> None:
    module, data = built(arguments(tiny("bert_base"), "--model.prompt_encoder.init_args.hidden_dim=2048"))
    said = sizes(module, BATCH, TOKENS).checkpoint_bytes
    trainer(tmp_path, max_steps=1).fit(module, data)
    assert (tmp_path / "last.ckpt").stat().st_size == pytest.approx(said, rel=0.15)


FOUND = Sizes(
    trained=100,
    frozen=1000,
    trained_bytes=400,
    frozen_bytes=2000,
    around_bytes=500,
    layer_bytes=150,
    state_bytes=800,
    kept_bytes=10_000,
    flops=1,
    batch=(1, 1),
)


@pytest.mark.parametrize(
    ("strategy", "devices", "memory", "sent"),
    [
        ("single", 1, 2000 + 400 + 400 + 800 + 10_000, 0),
        ("ddp", 4, 2000 + 400 + 400 + 400 + 800 + 10_000, 2 * 400 * 3 // 4),
        ("fsdp", 4, (2000 + 400 + 400 + 800) // 4 + 500 + 300 + 800 + 10_000, (800 + 2 * 2000 - 500) * 3 // 4),
    ],
)
def test_memory_and_bytes_sent_by_strategy(strategy: str, devices: int, memory: int, sent: int) -> None:
    assert FOUND.memory(strategy, devices) == memory
    assert FOUND.sent(strategy, devices) == sent
    assert FOUND.checkpoint_bytes == 1200


def test_the_command_line(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", *arguments(tiny("bert_base")), "--devices=16", "--tokens=20", "--trainer.accelerator=gpu"])
    shown = capsys.readouterr().out
    frozen = sum(p.numel() for p in AutoModel.from_pretrained(tiny("bert_base"), add_pooling_layer=False).parameters())
    assert f"frozen        {frozen:,} parameters, {4 * frozen / 1024:.1f} KiB" in shown
    assert "32 examples of 20 tokens on each device" in shown
    assert [line.split()[:2] for line in shown.splitlines() if line.split()[:1] in (["single"], ["ddp"], ["fsdp"])] == [
        ["single", "1"],
        ["ddp", "16"],
        ["fsdp", "16"],
    ]
    assert "not measured" in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--devices=0"], "--devices and --tokens must be at least 1"), (["--modle.x=1"], "Did you mean model?")],
)
def test_wrong_input_ends_in_a_line(
    tiny: Tiny, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["plan", *arguments(tiny("bert_base")), *options])
    assert stop.value.code != 0
    assert message in capsys.readouterr().err

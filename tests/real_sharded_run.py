"""SmolLM2 under FSDP2, one process of two: its loss after a few steps, and the memory that loading it took."""

from __future__ import annotations

import functools
import threading
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything

from lopa_lightning import ClassificationModule, PretrainedSpec, PromptTuning
from lopa_lightning.strategies import FSDP2Strategy
from tests.modules.helpers import reviews

ROWS = 8


def resident() -> int:
    """This process's own memory in bytes, without mapped files: those are the system's cache."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("R"))
    return int(lines["RssAnon"].split()[0]) * 1024


class Peak:
    """The most memory that a block takes, over what there was before."""

    def __enter__(self) -> Peak:
        self.before, self.most, self.over = resident(), 0, False
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.over:
            self.most = max(self.most, resident() - self.before)
            time.sleep(0.002)

    def __exit__(self, *_: object) -> None:
        self.over = True
        self.thread.join()


class Watched(ClassificationModule):
    """Notes what loading took."""

    loading = 0
    held = 0

    def configure_model(self) -> None:
        if self.net is None:
            with Peak() as peak:
                super().configure_model()
            self.loading = peak.most
            self.held = resident() - peak.before


def fit(model: str, folder: Path, **options: Any) -> dict[str, float]:
    """Two steps on the same four rows each, whatever the number of processes, and the loss after them."""
    seed_everything(3)
    module = Watched(
        backbone=PretrainedSpec(model, dtype="float32"),
        prompt_encoder=functools.partial(PromptTuning, num_virtual_tokens=5),
        objective="causal_lm",
        optimizer=functools.partial(torch.optim.AdamW, lr=1e-2),
    )
    data = reviews(folder, rows=ROWS, batch_size=4 // options.get("devices", 1), eval_batch_size=8)
    run = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **{"devices": 1, **options},
    )
    run.fit(module, data)
    numbers = sum(p.numel() for p in module.net.backbone.parameters())
    root = sum(p.numel() for name, p in module.net.backbone.named_parameters() if ".layers." not in name)
    return {
        "loss": float(run.callback_metrics["val/loss"]),
        "loading": module.loading,
        "held": module.held,
        "model": 4 * numbers,
        "around": 4 * root,
    }


def fit_on_two(model: str, folder: Path) -> None:
    """The same under FSDP2, with a result for each process."""
    result = fit(model, folder, devices=2, strategy=FSDP2Strategy())
    torch.save(result, folder / f"rank{torch.distributed.get_rank()}.pt")

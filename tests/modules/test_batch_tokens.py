"""Batches of so many tokens: what they weigh in a step, how many there are, and what is said of their padding."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.nn import functional as F

from lopa_lightning.callbacks import PromptMonitor
from lopa_lightning.errors import LoPAError
from tests.modules.helpers import LoPATiny, causal, completions, module, reviews, trainer

Tiny = Callable[[str], str]

Plain = functools.partial(LoPATiny, dropout=0.0)


class Steps(Callback):
    """The batches."""

    def __init__(self) -> None:
        self.batches: list[dict[str, torch.Tensor]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch)


def test_a_completion_batch_weighs_by_its_examples(tiny: Tiny, tmp_path: Path) -> None:
    model, steps = causal(tiny("llama"), prompt_encoder=Plain), Steps()
    data = completions(tmp_path, batch_tokens=60)
    run = trainer(tmp_path, callbacks=[steps], limit_val_batches=0)
    run.fit(model, data)
    sizes = [len(batch["index"]) for batch in steps.batches]
    assert len(set(sizes)) > 1
    assert [float(batch["weight"]) for batch in steps.batches] == pytest.approx(
        [size * len(sizes) / sum(sizes) for size in sizes]
    )
    assert run.estimated_stepping_batches == len(sizes) == len(data.train_dataloader())


def test_the_budget_counts_virtual_tokens_and_holds_in_evaluation(tiny: Tiny, tmp_path: Path) -> None:
    model, data = module(tiny("bert_base"), objective="head", prompt_encoder=Plain), reviews(tmp_path, batch_tokens=70)
    data.connect(model.input_spec)
    data.setup("fit")
    for loader in (data.train_dataloader(), *data.val_dataloader()):
        places = [batch["input_ids"].shape[0] * (batch["input_ids"].shape[1] + 3) for batch in loader]
        assert max(places) <= 70 < 2 * max(places)
    longest = max(data.datasets["train"][0]["length"][:]) + 3
    data.batch_tokens = longest - 1
    with pytest.raises(LoPAError, match=f"batch_tokens is {longest - 1}, and one of the examples has {longest} tokens"):
        data.train_dataloader()


@pytest.mark.parametrize("size", [{"batch_size": 4}, {"batch_tokens": 100}])
def test_the_share_of_padding_is_logged_after_every_epoch(tiny: Tiny, tmp_path: Path, size: dict[str, int]) -> None:
    model, steps = module(tiny("bert_base"), objective="head", prompt_encoder=Plain), Steps()
    run = trainer(tmp_path, callbacks=[steps, PromptMonitor()], limit_val_batches=0)
    run.fit(model, reviews(tmp_path, rows=23, **size))
    masks = [F.pad(batch["attention_mask"], (3, 0), value=1) for batch in steps.batches]
    padding = sum(int((mask == 0).sum()) for mask in masks) / sum(mask.numel() for mask in masks)
    assert float(run.callback_metrics["train/padding"]) == pytest.approx(padding) != 0

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
    """The batches, and the gradient of the last step."""

    def __init__(self) -> None:
        self.batches: list[dict[str, torch.Tensor]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.gradient = {name: p.grad.clone() for name, p in pl_module.named_parameters() if p.grad is not None}


def rows_of(batch: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Each row as a batch of its own."""
    return [
        {key: values[row : row + 1] for key, values in batch.items() if values.dim()}
        for row in range(len(batch["index"]))
    ]


def test_each_example_counts_alike_whatever_batch_it_is_in(tiny: Tiny, tmp_path: Path) -> None:
    model, steps = module(tiny("bert_base"), objective="head", prompt_encoder=Plain), Steps()
    data = reviews(tmp_path, rows=23, batch_tokens=100)
    model.make_optimizer = functools.partial(torch.optim.SGD, lr=0.0)
    trainer(tmp_path, callbacks=[steps], accumulate_grad_batches=99, limit_val_batches=0).fit(model, data)
    rows = [row for batch in steps.batches for row in rows_of(batch)]
    assert sorted(int(row["index"]) for row in rows) == list(range(23))
    assert len({len(batch["index"]) for batch in steps.batches}) > 1
    # Lightning divides by the batches of a step.
    expected = sum(F.cross_entropy(model(row), row["labels"]) for row in rows) / 23 * len(steps.batches) / 99
    model.zero_grad()
    expected.backward()  # type: ignore[union-attr]
    for name, gradient in steps.gradient.items():
        torch.testing.assert_close(gradient, dict(model.named_parameters())[name].grad, rtol=1e-4, atol=1e-7)


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
    data.connect(model.text_spec)
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

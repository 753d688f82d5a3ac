"""Accumulated batches are one large batch: of every task, by rows and by tokens, also at an epoch's end."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional as F

from lopa_lightning import CausalLMModule, TextClassificationDataModule
from lopa_lightning.data.loader import ResumableLoader
from lopa_lightning.data.sampler import LengthGroupedSampler
from lopa_lightning.modules.window import Window
from tests.modules.helpers import LoPATiny, causal, completions, module, reviews, trainer

Tiny = Callable[[str], str]
Batch = dict[str, Tensor]
Gradient = dict[str, Tensor]

ROWS = 23
UNEQUAL = [
    {"prompt": f"the film {'was ' * (i % 4)}", "completion": "terrible , badly told " * (1 + i % 3)}
    for i in range(ROWS)
]
OPTIONS: dict[str, Any] = {
    "prompt_encoder": functools.partial(LoPATiny, dropout=0.0),
    "optimizer": functools.partial(torch.optim.SGD, lr=0.0),
}
SIZES: list[dict[str, int]] = [{"batch_size": 3}, {"batch_tokens": 64}]


class Windows(Callback):
    """The batches of each optimizer step, and the gradient that it takes."""

    def __init__(self) -> None:
        self.batches: list[list[Batch]] = [[]]
        self.gradients: list[Gradient] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Batch, batch_idx: int) -> None:
        self.batches[-1].append(batch)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.gradients.append(gradient(pl_module))
        self.batches.append([])


def gradient(model: Any) -> Gradient:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def regression(folder: Path, **size: int) -> TextClassificationDataModule:
    rows = [{"text": f"the film was {'very ' * (i % 5)}good", "label": i * 0.1} for i in range(ROWS)]
    files = {split: str(folder / f"{split}.jsonl") for split in ("train", "validation")}
    for path in files.values():
        Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TextClassificationDataModule(data_files=dict(files), labels=[], **size)


def made(task: str, tiny: Tiny, folder: Path, size: dict[str, int]) -> tuple[Any, Any]:
    if task == "completion":
        return causal(tiny("llama"), **OPTIONS), completions(folder, UNEQUAL, **size)
    data = regression(folder, **size) if task == "regression" else reviews(folder, rows=ROWS, **size)
    return module(tiny("bert_base"), objective="head", **OPTIONS), data


def rows_of(batch: Batch) -> list[Batch]:
    """Each row as a batch of its own."""
    return [
        {key: values[row : row + 1] for key, values in batch.items() if values.dim()}
        for row in range(len(batch["index"]))
    ]


def as_one_batch(model: Any, rows: list[Batch]) -> Gradient:
    """Gradient of the mean over all examples, or labelled tokens, each computed in a batch of its own."""
    model.zero_grad()
    total, count = torch.tensor(0.0), torch.tensor(0)
    for row in rows:
        outputs = model(row)
        if isinstance(model, CausalLMModule):
            total, count = total + outputs[:, 0].sum(), count + (row["labels"] >= 0).sum()
        elif model.task.is_regression:
            total, count = total + (outputs[0, 0] - row["labels"][0]) ** 2, count + 1
        else:
            total, count = total + F.cross_entropy(outputs, row["labels"]), count + 1
    (total / count).backward()
    return gradient(model)


# A window is the same of whatever task where it is longer than an epoch.
@pytest.mark.sampled(3)
@pytest.mark.parametrize("size", SIZES, ids=["rows", "tokens"])
@pytest.mark.parametrize(
    ("task", "accumulated"),
    [("classification", 3), ("regression", 3), ("completion", 3), ("completion", 99)],
)
def test_accumulated_batches_are_one_large_batch(
    tiny: Tiny, tmp_path: Path, task: str, size: dict[str, int], accumulated: int
) -> None:
    windows = Windows()
    model, data = made(task, tiny, tmp_path, size)
    run = trainer(tmp_path, callbacks=[windows], accumulate_grad_batches=accumulated, limit_val_batches=0)
    run.fit(model, data)
    steps = [[row for batch in step for row in rows_of(batch)] for step in windows.batches[:-1]]
    assert sum(map(len, steps)) == ROWS
    assert len(windows.batches[-2]) < accumulated  # the last window of the epoch is not full
    model.train()
    for step, found in zip(steps, windows.gradients, strict=True):
        # By tokens, steps are of unlike size, and each counts by its examples: every example has one weight.
        share = len(step) / (ROWS / len(steps)) if "batch_tokens" in size else 1.0
        for name, value in as_one_batch(model, step).items():
            torch.testing.assert_close(found[name], value * share, rtol=1e-5, atol=1e-6)


def test_batches_of_one_size_are_left_as_they_are(tiny: Tiny, tmp_path: Path) -> None:
    """Bit for bit: neither the loss nor the gradient is multiplied by anything."""
    windows = Windows()
    model = module(tiny("bert_base"), objective="head", **OPTIONS)
    run = trainer(tmp_path, callbacks=[windows], accumulate_grad_batches=2, limit_val_batches=0)
    run.fit(model, reviews(tmp_path, rows=16))
    model.train()
    for step, found in zip(windows.batches, windows.gradients):
        model.zero_grad()
        for batch in step:
            (model.loss(model(batch), batch) / 2).backward()
        assert all(torch.equal(found[name], value) for name, value in gradient(model).items())


class Texts:
    """Rows of no content."""

    def __getitem__(self, rows: list[int]) -> Batch:
        return {"index": torch.tensor(rows), "attention_mask": torch.ones(len(rows), 1)}


@pytest.mark.parametrize("limit", [1.0, 8])
@pytest.mark.parametrize(("accumulated", "resumed"), [(1, False), (1, True), (3, False), (3, True), (99, False)])
def test_by_tokens_each_example_has_one_weight_in_an_epoch(accumulated: int, limit: int | float, resumed: bool) -> None:
    """The gradient by an example's own loss, over all steps: steps by examples, of as much of the epoch as is used."""

    def loader() -> ResumableLoader:
        return ResumableLoader(
            Texts(), LengthGroupedSampler([1 + i % 13 for i in range(60)], batch_tokens=40), share=limit
        )

    first, losses, seen = loader(), nn.Parameter(torch.zeros(60)), []
    batches = len(first) if limit == 1.0 else int(limit)
    run: Any = SimpleNamespace(accumulate_grad_batches=accumulated, num_training_batches=batches, world_size=1)
    window, rest, total = Window(), iter(first), torch.zeros(60)
    for batch_idx in range(batches):
        if resumed and batch_idx == 3:
            window, again = Window(), loader()
            again.load_state_dict(first.state_dict())
            rest = iter(again)
        batch, run.is_last_batch = next(rest), batch_idx + 1 == batches
        seen.append(batch["index"])
        size = len(batch["index"])
        loss = window.add(losses[batch["index"]].mean(), size, float(size), batch, batch_idx, run)
        (loss / accumulated).backward()  # Lightning divides
        window.end([losses], run)
        if not window.batches:
            assert losses.grad is not None
            total, losses.grad = total + losses.grad, None
    assert len({len(rows) for rows in seen}) > 1
    steps = -(-batches // accumulated)
    weights = total[torch.cat(seen)]
    torch.testing.assert_close(weights, torch.full_like(weights, steps * len(first) / batches / 60))

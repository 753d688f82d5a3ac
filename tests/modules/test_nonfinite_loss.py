"""A training loss that is NaN or infinite: the run stops with step and rows, or the step is skipped and counted."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lopa_lightning import ClassificationModule, PretrainedSpec
from lopa_lightning.errors import LoPAError
from lopa_lightning.modules.nonfinite_loss import LossGuard
from tests.modules.helpers import LoPATiny, reviews, trainer

Tiny = Callable[[str], str]

SPOILT = 3  # the step


class Spoilt(ClassificationModule):
    """Divides by zero at one step."""

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        loss = super().loss(outputs, batch)
        spoilt = self.training and self.global_step == SPOILT and not self.window.batches
        return loss * float("nan") if spoilt else loss


class Values(Callback):
    """What is trained before each step, and the rows of each batch."""

    def __init__(self) -> None:
        self.before: list[dict[str, Tensor]] = []
        self.rows: list[list[int]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.before.append({name: value.clone() for name, value in pl_module.state_dict().items()})
        self.rows.append(batch["index"].tolist())


def spoilt(tiny: Tiny, **kwargs: Any) -> Spoilt:
    optimizer = functools.partial(torch.optim.AdamW, lr=1e-2)
    spec = PretrainedSpec(tiny("bert_base"))
    return Spoilt(backbone=spec, objective="head", prompt_encoder=LoPATiny, optimizer=optimizer, **kwargs)


def test_it_stops_the_run_with_step_and_rows(tiny: Tiny, tmp_path: Path) -> None:
    values = Values()
    run = trainer(tmp_path, callbacks=[values], enable_checkpointing=False)
    with pytest.raises(LoPAError, match="the training loss is nan") as error:
        run.fit(spoilt(tiny), reviews(tmp_path))
    rows = ", ".join(map(str, values.rows[SPOILT]))
    assert f"at step {SPOILT} (epoch 0, batch {SPOILT}), rows {rows};" in str(error.value)
    assert run.global_step == SPOILT


def test_it_is_skipped_and_counted(tiny: Tiny, tmp_path: Path) -> None:
    values, model = Values(), spoilt(tiny, nonfinite_loss="skip")
    run = trainer(tmp_path, callbacks=[values], enable_checkpointing=False)
    with pytest.warns(UserWarning, match=rf"nan at step {SPOILT} .*: the step is skipped"):
        run.fit(model, reviews(tmp_path))
    same = [
        all(torch.equal(value, after[name]) for name, value in before.items())
        for before, after in zip(values.before, values.before[1:])
    ]
    assert same == [step == SPOILT for step in range(len(same))]
    assert run.callback_metrics["train/skipped_steps"] == 1
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


def test_a_step_is_skipped_with_all_batches_that_it_accumulates(tiny: Tiny, tmp_path: Path) -> None:
    """The loss of its first batch is NaN; what comes after it is a step like any."""
    values, model = Values(), spoilt(tiny, nonfinite_loss="skip")
    run = trainer(tmp_path, callbacks=[values], enable_checkpointing=False, accumulate_grad_batches=2)
    with pytest.warns(UserWarning, match="the step is skipped, with all batches that it accumulates"):
        run.fit(model, reviews(tmp_path, rows=40))
    same = [
        all(torch.equal(value, after[name]) for name, value in before.items())
        for before, after in zip(values.before[::2], values.before[2::2])
    ]
    assert same == [step == SPOILT for step in range(len(same))]
    again = trainer(tmp_path, enable_checkpointing=False, callbacks=[])
    again.fit(model, reviews(tmp_path))
    assert [each.callback_metrics["train/skipped_steps"] for each in (run, again)] == [1, 1]  # of its run


def test_what_another_process_skips_is_skipped_here() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    elsewhere = SimpleNamespace(reduce=lambda tensor, reduce_op: tensor + 1)
    run = SimpleNamespace(strategy=elsewhere, global_step=7, current_epoch=1)
    guard = LossGuard("skip")
    with pytest.warns(UserWarning, match="NaN or infinite on another process at step 7"):
        guard.look_at(torch.tensor(0.5), {"index": torch.tensor([1])}, 2, run)
    assert guard.drop_step(optimizer)
    optimizer.step()
    assert weight.tolist() == [1.0, 1.0]
    assert not guard.drop_step(optimizer)


def test_another_choice_is_refused(tiny: Tiny) -> None:
    with pytest.raises(LoPAError, match="nonfinite_loss must be one of stop, skip, got 'ignore'"):
        spoilt(tiny, nonfinite_loss="ignore")

"""Rows with their vectors, and the runs that gain by them."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from lightning.pytorch.trainer.states import TrainerFn

from lopa_lightning.data.collate import Collate
from lopa_lightning.data.instance_vectors import WithVectors, reads_all
from lopa_lightning.instances.vectors import StoredVectors


@pytest.mark.parametrize(
    ("limits", "share"),
    [
        ({}, 1),
        ({"max_epochs": 3}, 3),
        ({"limit": 25}, 0.5),  # batches of 2 on each of 2 processes, of 200 rows
        ({"limit": 25, "max_epochs": 3}, 1.5),
        ({"limit": 60, "max_epochs": 3}, 3),  # there are no more than 50
        ({"limit": 0.5}, 0.5),
        ({"limit": 0.5, "max_epochs": 2}, 1),
        ({"limit": 0, "max_epochs": -1}, 0),
        ({"max_epochs": None}, math.inf),
        ({"max_epochs": -1, "max_steps": 49}, 0.98),
        ({"max_epochs": -1, "max_steps": 25, "accumulate_grad_batches": 2}, 1),
    ],
)
def test_a_run_reads_all_rows_if_its_epochs_together_do(limits: dict[str, Any], share: float) -> None:
    options = {"limit": 1.0, "max_epochs": 1, "max_steps": -1, "accumulate_grad_batches": 1, **limits}
    state = SimpleNamespace(fn=TrainerFn.FITTING)
    trainer: Any = SimpleNamespace(state=state, world_size=2, limit_train_batches=options.pop("limit"), **options)
    assert reads_all(trainer, "train", batch_size=2, rows=200) == (share >= 1)


@pytest.mark.parametrize(("role", "stage"), [("val", "validate"), ("test", "test"), ("predict", "predict")])
def test_rows_that_are_not_trained_on_are_read_once(role: str, stage: str) -> None:
    for limit, wanted in ((1.0, True), (0.9, False), (2, False), (3, True)):
        options = {f"limit_{role}_batches": limit, "state": SimpleNamespace(fn=TrainerFn(stage))}
        trainer: Any = SimpleNamespace(world_size=1, max_epochs=9, **options)
        assert reads_all(trainer, role, batch_size=2, rows=5) == wanted


def test_a_row_has_its_vector_in_place_of_the_encoder_tokens(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.float32).reshape(4, 3)
    np.save(tmp_path / "x.npy", values)
    columns = {"input_ids": [[1], [2], [3, 4], [5]], "instance_input_ids": [[7]] * 4, "index": [0, 2, 5, 6]}
    data = WithVectors(Dataset.from_dict(columns), StoredVectors(tmp_path / "x.npy"))
    assert len(data) == 4
    batch = Collate(pad_id=0)(data.__getitems__([2, 0, 2]))
    assert set(batch) == {"input_ids", "attention_mask", "index", "instance"}
    assert batch["index"].tolist() == [5, 0, 5]
    assert torch.equal(batch["instance"], torch.from_numpy(values[[2, 0, 2]]))

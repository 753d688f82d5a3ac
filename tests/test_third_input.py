"""A third kind of input, vectors of numbers: all that it takes is a backbone, a kind and a data module."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset, DatasetDict
from torch import Tensor

from lopa_lightning import ClassificationModule, LoPALightningModule, PretrainedSpec
from lopa_lightning.backbones.base import Backbone, InputKind, States
from lopa_lightning.cli import main
from lopa_lightning.data.splits import SplitsDataModule
from lopa_lightning.task import Task

TASK = """
model:
  class_path: {here}.NumbersModule
  init_args:
    objective: head
    backbone: {{name: {backbone}}}
    instance_encoder: {{cache: false}}
    optimizer: {{class_path: torch.optim.AdamW, init_args: {{lr: 0.01}}}}
data: {{class_path: {here}.NumbersDataModule}}
trainer: {{max_epochs: 4, accelerator: cpu, devices: 1, enable_progress_bar: false}}
"""


def embed(model: Any, numbers: Tensor) -> Tensor:
    return numbers.unsqueeze(-1) * model.get_input_embeddings().weight[: numbers.shape[1]].detach() * 10


class NumbersBackbone(Backbone):
    """Each of 6 numbers is a token: a fixed direction, times the number."""

    input_keys = ("numbers",)

    @property
    def prompt_dim(self) -> int:
        return int(self.model.config.hidden_size)

    def forward(self, prompt: Tensor, batch: Mapping[str, Tensor], offset: Tensor | None = None) -> States:
        numbers, m = batch["numbers"], prompt.shape[1]
        embedded = torch.cat([prompt.expand(len(numbers), -1, -1), embed(self.model, numbers)], dim=1)
        mask = torch.cat([numbers.new_zeros(len(numbers), m), torch.ones_like(numbers)], dim=1).long()
        positions = torch.arange(m, mask.shape[1]).expand(len(numbers), -1)
        return States(self.body(inputs_embeds=embedded).last_hidden_state, mask, positions)


class NumbersKind(InputKind):
    def backbone(self, model: Any, **settings: Any) -> NumbersBackbone:
        return NumbersBackbone(model)

    def instance_states(self, model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        numbers = batch["numbers"]
        return model(inputs_embeds=embed(model, numbers)).last_hidden_state, torch.ones_like(numbers).long()


class NumbersModule(ClassificationModule):
    def input_kind(self, backbone: PretrainedSpec) -> NumbersKind:
        return NumbersKind(backbone, self.objective)


class NumbersDataModule(SplitsDataModule):
    """Is the sum of the numbers positive?"""

    task = Task(["negative", "positive"])

    def load(self) -> DatasetDict:
        numbers = np.random.default_rng(0).normal(size=(160, 6))
        columns = {
            "numbers": numbers.tolist(),
            "labels": (numbers.sum(1) > 0).astype(int).tolist(),
            "index": range(160),
        }
        parts = Dataset.from_dict(columns).train_test_split(40, seed=0)
        return DatasetDict({**parts, "validation": parts["test"]})

    def encode(self, data: Dataset, split: str, role: str) -> Dataset:
        return data

    def collate(self) -> Callable[[pa.Table], dict[str, Tensor]]:
        return lambda table: {name: torch.tensor(table[name].to_pylist()) for name in table.column_names}


@pytest.mark.usefixtures("in_forks")
def test_it_trains_saves_resumes_predicts_and_is_compared(tiny: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    Path("task.yaml").write_text(TASK.format(here=__name__, backbone=tiny("bert_base")))
    for name, method in (("lopa", "LoPA"), ("tuning", "PromptTuning")):
        arguments = {"class_path": f"lopa_lightning.{method}", "init_args": {"num_virtual_tokens": 3, "init": "normal"}}
        Path(f"{name}.yaml").write_text(json.dumps({"model": {"prompt_encoder": arguments}}))
    config = ["--config", "task.yaml", "--config", "lopa.yaml"]

    main(["fit", *config])
    main(["fit", *config, "--trainer.max_epochs", "2"])
    half = "runs/lopa/version_1/checkpoints/last.ckpt"
    main(["fit", *config, "--ckpt_path", half])
    whole, resumed = (LoPALightningModule.load_from_checkpoint(Path(half.replace("_1", i))) for i in ("_0", "_2"))
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value)
    main(["predict", *config, "--ckpt_path", half.replace("_1", "_2"), "--predictions.folder", "out"])
    assert len(Path("out/predictions.jsonl").read_text().splitlines()) == 40

    lists = "--tasks", '["task.yaml"]', "--methods", '["lopa.yaml", "tuning.yaml"]', "--seeds", "[1]"
    main(["compare", *lists, "--output", "compared"])
    with open("compared/comparison.csv") as file:
        scores = {row["method"]: float(row["score"]) for row in csv.DictReader(file)}
    assert min(scores["lopa"], scores["tuning"]) > 0.55

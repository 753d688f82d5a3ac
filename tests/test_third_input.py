"""A third kind of input, vectors of numbers: all that it takes is a backbone, a kind and a data module."""

from __future__ import annotations

import csv
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor, nn

from lopa_lightning import ClassificationModule, InstanceEncoderSpec, LoPA, LoPALightningModule, PretrainedSpec
from lopa_lightning.__main__ import main
from lopa_lightning.backbones.base import Backbone, InputKind, InputSpec, States
from lopa_lightning.backbones.transformer_layers import transformer_layers
from lopa_lightning.data.splits import SplitsDataModule
from lopa_lightning.task import TextTask


class NumbersBackbone(Backbone):
    """Each of 6 numbers is a token: a fixed direction, times the number."""

    input_keys = ("numbers",)

    def __init__(self, model: Any, placement: str) -> None:
        super().__init__()
        self.model, self.placement = model, placement

    @property
    def prompt_dim(self) -> int:
        return int(self.model.config.hidden_size)

    hidden_dim = prompt_dim

    def forward(self, prompt: Tensor, batch: Mapping[str, Tensor], offset: Tensor | None = None) -> States:
        numbers, m = batch["numbers"], prompt.shape[1]
        embedded = torch.cat([prompt.expand(len(numbers), -1, -1), embed(self.model, numbers)], dim=1)
        mask = torch.cat([numbers.new_zeros(len(numbers), m), torch.ones_like(numbers)], dim=1).long()
        positions = torch.arange(m, mask.shape[1]).expand(len(numbers), -1)
        return States(self.body(inputs_embeds=embedded).last_hidden_state, mask, positions)

    def layers(self) -> list[nn.Module]:
        return transformer_layers(self.body)

    def count_tokens(self, batch: Mapping[str, Tensor]) -> int:
        return batch["numbers"].numel()


def embed(model: Any, numbers: Tensor) -> Tensor:
    return numbers.unsqueeze(-1) * model.get_input_embeddings().weight[: numbers.shape[1]].detach() * 10


class NumbersKind(InputKind):
    def backbone(self, model: Any, *, placement: str = "before", **settings: Any) -> NumbersBackbone:
        return NumbersBackbone(model, placement)

    def input_spec(self, backbone: Backbone, num_virtual_tokens: int, encoder: Any, vectors: Any) -> InputSpec:
        return InputSpec(virtual_tokens=num_virtual_tokens)

    def instance_states(self, model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        numbers = batch["numbers"]
        return model(inputs_embeds=embed(model, numbers)).last_hidden_state, torch.ones_like(numbers).long()


class NumbersModule(ClassificationModule):
    def input_kind(self, backbone: PretrainedSpec) -> NumbersKind:
        return NumbersKind(backbone, self.objective)


class NumbersDataModule(SplitsDataModule):
    """Is the sum of the numbers positive?"""

    task = TextTask(["negative", "positive"])

    def load(self) -> DatasetDict:
        numbers = np.random.default_rng(0).normal(size=(160, 6))
        data = Dataset.from_dict({"numbers": numbers.tolist(), "labels": (numbers.sum(1) > 0).astype(int).tolist()})
        return DatasetDict(data.add_column("index", range(160)).train_test_split(40, seed=0))

    def splits_of(self, role: str) -> list[str]:
        return ["train" if role == "train" else "test"]

    def encode(self, data: Dataset, split: str, role: str) -> Dataset:
        return data

    def collate(self) -> Callable[[pa.Table], dict[str, Tensor]]:
        return lambda table: {name: torch.tensor(table[name].to_pylist()) for name in table.column_names}


def numbers_module(folder: str) -> NumbersModule:
    method = functools.partial(LoPA, num_virtual_tokens=3, rank=2, hidden_dim=16, init="normal")
    options: dict[str, Any] = {"objective": "head", "optimizer": functools.partial(torch.optim.AdamW, lr=1e-2)}
    encoder = InstanceEncoderSpec("backbone")
    return NumbersModule(backbone=PretrainedSpec(folder), prompt_encoder=method, instance_encoder=encoder, **options)


def trainer(folder: Path, epochs: int) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(max_epochs=epochs, accelerator="cpu", default_root_dir=folder, **quiet)


def test_it_trains_saves_resumes_and_predicts(tiny: Callable[[str], str], tmp_path: Path) -> None:
    folder = tiny("bert_base")
    seed_everything(0, verbose=False)
    whole = numbers_module(folder)
    run = trainer(tmp_path / "whole", 4)
    run.fit(whole, datamodule=NumbersDataModule())
    assert run.callback_metrics["val/accuracy"] > run.callback_metrics["val/majority_share"] + 0.1

    seed_everything(0, verbose=False)
    half = trainer(tmp_path / "half", 2)
    half.fit(numbers_module(folder), datamodule=NumbersDataModule())
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed = numbers_module(folder)
    trainer(tmp_path / "half", 4).fit(resumed, datamodule=NumbersDataModule(), ckpt_path=tmp_path / "half.ckpt")
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value)

    resumed.trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = LoPALightningModule.load_from_checkpoint(tmp_path / "last.ckpt")
    predicted = trainer(tmp_path, 1).predict(loaded, datamodule=NumbersDataModule())
    rows = [row for batch in predicted or [] for row in loaded.prediction_rows(batch)]
    assert len(rows) == 40
    assert {row["label"] for row in rows} == {"negative", "positive"}


def test_it_is_compared(tiny: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = {"objective": "head", "backbone": {"name": tiny("bert_base")}}
    task = {
        "model": {"class_path": f"{__name__}.NumbersModule", "init_args": arguments},
        "data": {"class_path": f"{__name__}.NumbersDataModule"},
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "devices": 1},
    }
    Path("numbers.yaml").write_text(yaml.safe_dump(task))
    for name, method in (("lopa", "LoPA"), ("tuning", "PromptTuning")):
        arguments = {"class_path": f"lopa_lightning.{method}", "init_args": {"num_virtual_tokens": 3, "init": "normal"}}
        Path(f"{name}.yaml").write_text(yaml.safe_dump({"model": {"prompt_encoder": arguments}}))
    comparison = {"tasks": ["numbers.yaml"], "methods": ["lopa.yaml", "tuning.yaml"], "seeds": [1], "output": "out"}
    Path("comparison.yaml").write_text(yaml.safe_dump(comparison))
    monkeypatch.setattr("sys.argv", ["lopa", "compare", "--config", "comparison.yaml"])
    main()
    with open("out/comparison.csv") as file:
        found = list(csv.DictReader(file))
    assert sorted(row["method"] for row in found) == ["lopa", "tuning"], found
    assert all(0 <= float(row["score"]) <= 1 for row in found)

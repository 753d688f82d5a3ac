"""What the tests of modules share: a tiny module, its data, and a quiet Trainer."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lopa_lightning import (
    CausalLMModule,
    ClassificationModule,
    CompletionDataModule,
    InstanceEncoderSpec,
    LoPA,
    PretrainedSpec,
    TextClassificationDataModule,
)
from lopa_lightning.files import write_whole

WORDS = {"good": ["great", "good", "better"], "bad": ["terrible", "bad", "badly"]}
TEMPLATE = ("{text} . It was {mask} .",)
LoPATiny = functools.partial(LoPA, num_virtual_tokens=3, rank=2, hidden_dim=8)

COMPLETIONS = [
    {"prompt": f"the film {'was ' * (i % 4)}", "completion": ("great", "terrible , badly told", "it was")[i % 3]}
    for i in range(21)
]


def write_once(path: Path, text: str) -> str:
    """Writes a file, unless it holds that already: what ``datasets`` has made of it is then found again."""
    if not path.is_file() or path.read_text() != text:
        write_whole(path, text)
    return str(path)


def write_reviews(path: Path, rows: int) -> str:
    """Writes a CSV in which a word of the text decides the label."""
    lines = ["text,label"]
    for i in range(rows):
        label = ("good", "bad")[i % 2]
        word = WORDS[label][i % 3]
        lines.append(f"the film {'was ' * (i % 5)}{word} and the cast {'the ' * (i % 3)}half,{label}")
    return write_once(path, "\n".join(lines) + "\n")


def reviews(folder: Path, rows: int = 20, **kwargs: Any) -> TextClassificationDataModule:
    files = {split: write_reviews(folder / f"{split}.csv", rows) for split in ("train", "validation", "test")}
    options: dict[str, Any] = {"batch_size": 4, "template": TEMPLATE, "words": ["great", "terrible"], **kwargs}
    return TextClassificationDataModule(data_files=dict(files), labels=["good", "bad"], **options)


def module(model: str, **kwargs: Any) -> ClassificationModule:
    options: dict[str, Any] = {
        "objective": "masked_lm",
        "prompt_encoder": LoPATiny,
        "optimizer": functools.partial(torch.optim.AdamW, lr=1e-2),
        **kwargs,
    }
    return ClassificationModule(backbone=PretrainedSpec(model), **options)


def with_own_encoder(model: str, **kwargs: Any) -> InstanceEncoderSpec:
    return InstanceEncoderSpec(model, **kwargs)


def trainer(folder: Path, epochs: int = 1, **kwargs: Any) -> Trainer:
    best = ModelCheckpoint(folder, filename="best", monitor="val/score", mode="max")
    last = ModelCheckpoint(folder, filename="last", enable_version_counter=False, save_on_train_epoch_end=True)
    options: dict[str, Any] = {
        "max_epochs": epochs,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "callbacks": [best, last],
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
        **kwargs,
    }
    return Trainer(**options)


def completions(folder: Path, rows: list[dict[str, Any]] = COMPLETIONS, **kwargs: Any) -> CompletionDataModule:
    folder.mkdir(exist_ok=True)
    files: Any = {}
    for split in ("train", "validation", "test"):
        files[split] = write_once(folder / f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return CompletionDataModule(data_files=files, **{"batch_size": 4, **kwargs})


def causal(model: str, **kwargs: Any) -> CausalLMModule:
    options: dict[str, Any] = {
        "prompt_encoder": LoPATiny,
        "optimizer": functools.partial(torch.optim.AdamW, lr=1e-2),
        **kwargs,
    }
    return CausalLMModule(backbone=PretrainedSpec(model), **options)

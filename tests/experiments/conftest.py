from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.modules.helpers import write_reviews

TRAINING_ROWS = 20


@pytest.fixture(scope="session", autouse=True)
def _children_have_that_cache_too(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Runs are processes: what ``datasets`` is told in this one does not reach them, the environment does."""
    os.environ["HF_DATASETS_CACHE"] = str(tmp_path_factory.mktemp("datasets_of_children"))


def write_yaml(path: Path, content: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump(content))
    return str(path)


def write_configs(folder: Path, backbone: str) -> dict[str, str]:
    """A complete config on tiny data, and overlays of methods; by name."""
    train = write_reviews(folder / "train.csv", TRAINING_ROWS)
    held_out = folder / "validation.csv"  # of one label alone, so that runs show by it what they validate on
    lines = Path(write_reviews(folder / "all.csv", 24)).read_text().splitlines()
    held_out.write_text("\n".join(lines[:1] + [line for line in lines if line.endswith(",good")]) + "\n")
    task = {
        "trainer": {"accelerator": "cpu", "max_epochs": 2, "enable_model_summary": False},
        "monitor": {"enabled": False},
        "model": {
            "class_path": "lopa_lightning.ClassificationModule",
            "init_args": {
                "objective": "head",
                "backbone": {"name": backbone},
                "instance_encoder": {"name": "backbone", "pooling": "mean"},
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01, "weight_decay": 0.0}},
                "learning_rates": {"head": 0.02},
            },
        },
        "data": {
            "class_path": "lopa_lightning.TextClassificationDataModule",
            "init_args": {
                "data_files": {"train": train, "validation": str(held_out)},
                "labels": ["good", "bad"],
                "batch_size": 4,
            },
        },
    }
    lopa = {"num_virtual_tokens": 3, "rank": 2, "hidden_dim": 8}
    methods = {
        "lopa": {"prompt_encoder": {"class_path": "lopa_lightning.LoPA", "init_args": lopa}},
        "soft": {
            "prompt_encoder": {"class_path": "lopa_lightning.PromptTuning", "init_args": {"num_virtual_tokens": 3}},
            "learning_rates": {"shared_prompt": 0.05, "head": 0.02},
        },
    }
    written = {"reviews": write_yaml(folder / "reviews.yaml", task)}
    for name, arguments in methods.items():
        written[name] = write_yaml(folder / f"{name}.yaml", {"model": {"init_args": arguments}})
    return written


@pytest.fixture(scope="session")
def configs(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[[str], str]) -> dict[str, str]:
    """Paths of ``reviews`` (complete), ``lopa`` and ``soft`` (put over it)."""
    return write_configs(tmp_path_factory.mktemp("configs"), tiny("bert_base"))

"""The cases: which frozen models, which data, which sizes. Each as a config, and built from it."""

from __future__ import annotations

import argparse
import copy
import functools
import importlib
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers.utils import logging as transformers_logging

from lopa_lightning import InstanceEncoderSpec, LoPA, LoPALightningModule, PretrainedSpec
from lopa_lightning.cli import ignore_expected_warnings
from lopa_lightning.data.text import TextDataModule
from lopa_lightning.errors import LoPAError
from tests.benchmarks.harness import use_clock

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class Places:
    """Where models and data come from: folders that hold them by hub id, or the hub.

    Attributes:
        models: Folder of models.
        data: Folder of data sets.
    """

    models: Path | None = None
    data: Path | None = None

    def model(self, name: str) -> str:
        """A model by its hub id."""
        return _place(self.models, name)

    def dataset(self, name: str) -> str:
        """A data set by its hub id."""
        return _place(self.data, name)


def _place(root: Path | None, name: str) -> str:
    if root is None:
        return name
    if not (root / name).is_dir():
        raise LoPAError(f"no {name} in {root}")
    return str((root / name).resolve())


@dataclass(frozen=True)
class Case:
    """A frozen backbone on a data set.

    Attributes:
        name: On the command line and in the table.
        backbone: Hub id.
        dataset: Hub id.
        data_class: Data module in ``lopa_lightning``.
        data_options: Its arguments beside path, sizes and batch.
        rank: Rank r of the gate.
        batch_size: Examples in a training batch.
        max_length: Tokens of a text; what a loop with fixed padding pads to.
        examples: Training examples of a round.
    """

    name: str
    backbone: str
    dataset: str
    data_class: str
    data_options: tuple[tuple[str, Any], ...]
    rank: int
    batch_size: int
    max_length: int
    examples: int
    num_virtual_tokens: int = 10

    @property
    def is_causal(self) -> bool:
        """Whether completions are learned, not labels."""
        return self.backbone == SMOLLM2

    def model_config(self, places: Places, **prompt_options: Any) -> dict[str, Any]:
        """The module as a config for the command line.

        Args:
            places: Where models are.
            **prompt_options: Of LoPA, in place of the case's.
        """
        prompt = {"num_virtual_tokens": self.num_virtual_tokens, "rank": self.rank, "hidden_dim": 256}
        arguments: dict[str, Any] = {
            "backbone": {"name": places.model(self.backbone), "dtype": "float32"},
            "instance_encoder": {"name": places.model(MINILM) if self.is_causal else "backbone", "pooling": "mean"},
            "prompt_encoder": {"class_path": "lopa_lightning.LoPA", "init_args": {**prompt, **prompt_options}},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}},
            "learning_rates": {"shared_prompt": 1e-2},
        }
        if not self.is_causal:
            arguments["objective"] = "head"
        kind = "CausalLMModule" if self.is_causal else "ClassificationModule"
        return {"class_path": f"lopa_lightning.{kind}", "init_args": arguments}

    def data_config(self, places: Places, examples: int | None) -> dict[str, Any]:
        """The data module as a config for the command line.

        Args:
            places: Where data is.
            examples: Training examples, drawn by a seed; None for all.
        """
        return {
            "class_path": f"lopa_lightning.{self.data_class}",
            "init_args": {
                **dict(self.data_options),
                "path": places.dataset(self.dataset),
                "batch_size": self.batch_size,
                "max_length": self.max_length,
                "max_train_examples": examples,
            },
        }

    def module(self, places: Places, **prompt_options: Any) -> LoPALightningModule:
        """The module, with no weights loaded yet."""
        return build_module(self.model_config(places, **prompt_options))

    def data(self, places: Places, examples: int | None) -> TextDataModule:
        """The data module."""
        return build_data(self.data_config(places, examples))


def build_module(config: dict[str, Any]) -> LoPALightningModule:
    """What a module's config stands for."""
    arguments = copy.deepcopy(config["init_args"])
    made: LoPALightningModule = _class(config["class_path"])(
        backbone=PretrainedSpec(**arguments.pop("backbone")),
        instance_encoder=InstanceEncoderSpec(**arguments.pop("instance_encoder")),
        prompt_encoder=functools.partial(LoPA, **arguments.pop("prompt_encoder")["init_args"]),
        optimizer=functools.partial(torch.optim.AdamW, **arguments.pop("optimizer")["init_args"]),
        **arguments,
    )
    return made


def build_data(config: dict[str, Any]) -> TextDataModule:
    """What a data module's config stands for."""
    made: TextDataModule = _class(config["class_path"])(**config["init_args"])
    return made


def _class(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


_POOL = 1500
_GLUE, _CRUXEVAL = "nyu-mll/glue", "cruxeval-org/cruxeval"
CASES = {
    case.name: case
    for case in (
        Case("minilm_sst2", MINILM, _GLUE, "GLUEDataModule", (("task", "sst2"),), 4, 32, 256, 320),
        Case("minilm_rte", MINILM, _GLUE, "GLUEDataModule", (("task", "rte"),), 4, 16, 256, 160),
        Case("smollm2_mbpp", SMOLLM2, "google-research-datasets/mbpp", "MBPPDataModule", (), 1, 4, 512, 24),
        Case(
            "smollm2_cruxeval_output",
            SMOLLM2,
            _CRUXEVAL,
            "CRUXEvalDataModule",
            (("predict", "output"),),
            1,
            4,
            512,
            16,
        ),
    )
}


def places_of(options: argparse.Namespace) -> Places:
    """Where models and data come from, by a benchmark's options; sets the clock, and tells libraries to be quiet."""
    use_clock(options.clock)
    untyped: Any = transformers_logging
    untyped.set_verbosity_error()
    untyped.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*texts were cut to")
    datasets.disable_progress_bars()
    ignore_expected_warnings()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return Places(options.models_root, options.data_root)


def chosen(options: argparse.Namespace, known: dict[str, Case] = CASES) -> list[Case]:
    """The cases that a benchmark's options name; with ``--quick`` of a few examples.

    Raises:
        LoPAError: If there is no such case.
    """
    names = options.cases or list(known)
    if unknown := sorted(set(names) - set(known)):
        raise LoPAError(f"no case {', '.join(unknown)}; the cases are {', '.join(known)}")
    return [known[name] for name in names]


def examples_of(case: Case, options: argparse.Namespace) -> int:
    """Training examples of a round, as asked for or the case's own."""
    if options.quick:
        return min(case.batch_size, 4)
    return int(options.examples or case.examples)


def pool_of(case: Case, options: argparse.Namespace) -> int:
    """Training examples that a round's are drawn from, batch by batch: as many as texts of like length want."""
    return examples_of(case, options) if options.quick else max(_POOL, examples_of(case, options))

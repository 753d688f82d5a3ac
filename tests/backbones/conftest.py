from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from lopa_lightning.backbones.pretrained import Family, PretrainedSpec, load_model

FAMILIES: dict[str, Family] = {
    "bert": "masked_lm",
    "roberta": "masked_lm",
    "gpt2": "causal_lm",
    "llama": "causal_lm",
}

Load = Callable[..., PreTrainedModel]


@pytest.fixture(autouse=True)
def _same_numbers_every_run() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def load(tiny: Callable[[str], str]) -> Load:
    """Loads a tiny model anew, by default with its language model head."""

    def fresh(kind: str, family: Family | None = None) -> PreTrainedModel:
        return shaken(load_model(PretrainedSpec(tiny(kind)), family or FAMILIES[kind]))

    return fresh


@torch.no_grad()
def shaken(model: PreTrainedModel) -> PreTrainedModel:
    """Moves biases and norms away from 0 and 1, where leaving one out would not be seen."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model

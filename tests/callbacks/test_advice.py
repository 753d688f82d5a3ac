"""Warnings that say what to change where training goes badly, each once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.loggers import CSVLogger

from lopa_lightning import InstanceEncoderSpec, LoPA
from lopa_lightning.callbacks import PromptMonitor
from lopa_lightning.callbacks.advice import Advice, of_gate, of_norms
from tests.modules.helpers import module, reviews, trainer

Tiny = Callable[[str], str]


@pytest.mark.parametrize(("flat", "share"), [(5, None), (6, "60%"), (10, "100%")])
def test_a_gate_is_saturated_if_most_of_it_is(flat: int, share: str | None) -> None:
    gate = torch.tensor([0.009, 0.991] * 5)
    gate[flat:] = torch.tensor([0.011, 0.989, 0.5, 0.2, 0.9])[: 10 - flat]
    said = of_gate(gate.view(1, 5, 2))
    assert (said is None) == (share is None)
    assert share is None or said.startswith(f"{share} of the gate is within 0.01 of 0 or 1")


@pytest.mark.parametrize(
    ("factor", "part"),
    [
        (29.0, None),
        (1 / 29, None),
        (31.0, "have 31 times the norm of the backbone's embeddings: lower its learning rate"),
        (1 / 31, "have 0.0323 times the norm of the backbone's embeddings: raise its learning rate"),
    ],
)
def test_virtual_tokens_are_compared_with_embeddings_by_norm(factor: float, part: str | None) -> None:
    embeddings = torch.tensor([[3.0, 4.0], [0.0, 5.0], [600.0, 0.0]])  # a rare long one does not count
    prompt = torch.tensor([[[5.0, 0.0], [0.0, -5.0]]]) * factor
    said = of_norms(prompt, embeddings)
    assert (said is None) == (part is None)
    assert part is None or part in said


def test_a_gradient_of_0_counts_twice_in_a_row_and_not_at_first(recwarn: pytest.WarningsRecorder) -> None:
    advice, zero, one = Advice(), torch.tensor(0.0), torch.tensor(1.0)
    for step, norm in [(8, zero), (9, zero), (10, zero), (11, one), (12, zero), (13, one)]:
        advice.look_at_gradient("low_rank", norm, step)
    assert not recwarn
    for step in range(14, 20):
        advice.look_at_gradient("low_rank", zero, step)
        advice.look_at_gradient("head", one, step)
    (warned,) = recwarn
    assert "the gradient of low_rank is 0 after 15 steps" in str(warned.message)


def fit(model: Any, folder: Path, recwarn: pytest.WarningsRecorder) -> list[str]:
    """The advice that a fit of 15 steps gives."""
    seed_everything(3)
    run = trainer(folder, 3, callbacks=[PromptMonitor()], logger=CSVLogger(folder), log_every_n_steps=1)
    run.fit(model, reviews(folder))
    about = ("of the gate is within", "times the norm of", "the gradient of")
    return [text for warned in recwarn if any(part in (text := str(warned.message)) for part in about)]


def test_a_run_that_goes_badly_says_so_once(tiny: Tiny, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    spec = InstanceEncoderSpec(adapter={"peft_type": "LORA", "r": 2})
    prompt = functools.partial(LoPA, num_virtual_tokens=3, rank=2, hidden_dim=8, dropout=1.0)  # reads nothing
    rates = {"shared_prompt": 100.0, "low_rank": 1.0}
    bad = module(
        tiny("bert_base"), objective="head", instance_encoder=spec, prompt_encoder=prompt, learning_rates=rates
    )
    said = fit(bad, tmp_path, recwarn)
    assert len(said) == 3
    for part in ("times the norm of the backbone's embeddings: lower", "of the gate is within 0.01 of 0 or 1"):
        assert sum(part in text for text in said) == 1
    assert sum("the gradient of instance_encoder is 0 after" in text for text in said) == 1


def test_a_run_that_goes_well_says_nothing(tiny: Tiny, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    assert fit(module(tiny("bert_base"), objective="head"), tmp_path, recwarn) == []

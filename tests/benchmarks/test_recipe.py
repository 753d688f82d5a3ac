"""The prompt encoders that were tried begin where LoPA begins, and have the gate that is said of them."""

from __future__ import annotations

import pytest
import torch

from lopa_lightning import LoPA
from tests.benchmarks.recipe import LinearGate, StandardizedVectors, WideGate

INSTANCES = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("method", [WideGate, LinearGate])
def test_the_first_soft_prompt_is_the_embeddings(method: type[LoPA]) -> None:
    encoder = method(8, 6, 3).eval()
    torch.testing.assert_close(encoder.gate(INSTANCES), torch.ones(64, 3, 8))
    assert encoder.initial_scale == 1
    assert LoPA(8, 6, 3).initial_scale == 2
    torch.testing.assert_close(encoder(INSTANCES)[5], encoder.shared_virtual_tokens())


def test_the_gates_range() -> None:
    wide, linear = WideGate(8, 6, 3).eval(), LinearGate(8, 6, 3).eval()
    for encoder in (wide, linear):
        torch.nn.init.normal_(next(encoder.row_head[-1].parameters()), std=9.0)
    assert 0 <= wide.gate(INSTANCES).min() < 0.1
    assert 3.9 < wide.gate(INSTANCES).max() <= 4
    assert linear.gate(INSTANCES).min() < 0
    assert linear.gate(INSTANCES).max() > 4


def test_vectors_are_standardized_by_their_batch() -> None:
    encoder = StandardizedVectors(8, 6, 3, dropout=0.0)
    torch.nn.init.normal_(next(encoder.row_head[-1].parameters()))
    moved = 5 + 3 * INSTANCES
    torch.testing.assert_close(encoder.low_rank(moved), encoder.low_rank(INSTANCES), rtol=1e-3, atol=1e-3)

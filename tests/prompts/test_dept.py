from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lopa_lightning.errors import LoPAError
from lopa_lightning.prompts import DePT, Vocabulary
from tests.prompts.checks import ORDINARY, assert_follows, randomized, tokens_at_scale


@pytest.mark.parametrize(("m", "rank"), [(20, 60), (40, 45), (60, 30), (80, 15)])
def test_parameters_on_t5_base_are_those_of_prompt_tuning_with_100_tokens(m: int, rank: int) -> None:
    dept = DePT(768, 0, num_virtual_tokens=m, max_length=256, rank=rank)
    assert sum(p.numel() for p in dept.parameters()) == 76800 == 100 * 768


@settings(max_examples=20)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 5), st.integers(1, 3), st.integers(0, 2**32))
def test_prompt_offset_and_their_gradients_are_the_equations(d: int, m: int, s: int, rank: int, seed: int) -> None:
    rank = min(rank, d)
    dept = randomized(DePT(d, 0, num_virtual_tokens=m, max_length=s, rank=rank), seed)

    def formula(p: dict[str, Tensor]) -> Tensor:
        a, b = p["offset_a"], p["offset_b"]
        offset = [sum(a[j, k] * b[k] for k in range(rank)) for j in range(s)]
        return torch.stack([*p["shared_prompt.weight"], *offset])

    assert_follows(dept, formula, lambda: torch.cat([dept(None)[0], dept.token_offset()]))


def test_initial_values_are_prompt_tunings(table: Tensor, vocabulary: Vocabulary) -> None:
    torch.manual_seed(0)
    dept = DePT(8, 0, num_virtual_tokens=10, max_length=256, rank=4)
    dept.initialize(vocabulary)
    ids = tokens_at_scale(dept(None)[0], table)
    assert len(set(ids)) == 10
    assert set(ids) <= set(ORDINARY)
    assert dept.token_offset().shape == (256, 8)
    assert dept.token_offset().count_nonzero() == 0
    # Uniform within ±1/√r has the standard deviation 1/√(3 r).
    assert dept.offset_a.abs().max().item() == pytest.approx(0.5, rel=0.01)
    assert dept.offset_a.std().item() == pytest.approx(0.5 / 3**0.5, rel=0.03)


def test_groups_are_those_of_the_papers_two_learning_rates() -> None:
    dept = DePT(8, 0, num_virtual_tokens=3, max_length=5, rank=2)
    shapes = {name: [tuple(p.shape) for p in group] for name, group in dept.parameter_groups().items()}
    assert shapes == {"shared_prompt": [(3, 8)], "low_rank": [(5, 2), (2, 8)]}


def test_diagnostics_show_how_far_tokens_are_moved() -> None:
    dept = randomized(DePT(8, 0, num_virtual_tokens=3, max_length=5, rank=2), seed=0)
    shown = dept.diagnostics(None)
    assert list(shown) == ["offset_norms"]
    torch.testing.assert_close(shown["offset_norms"].square(), (dept.offset_a @ dept.offset_b).square().sum(-1))


@pytest.mark.parametrize("name", ["max_length", "rank"])
def test_impossible_options_are_refused(name: str) -> None:
    with pytest.raises(LoPAError, match=f"{name} must be at least 1, got 0"):
        DePT(8, 0, **{name: 0})

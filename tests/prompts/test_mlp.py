from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lopa_lightning.errors import LoPAError
from lopa_lightning.prompts.mlp import PHMLinear, mlp
from tests.prompts.checks import assert_follows, randomized


def kronecker(a: Tensor, b: Tensor) -> Tensor:
    """W = Σᵢ Aᵢ ⊗ Bᵢ."""
    return torch.stack([torch.kron(left, right) for left, right in zip(a, b)]).sum(0)


@settings(max_examples=30)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.booleans(), st.lists(st.integers(1, 3), max_size=3))
def test_phm_multiplies_with_a_sum_of_kronecker_products(n: int, i: int, o: int, bias: bool, shape: list[int]) -> None:
    layer = randomized(PHMLinear(n * i, n * o, n, bias), seed=n)
    x = torch.randn(*shape, n * i, dtype=torch.float64, requires_grad=True)

    def formula(p: dict[str, Tensor]) -> Tensor:
        w = kronecker(p["a"], p["b"])
        assert w.shape == (n * o, n * i)
        product = torch.einsum("...i,oi->...o", x, w)
        return product + p["bias"] if bias else product

    assert_follows(layer, formula, lambda: layer(x), instance=x)


@pytest.mark.parametrize("n", [8, 16, 32])
def test_phm_starts_with_the_spread_of_a_dense_layer(n: int) -> None:
    torch.manual_seed(0)
    layer = PHMLinear(512, 512, n)
    weight = kronecker(layer.a, layer.b)
    assert weight.std().item() == pytest.approx(0.02, rel=0.06)
    assert weight.mean().item() == pytest.approx(0, abs=1e-3)
    assert layer.bias.count_nonzero() == 0


@pytest.mark.parametrize(("n", "i", "o"), [(1, 6, 4), (2, 6, 4), (16, 1024, 256)])
def test_phm_has_an_nth_of_the_parameters_and_n_cubed_more(n: int, i: int, o: int) -> None:
    assert sum(p.numel() for p in PHMLinear(i, o, n).parameters()) == n**3 + i * o // n + o
    assert sum(p.numel() for p in PHMLinear(i, o, n, bias=False).parameters()) == n**3 + i * o // n


@pytest.mark.parametrize(("n", "i", "o"), [(3, 6, 4), (3, 4, 6)])
def test_phm_needs_a_number_that_divides_both_widths(n: int, i: int, o: int) -> None:
    with pytest.raises(LoPAError, match=f"^phm must divide a layer's widths, got 3 for one from {i} to {o}$"):
        PHMLinear(i, o, n)


@pytest.mark.parametrize("phm", [0, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_an_mlps_initial_values_are_small(phm: int, bias: bool) -> None:
    torch.manual_seed(0)
    layers = mlp(256, 128, 256, dropout=0.25, bias=bias, phm=phm)
    assert [type(layer).__name__ for layer in layers[::2]] == ["Dropout", "Tanh"]
    assert layers[0].p == 0.25
    for layer in layers[1::2]:
        weight = kronecker(layer.a, layer.b) if phm else layer.weight
        assert weight.std().item() == pytest.approx(0.02, rel=0.6 if phm else 0.02)
    assert layers[1].bias.count_nonzero() == 0
    assert (layers[3].bias is not None) == bias
    assert not bias or layers[3].bias.count_nonzero() == 0

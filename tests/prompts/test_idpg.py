from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lopa_lightning.errors import LoPAError
from lopa_lightning.prompts import IDPG, Vocabulary
from tests.prompts.checks import ORDINARY, assert_follows, randomized, tokens_at_scale


@pytest.mark.parametrize(("m", "millions"), [(5, 1.58), (10, 2.89), (25, 6.84), (50, 13.42), (100, 26.58)])
def test_parameter_counts_are_those_published_in_lopas_paper(m: int, millions: float) -> None:
    with torch.device("meta"):
        idpg = IDPG(1024, 1024, num_virtual_tokens=m, hidden_dim=256)
    assert round(sum(p.numel() for p in idpg.parameters()) / 1e6, 2) == millions


@pytest.mark.parametrize(("n", "count"), [(8, 371968), (16, 198912), (32, 166144)])
def test_phm_counts_are_two_layers_and_their_biases(n: int, count: int) -> None:
    with torch.device("meta"):
        idpg = IDPG(1024, 1024, num_virtual_tokens=10, hidden_dim=256, phm=n)
    assert sum(p.numel() for p in idpg.parameters()) == count


def formula(p: dict[str, Tensor], x: Tensor, phm: int) -> Tensor:
    """Z = W₂ tanh(W₁ x + b₁) + b₂, with W = Σᵢ Aᵢ ⊗ Bᵢ if there are components."""

    def weight(layer: int) -> Tensor:
        if not phm:
            return p[f"generator.{layer}.weight"]
        pairs = zip(p[f"generator.{layer}.a"], p[f"generator.{layer}.b"])
        return torch.stack([torch.kron(a, b) for a, b in pairs]).sum(0)

    prompts = []
    for vector in x:
        hidden = torch.tanh(weight(1) @ vector + p["generator.1.bias"])
        prompts.append((weight(3) @ hidden + p["shared_prompt.weight"].flatten()).view(p["shared_prompt.weight"].shape))
    return torch.stack(prompts)


@settings(max_examples=40)
@given(
    st.sampled_from([0, 1, 2, 3]),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(0, 2**32),
)
def test_soft_prompt_and_its_gradients_are_the_equations(
    phm: int, e: int, h: int, d: int, m: int, batch: int, seed: int
) -> None:
    n = phm or 1
    idpg = randomized(IDPG(n * d, n * e, num_virtual_tokens=m, hidden_dim=n * h, phm=phm), seed)
    generator = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(batch, n * e, dtype=torch.float64, generator=generator, requires_grad=True)
    assert_follows(idpg, lambda p: formula(p, x, phm), lambda: idpg(x), instance=x)


@pytest.mark.parametrize("phm", [0, 8])
def test_the_first_prompt_is_the_embeddings_and_little_of_the_instance(
    phm: int, table: Tensor, vocabulary: Vocabulary
) -> None:
    torch.manual_seed(0)
    idpg = IDPG(8, 64, num_virtual_tokens=20, hidden_dim=256, phm=phm).eval()
    idpg.initialize(vocabulary)
    ids = tokens_at_scale(idpg.shared_virtual_tokens(), table)
    assert len(set(ids)) == 20
    assert set(ids) <= set(ORDINARY)
    unit = torch.nn.functional.normalize(torch.randn(64, 64), dim=-1)
    little = idpg(unit) - table[ids]
    # Two layers of N(0, 0.02²), tanh nearly the identity: 0.02 · √256 · 0.02.
    assert little.std().item() == pytest.approx(0.0064, rel=0.15)
    torch.testing.assert_close(idpg.diagnostics(unit)["instance_part"], little, atol=1e-6, rtol=0)


@pytest.mark.parametrize("phm", [0, 2])
def test_groups_are_the_output_bias_and_the_rest(phm: int) -> None:
    idpg = IDPG(6, 4, num_virtual_tokens=3, hidden_dim=10, phm=phm)
    shapes = {name: [tuple(p.shape) for p in group] for name, group in idpg.parameter_groups().items()}
    dense = [(10, 4), (10,), (18, 10)]
    by_components = [(2, 2, 2), (2, 5, 2), (10,), (2, 2, 2), (2, 9, 5)]
    assert sorted(shapes["generator"]) == sorted(by_components if phm else dense)
    assert shapes["shared_prompt"] == [(3, 6)]
    assert list(shapes) == ["shared_prompt", "generator"]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"hidden_dim": 0}, "hidden_dim must be at least 1, got 0"),
        ({"instance_dim": 0}, "instance_dim must be at least 1, got 0"),
        ({"phm": -1}, "phm must be at least 1, got -1"),
        ({"phm": 3}, "phm must divide a layer's widths, got 3 for one from 4 to 256"),
        ({"phm": 3, "instance_dim": 3}, "phm must divide a layer's widths, got 3 for one from 3 to 256"),
        (
            {"phm": 16, "instance_dim": 16, "num_virtual_tokens": 3},
            "phm must divide a layer's widths, got 16 for one from 256 to 24",
        ),
        ({"init_text": "good"}, "init_text and init='text' go together"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, object], named: str) -> None:
    with pytest.raises(LoPAError, match=named):
        IDPG(**{"embedding_dim": 8, "instance_dim": 4, **options})

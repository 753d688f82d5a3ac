from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lopa_lightning.errors import LoPAError
from lopa_lightning.prompts import LoPA, Vocabulary
from tests.prompts.checks import ORDINARY, assert_follows, randomized, tokens_at_scale

COMBINATIONS = ["gate", "add", "concat", "max", "instance_only"]


@pytest.mark.parametrize(
    ("e", "d", "h", "m", "rank", "millions"),
    [
        (1024, 1024, 256, 10, 1, 0.80),
        (1024, 1024, 256, 10, 2, 1.07),
        (1024, 1024, 256, 10, 4, 1.60),
        (1024, 1024, 256, 5, 4, 1.59),
        (1024, 1024, 256, 25, 4, 1.63),
        (1024, 1024, 256, 50, 4, 1.68),
        (1024, 1024, 256, 100, 4, 1.78),
        (1024, 2048, 1024, 10, 1, 4.23),
        (1024, 2048, 1024, 10, 2, 6.34),
        (1024, 2048, 1024, 10, 4, 10.56),
        (1024, 2560, 1024, 10, 1, 4.76),
        (1024, 2560, 1024, 10, 2, 7.39),
        (1024, 2560, 1024, 10, 4, 12.66),
    ],
)
def test_parameter_counts_are_the_published_ones(e: int, d: int, h: int, m: int, rank: int, millions: float) -> None:
    with torch.device("meta"):
        lopa = LoPA(d, e, num_virtual_tokens=m, rank=rank, hidden_dim=h)
    assert round(sum(p.numel() for p in lopa.parameters()) / 1e6, 2) == millions


def formula(p: dict[str, Tensor], x: Tensor, rank: int, combine: str) -> Tensor:
    """Z, one entry at a time: ℓ[i, j] = Σ_k U[i, k] V[j, k], and with it and Z_S[i, j] the paper's equation 3."""

    def mlp(name: str) -> Tensor:
        hidden = torch.tanh(torch.einsum("be,he->bh", x, p[f"{name}.1.weight"]) + p[f"{name}.1.bias"])
        return torch.einsum("bh,oh->bo", hidden, p[f"{name}.3.weight"]) + p[f"{name}.3.bias"]

    u, v = mlp("row_head"), mlp("column_head")
    m, d = u.shape[1] // rank, v.shape[1] // rank
    shared = p.get("shared_prompt.weight")
    prompts = []
    for b in range(len(x)):
        low_rank = [
            [sum(u[b, i * rank + k] * v[b, j * rank + k] for k in range(rank)) for j in range(d)] for i in range(m)
        ]
        rows = {
            "gate": lambda i, low_rank=low_rank: [shared[i, j] / (1 + torch.exp(-low_rank[i][j])) for j in range(d)],
            "add": lambda i, low_rank=low_rank: [shared[i, j] + low_rank[i][j] for j in range(d)],
            "max": lambda i, low_rank=low_rank: [
                shared[i, j] if shared[i, j] > low_rank[i][j] else low_rank[i][j] for j in range(d)
            ],
            "concat": lambda i, low_rank=low_rank: list(shared[i]) if i < m else low_rank[i - m],
            "instance_only": lambda i, low_rank=low_rank: low_rank[i],
        }[combine]
        prompts.append(torch.stack([torch.stack(rows(i)) for i in range(2 * m if combine == "concat" else m)]))
    return torch.stack(prompts)


sizes = st.fixed_dictionaries(
    {
        "embedding_dim": st.integers(3, 6),
        "instance_dim": st.integers(1, 5),
        "num_virtual_tokens": st.integers(1, 4),
        "rank": st.integers(1, 3),
        "hidden_dim": st.integers(1, 4),
    }
)


@pytest.mark.parametrize("combine", COMBINATIONS)
@settings(max_examples=12)
@given(sizes, st.integers(1, 3), st.integers(0, 2**32))
def test_soft_prompt_and_its_gradients_are_the_equations(
    combine: str, size: dict[str, int], batch: int, seed: int
) -> None:
    lopa = randomized(LoPA(**size, combine=combine), seed)
    generator = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(batch, size["instance_dim"], dtype=torch.float64, generator=generator, requires_grad=True)
    assert_follows(lopa, lambda p: formula(p, x, size["rank"], combine), lambda: lopa(x), instance=x)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_logits_of_the_gate_have_the_rank(rank: int) -> None:
    lopa = randomized(LoPA(12, 5, num_virtual_tokens=8, rank=rank, hidden_dim=6), seed=0)
    # Logits a thousandth as large keep σ far from where float64 rounds it to 0 or 1.
    for head in (lopa.row_head, lopa.column_head):
        head[3].weight.data /= 30
        head[3].bias.data /= 30
    logits = torch.logit(lopa.gate(torch.randn(4, 5, dtype=torch.float64)))
    assert torch.linalg.matrix_rank(logits, rtol=1e-9).tolist() == [rank] * 4


@pytest.mark.parametrize("combine", COMBINATIONS)
def test_groups_are_what_is_shared_and_the_two_mlps(combine: str) -> None:
    lopa = LoPA(6, 5, num_virtual_tokens=3, combine=combine)
    shapes = {name: [tuple(p.shape) for p in group] for name, group in lopa.parameter_groups().items()}
    heads = [(256, 5), (256,), (12, 256), (12,), (256, 5), (256,), (24, 256), (24,)]
    expected = {"low_rank": heads} if combine == "instance_only" else {"shared_prompt": [(3, 6)], "low_rank": heads}
    assert shapes == expected


@pytest.mark.parametrize(("combine", "tokens"), zip(COMBINATIONS, [4, 4, 8, 4, 4]))
def test_concatenation_announces_twice_the_virtual_tokens(combine: str, tokens: int) -> None:
    lopa = LoPA(6, 5, num_virtual_tokens=4, combine=combine)
    assert lopa.num_virtual_tokens == tokens
    assert lopa(torch.randn(2, 5)).shape == (2, tokens, 6)


@pytest.mark.parametrize("combine", COMBINATIONS)
def test_only_instance_only_has_no_shared_parameters(combine: str) -> None:
    lopa = LoPA(1024, 1024, combine=combine)
    assert sum(p.numel() for p in lopa.parameters()) == 1597992 - 10 * 1024 * (combine == "instance_only")
    assert (lopa.shared_virtual_tokens() is None) == (combine == "instance_only")


def test_u_starts_at_zero_and_v_at_unit_scale() -> None:
    torch.manual_seed(0)
    lopa = LoPA(256, 256, num_virtual_tokens=50, rank=4, hidden_dim=256)
    for layer in (lopa.row_head[1], lopa.column_head[1], lopa.column_head[3]):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.02)
        assert layer.weight.mean().item() == pytest.approx(0, abs=5e-4)
    for layer in (lopa.row_head[1], lopa.column_head[1], lopa.row_head[3]):
        assert layer.bias.count_nonzero() == 0
    assert lopa.row_head[3].weight.count_nonzero() == 0
    assert lopa.column_head[3].bias.std().item() == pytest.approx(1, rel=0.1)


def test_the_instance_has_a_gradient_from_the_first_step_on(vocabulary: Vocabulary) -> None:
    torch.manual_seed(0)
    lopa = LoPA(8, 64, num_virtual_tokens=6).eval()
    lopa.initialize(vocabulary)
    lopa(torch.randn(16, 64)).square().sum().backward()
    assert lopa.row_head[3].weight.grad.count_nonzero() == lopa.row_head[3].weight.numel()


def test_the_gate_starts_at_a_half_and_the_prompt_at_the_embeddings(table: Tensor, vocabulary: Vocabulary) -> None:
    torch.manual_seed(0)
    lopa = LoPA(8, 64, num_virtual_tokens=6).eval()
    lopa.initialize(vocabulary)
    instance = torch.randn(16, 64)
    torch.testing.assert_close(lopa.gate(instance), torch.full((16, 6, 8), 0.5), atol=0, rtol=0)
    ids = tokens_at_scale(lopa.shared_virtual_tokens(), table, 2.0)
    embeddings = table[ids].expand(16, -1, -1)
    torch.testing.assert_close(lopa(instance), embeddings, atol=0, rtol=0)


@pytest.mark.parametrize("combine", ["add", "concat", "max", "instance_only"])
def test_other_combinations_start_from_the_embeddings_themselves(
    combine: str, table: Tensor, vocabulary: Vocabulary
) -> None:
    torch.manual_seed(0)
    lopa = LoPA(8, 64, num_virtual_tokens=6, combine=combine).eval()
    lopa.initialize(vocabulary)
    shared = lopa.shared_virtual_tokens()
    embeddings = torch.zeros(6, 8) if shared is None else table[tokens_at_scale(shared, table)]
    start = {
        "add": embeddings,
        "concat": torch.cat([embeddings, torch.zeros(6, 8)]),
        "max": embeddings.clamp(min=0),
        "instance_only": torch.zeros(6, 8),
    }[combine]
    unit = torch.nn.functional.normalize(torch.randn(16, 64), dim=-1)
    torch.testing.assert_close(lopa(unit), start.expand(16, -1, -1), atol=0, rtol=0)


def test_diagnostics_show_the_gate() -> None:
    lopa = randomized(LoPA(6, 5, num_virtual_tokens=3, rank=2, hidden_dim=4), seed=0)
    instance = torch.randn(4, 5, dtype=torch.float64)
    shown = lopa.diagnostics(instance)
    assert list(shown) == ["gate"]
    torch.testing.assert_close(shown["gate"], lopa(instance) / lopa.shared_virtual_tokens())


def test_diagnostics_show_the_low_rank_part_where_it_is_no_gate() -> None:
    lopa = randomized(LoPA(6, 5, num_virtual_tokens=3, rank=2, hidden_dim=4, combine="add"), seed=0)
    instance = torch.randn(4, 5, dtype=torch.float64)
    shown = lopa.diagnostics(instance)
    assert list(shown) == ["low_rank"]
    torch.testing.assert_close(shown["low_rank"], lopa(instance) - lopa.shared_virtual_tokens())


@pytest.mark.parametrize("m", [1, 10, 25])
def test_vocabulary_values_are_twice_the_embeddings_of_distinct_ordinary_tokens(
    m: int, table: Tensor, vocabulary: Vocabulary
) -> None:
    lopa = LoPA(8, 4, num_virtual_tokens=m)
    lopa.initialize(vocabulary)
    ids = tokens_at_scale(lopa.shared_virtual_tokens(), table, 2.0)
    assert len(set(ids)) == m
    assert set(ids) <= set(ORDINARY)


def test_vocabulary_values_repeat_tokens_only_when_all_are_used(table: Tensor, vocabulary: Vocabulary) -> None:
    lopa = LoPA(8, 4, num_virtual_tokens=60)
    lopa.initialize(vocabulary)
    ids = tokens_at_scale(lopa.shared_virtual_tokens(), table, 2.0)
    counts = [ids.count(token) for token in ORDINARY]
    assert sum(counts) == 60
    assert set(counts) == {2, 3}


def test_vocabulary_values_follow_the_seed(table: Tensor, vocabulary: Vocabulary) -> None:
    starts = []
    for seed in (1, 1, 2):
        lopa = LoPA(8, 4)
        torch.manual_seed(seed)
        lopa.initialize(vocabulary)
        starts.append(tokens_at_scale(lopa.shared_virtual_tokens(), table, 2.0))
    assert starts[0] == starts[1] != starts[2]


@pytest.mark.parametrize(("m", "ids"), [(2, [7, 11]), (3, [7, 11, 9]), (5, [7, 11, 9, 7, 11])])
def test_text_values_are_cut_or_repeated_to_m_tokens(
    m: int, ids: list[int], table: Tensor, vocabulary: Vocabulary
) -> None:
    lopa = LoPA(8, 4, num_virtual_tokens=m, init="text", init_text="good film bad")
    lopa.initialize(vocabulary)
    torch.testing.assert_close(lopa.shared_virtual_tokens().data, 2 * table[ids], atol=0, rtol=0)


@pytest.mark.parametrize("std", [0.1, 1.0])
def test_normal_values_have_the_asked_spread_and_needs_no_vocabulary(std: float) -> None:
    torch.manual_seed(0)
    lopa = LoPA(256, 4, num_virtual_tokens=100, init="normal", init_std=std)
    before = lopa.shared_virtual_tokens().clone()
    lopa.initialize(None)
    torch.testing.assert_close(lopa.shared_virtual_tokens(), before, atol=0, rtol=0)
    assert before.std().item() == pytest.approx(std, rel=0.02)
    assert before.mean().item() == pytest.approx(0, abs=0.03 * std)


def test_normal_mlps_have_the_released_codes_initial_values() -> None:
    torch.manual_seed(0)
    lopa = LoPA(512, 400, num_virtual_tokens=50, rank=4, hidden_dim=None, init="normal", heads_init="normal")
    for part in (lopa.row_head, lopa.column_head):
        first, last = part[1], part[3]
        assert first.weight.shape == (400, 400)  # the instance vector's width
        for layer in (first, last):
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.02)
            assert layer.weight.mean().item() == pytest.approx(0, abs=2e-4)
        assert last.bias.count_nonzero() == 0
        assert 0.045 < first.bias.abs().max() <= 400**-0.5  # uniform within 1/√e, as torch.nn.Linear draws them
        assert first.bias.std().item() == pytest.approx(400**-0.5 / 3**0.5, rel=0.1)
    # The gate starts near ½ everywhere, not at it: the instance has a gradient at once.
    gate = lopa.eval().gate(torch.randn(4, 400))
    assert 0 < (gate - 0.5).abs().max() < 0.2


def test_initial_values_are_trained_in_the_prompts_own_dtype(table: Tensor, vocabulary: Vocabulary) -> None:
    half = Vocabulary(table.bfloat16().__getitem__, vocabulary.ordinary_ids, vocabulary.encode, str)
    lopa = LoPA(8, 4)
    lopa.initialize(half)
    assert lopa.shared_virtual_tokens().dtype == torch.float32
    assert lopa.shared_virtual_tokens().requires_grad
    assert set(tokens_at_scale(lopa.shared_virtual_tokens(), table.bfloat16().float(), 2.0)) <= set(ORDINARY)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"init": "zeros"}, "vocabulary, text, normal, got 'zeros'"),
        ({"init_text": "good"}, "init_text and init='text' go together"),
        ({"init": "normal", "init_text": "good"}, "init_text and init='text' go together"),
        ({"init": "text"}, "init_text and init='text' go together"),
        ({"num_virtual_tokens": 0}, "num_virtual_tokens must be at least 1, got 0"),
        ({"combine": "gates"}, "combine must be one of gate, add, concat, max, instance_only, got 'gates'"),
        ({"combine": "instance_only", "init": "zeros"}, "vocabulary, text, normal, got 'zeros'"),
        ({"combine": "concat", "num_virtual_tokens": -1}, "num_virtual_tokens must be at least 1, got -1"),
        ({"heads_init": "ones"}, "heads_init must be one of zero_u, normal, got 'ones'"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"hidden_dim": -1}, "hidden_dim must be at least 1, got -1"),
        ({"instance_dim": 0}, "instance_dim must be at least 1, got 0"),
        ({"embedding_dim": 0}, "embedding_dim must be at least 1, got 0"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, object], named: str) -> None:
    with pytest.raises(LoPAError, match=named):
        LoPA(**{"embedding_dim": 8, "instance_dim": 4, **options})


@pytest.mark.parametrize("options", [{}, {"init": "text", "init_text": "good"}])
def test_starting_from_tokens_needs_a_vocabulary(options: dict[str, str]) -> None:
    with pytest.raises(LoPAError, match="needs a backbone with a vocabulary; use init='normal'"):
        LoPA(8, 4, **options).initialize(None)


def test_starting_from_a_text_without_tokens_is_refused(vocabulary: Vocabulary) -> None:
    with pytest.raises(LoPAError, match="has no tokens"):
        LoPA(8, 4, init="text", init_text="  ").initialize(vocabulary)

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PromptEncoder, PromptEncoderConfig
from torch import Tensor

from lopa_lightning.errors import LoPAError
from lopa_lightning.prompts import PTuning, Vocabulary
from tests.prompts.checks import ORDINARY, assert_follows, randomized


def mlp(p: dict[str, Tensor], states: Tensor, layers: list[int]) -> Tensor:
    for layer in layers:
        states = states @ p[f"mlp.{layer}.weight"].T + p[f"mlp.{layer}.bias"]
        if layer != layers[-1]:
            states = states * (states > 0)
    return states


def lstm(p: dict[str, Tensor], states: Tensor, layers: int) -> Tensor:
    """Hochreiter & Schmidhuber's cell, with torch's order of gates: input, forget, candidate, output."""
    for layer in range(layers):
        ways = []
        for direction in ("", "_reverse"):
            kinds = "weight_ih", "weight_hh", "bias_ih", "bias_hh"
            w, u, b, b_hidden = (p[f"lstm.{kind}_l{layer}{direction}"] for kind in kinds)
            h = c = states.new_zeros(u.shape[1])
            outputs = []
            for x in states.flip(0) if direction else states:
                gates = w @ x + b + u @ h + b_hidden
                i, f, g, o = gates.chunk(4)
                c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
                h = torch.sigmoid(o) * torch.tanh(c)
                outputs.append(h)
            ways.append(torch.stack(outputs[::-1] if direction else outputs))
        states = torch.cat(ways, dim=-1)
    return states


sizes = st.fixed_dictionaries(
    {
        "embedding_dim": st.integers(1, 6),
        "instance_dim": st.just(0),
        "num_virtual_tokens": st.integers(1, 4),
        "input_dim": st.integers(1, 5),
        "hidden_dim": st.integers(1, 4),
    }
)


@settings(max_examples=30)
@given(sizes, st.integers(0, 2**32))
def test_mlps_soft_prompt_and_its_gradients_are_the_equations(size: dict[str, int], seed: int) -> None:
    prompt = randomized(PTuning(**size), seed)
    assert_follows(prompt, lambda p: mlp(p, p["inputs"], [0, 2, 4])[None], lambda: prompt(None))


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_lstms_soft_prompt_and_its_gradients_are_the_equations(layers: int) -> None:
    prompt = randomized(
        PTuning(6, 0, num_virtual_tokens=4, encoder="lstm", input_dim=5, hidden_dim=3, num_layers=layers), seed=layers
    )
    assert_follows(prompt, lambda p: mlp(p, lstm(p, p["inputs"], layers), [0, 2])[None], lambda: prompt(None))


@pytest.mark.parametrize(("encoder", "layers"), [("mlp", 2), ("lstm", 2), ("lstm", 1)])
def test_soft_prompt_and_parameters_are_those_of_pefts_prompt_encoder(encoder: str, layers: int) -> None:
    torch.manual_seed(0)
    options = {
        "encoder_hidden_size": 5,
        "encoder_num_layers": layers,
        "encoder_reparameterization_type": encoder.upper(),
    }
    config = PromptEncoderConfig(num_virtual_tokens=4, token_dim=8, num_transformer_submodules=1, **options)
    theirs = PromptEncoder(config).double()
    ours = PTuning(8, 0, 4, encoder=encoder, input_dim=8, hidden_dim=5, num_layers=layers).double()
    renamed = {"embedding.weight": "inputs", "lstm_head.": "lstm.", "mlp_head.": "mlp."}
    state = theirs.state_dict()
    for old, new in renamed.items():
        state = {name.replace(old, new): value for name, value in state.items()}
    ours.load_state_dict(state)
    torch.testing.assert_close(ours(None), theirs(torch.arange(4)[None]), atol=1e-12, rtol=1e-12)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize(
    ("m", "k", "h", "d", "layers"), [(10, 256, 256, 768, 2), (20, 768, 128, 768, 2), (4, 3, 5, 7, 1), (4, 3, 5, 7, 3)]
)
def test_parameter_counts_are_the_formulas(m: int, k: int, h: int, d: int, layers: int) -> None:
    def count(encoder: str) -> int:
        with torch.device("meta"):
            prompt = PTuning(d, 0, m, encoder=encoder, input_dim=k, hidden_dim=h, num_layers=layers)
        return sum(p.numel() for p in prompt.parameters())

    assert count("mlp") == m * k + (k + 1) * h + (h + 1) * h + (h + 1) * d
    recurrent = 8 * h * (k + h + 2) + (layers - 1) * 8 * h * (3 * h + 2)
    assert count("lstm") == m * k + recurrent + (2 * h + 1) * 2 * h + (2 * h + 1) * d


def test_wide_virtual_tokens_cost_the_last_layer_alone() -> None:
    with torch.device("meta"):
        narrow, wide = (sum(p.numel() for p in PTuning(d, 0).parameters()) for d in (768, 49152))
    assert wide - narrow == 257 * (49152 - 768)


@pytest.mark.parametrize("encoder", ["mlp", "lstm"])
@pytest.mark.parametrize("m", [1, 10, 25])
def test_the_first_prompt_is_embeddings_of_distinct_ordinary_tokens(
    m: int, encoder: str, table: Tensor, vocabulary: Vocabulary
) -> None:
    torch.manual_seed(0)
    prompt = PTuning(8, 0, m, encoder=encoder, hidden_dim=32)
    prompt.initialize(vocabulary)
    distance = (prompt.shared_virtual_tokens()[:, None] - table[None]).abs().amax(-1)
    assert distance.min(1).values.max() < 1e-5
    ids = distance.argmin(1).tolist()
    assert len(set(ids)) == m
    assert set(ids) <= set(ORDINARY)


def test_more_virtual_tokens_than_the_network_is_wide_start_as_near_as_can_be() -> None:
    gaps = []
    for h in (2, 20, 60):
        torch.manual_seed(0)
        prompt = PTuning(8, 0, num_virtual_tokens=50, hidden_dim=h, init="normal")
        torch.manual_seed(1)
        prompt.initialize(None)
        torch.manual_seed(1)
        target = torch.randn(50, 8)
        gaps.append((prompt.shared_virtual_tokens() - target).square().mean().item())
    spread = target.var(0, correction=0).mean().item()
    assert spread >= gaps[0] > gaps[1] > 0.1 * spread
    assert gaps[2] < 1e-8


def test_the_last_layer_starts_with_the_smallest_such_weights(vocabulary: Vocabulary) -> None:
    torch.manual_seed(0)
    prompt = PTuning(8, 0, num_virtual_tokens=5, hidden_dim=32).double()
    prompt.initialize(vocabulary)
    hidden = torch.relu(
        torch.relu(prompt.inputs @ prompt.mlp[0].weight.T + prompt.mlp[0].bias) @ prompt.mlp[2].weight.T
        + prompt.mlp[2].bias
    )
    weight = prompt.mlp[4].weight
    onto_seen = torch.linalg.pinv(hidden) @ hidden
    torch.testing.assert_close(weight @ onto_seen, weight, atol=1e-8, rtol=0)
    torch.testing.assert_close(prompt.mlp[4].bias, prompt.shared_virtual_tokens().mean(0), atol=1e-8, rtol=0)


def test_normal_values_have_the_asked_spread() -> None:
    torch.manual_seed(0)
    prompt = PTuning(256, 0, num_virtual_tokens=100, init="normal", init_std=0.3)
    prompt.initialize(None)
    assert prompt.shared_virtual_tokens().std().item() == pytest.approx(0.3, rel=0.02)


def test_initial_values_follow_the_seed(vocabulary: Vocabulary) -> None:
    starts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        prompt = PTuning(8, 0)
        prompt.initialize(vocabulary)
        starts.append(prompt.shared_virtual_tokens().detach())
    assert torch.equal(starts[0], starts[1])
    assert not torch.allclose(starts[0], starts[2])


def test_groups_are_the_inputs_and_the_network() -> None:
    prompt = PTuning(8, 0, encoder="lstm")
    groups = prompt.parameter_groups()
    assert list(groups) == ["shared_prompt", "generator"]
    assert [id(p) for p in groups["shared_prompt"]] == [id(prompt.inputs)]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"encoder": "gru"}, "encoder must be one of mlp, lstm, got 'gru'"),
        ({"input_dim": 0}, "input_dim must be at least 1, got 0"),
        ({"hidden_dim": 0}, "hidden_dim must be at least 1, got 0"),
        ({"encoder": "lstm", "num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"init": "text"}, "init_text and init='text' go together"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, object], named: str) -> None:
    with pytest.raises(LoPAError, match=named):
        PTuning(8, 0, **options)

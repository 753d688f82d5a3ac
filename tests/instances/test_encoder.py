from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lopa_lightning.backbones.text import TextBackbone
from lopa_lightning.backbones.text_spec import instance_inputs
from lopa_lightning.errors import LoPAError
from lopa_lightning.instances.encoder import InstanceEncoder, InstanceEncoderSpec, pool
from tests.backbones.conftest import FAMILIES, Load
from tests.tiny import TEXT

KINDS = list(FAMILIES)
POOLINGS = ["cls", "mean", "last", "max"]
WIDTH, WORDS = 32, 100


def naive_pool(states: list[list[float]], mask: list[int], pooling: str) -> list[float]:
    own = [state for state, counts in zip(states, mask) if counts]
    if pooling == "cls":
        return own[0]
    if pooling == "last":
        return own[-1]
    if pooling == "max":
        return [max(column) for column in zip(*own)]
    return [sum(column) / len(own) for column in zip(*own)]


@st.composite
def masks(draw: st.DrawFn) -> Tensor:
    """Rows with a token at least, and padding before, after or among them (before: virtual tokens)."""
    length = draw(st.integers(1, 7))
    row = st.lists(st.integers(0, 1), min_size=length, max_size=length).filter(any)
    return torch.tensor(draw(st.lists(row, min_size=1, max_size=4)))


@settings(max_examples=100)
@given(masks(), st.sampled_from(POOLINGS), st.integers(0, 2**32))
def test_pool_takes_what_counts_and_nothing_else(mask: Tensor, pooling: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*mask.shape, 3, generator=generator, dtype=torch.float64)
    hidden[mask == 0] += 1000
    expected = [naive_pool(states, row, pooling) for states, row in zip(hidden.tolist(), mask.tolist())]
    torch.testing.assert_close(pool(hidden, mask, pooling), torch.tensor(expected, dtype=torch.float64))


def test_unknown_pooling_is_an_error_that_lists_the_choices() -> None:
    with pytest.raises(LoPAError, match="cls, mean, last, max, got 'sum'"):
        pool(torch.zeros(1, 2, 3), torch.ones(1, 2, dtype=torch.long), "sum")


def encoder(load: Load, kind: str = "bert", **options: object) -> InstanceEncoder:
    return InstanceEncoder(load(kind, "encoder"), InstanceEncoderSpec(name="own", **options), TEXT).eval()


def some_ids() -> tuple[Tensor, Tensor]:
    ids = torch.randint(5, WORDS, (3, 6), generator=torch.Generator().manual_seed(0))
    return ids, torch.ones_like(ids)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_vector_is_the_pooled_hidden_states_of_the_raw_model(kind: str, pooling: str, load: Load) -> None:
    ids, mask = some_ids()
    hidden = load(kind, "encoder")(input_ids=ids).last_hidden_state
    expected = [naive_pool(states, row, pooling) for states, row in zip(hidden.tolist(), mask.tolist())]
    vectors = encoder(load, kind, pooling=pooling, normalize=False)(instance_inputs(ids, mask))
    torch.testing.assert_close(vectors, torch.tensor(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.sampled(11)
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_vector_does_not_depend_on_padding(kind: str, side: str, pooling: str, load: Load) -> None:
    encode = encoder(load, kind, pooling=pooling)
    ids, mask = torch.full((3, 8), 1), torch.zeros(3, 8, dtype=torch.long)  # RoBERTa's positions pass over token 1
    texts = [torch.randint(2, WORDS, (length,)) for length in (8, 1, 5)]
    for row, text in enumerate(texts):
        place = slice(8 - len(text), None) if side == "left" else slice(len(text))
        ids[row, place], mask[row, place] = text, 1
    alone = torch.cat([encode(instance_inputs(text[None], torch.ones_like(text[None]))) for text in texts])
    torch.testing.assert_close(encode(instance_inputs(ids, mask)), alone, atol=1e-5, rtol=1e-5)


def test_normalised_vectors_have_a_root_mean_square_of_one_and_the_same_direction(load: Load) -> None:
    ids, mask = some_ids()
    plain, normalised = (
        encoder(load, normalize=False)(instance_inputs(ids, mask)),
        encoder(load, normalize=True)(instance_inputs(ids, mask)),
    )
    scale = plain.square().mean(1, keepdim=True).sqrt()
    assert not torch.allclose(scale, torch.ones(3, 1), atol=0.1)
    torch.testing.assert_close(normalised, plain / scale)
    torch.testing.assert_close(encoder(load)(instance_inputs(ids, mask)), normalised)


def test_vectors_are_float32_whatever_the_encoder_computes_in(load: Load) -> None:
    ids, mask = some_ids()
    half = InstanceEncoder(load("bert", "encoder").bfloat16(), InstanceEncoderSpec(name="own"), TEXT)
    assert half(instance_inputs(ids, mask)).dtype == torch.float32


def test_a_frozen_encoder_has_no_gradient_and_stays_in_eval_mode(load: Load) -> None:
    ids, mask = some_ids()
    encode = encoder(load)
    before = encode(instance_inputs(ids, mask))
    nn.ModuleList([encode]).train()
    assert not any(part.training for part in encode.modules())
    assert not any(p.requires_grad for p in encode.parameters())
    assert not before.requires_grad
    torch.testing.assert_close(encode(instance_inputs(ids, mask)), before, atol=0, rtol=0)


def test_a_trained_encoder_has_gradients_and_its_own_dropout(load: Load) -> None:
    ids, mask = some_ids()
    encode = encoder(load, trainable=True, pooling="cls")
    encode(instance_inputs(ids, mask)).square().sum().backward()
    assert [name for name, p in encode.named_parameters() if p.grad is None or not p.requires_grad] == []
    whole = nn.ModuleList([encode])
    assert all(part.training for part in whole.train().modules())
    assert not torch.equal(encode(instance_inputs(ids, mask)), encode(instance_inputs(ids, mask)))
    assert not any(part.training for part in whole.eval().modules())
    with torch.no_grad():
        assert not encode(instance_inputs(ids, mask)).requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_the_backbone_as_encoder_is_not_a_second_copy(kind: str, load: Load) -> None:
    backbone = TextBackbone(load(kind))
    shared = InstanceEncoder(backbone.body, InstanceEncoderSpec(pooling="last"), TEXT, shared=True)
    assert list(shared.parameters()) == list(shared.buffers()) == list(shared.modules())[1:] == []
    ids, mask = some_ids()
    before = shared(instance_inputs(ids, mask))
    torch.testing.assert_close(before, encoder(load, kind, pooling="last")(instance_inputs(ids, mask)))
    with torch.no_grad():
        backbone.model.get_input_embeddings().weight.mul_(2)
    assert not torch.allclose(shared(instance_inputs(ids, mask)), before, atol=1e-2)


def test_a_shared_encoders_vectors_do_not_change_when_the_backbone_trains_with_dropout(load: Load) -> None:
    ids, mask = some_ids()
    backbone = TextBackbone(load("bert"), dropout=True)
    shared = InstanceEncoder(backbone.body, InstanceEncoderSpec(), TEXT, shared=True)
    still = shared(instance_inputs(ids, mask))
    whole = nn.ModuleList([shared, backbone]).train()
    torch.testing.assert_close(shared(instance_inputs(ids, mask)), still, atol=0, rtol=0)
    assert all(part.training for part in whole[1].modules())


def test_a_spec_says_whether_it_is_the_backbone() -> None:
    assert InstanceEncoderSpec().is_backbone
    own = InstanceEncoderSpec(
        "owner/encoder", revision="v1", dtype="bfloat16", attn_implementation="eager", trust_remote_code=True
    )
    assert not own.is_backbone
    loaded = own.pretrained()
    assert (loaded.name, loaded.revision, loaded.dtype) == ("owner/encoder", "v1", "bfloat16")
    assert (loaded.attn_implementation, loaded.trust_remote_code) == ("eager", True)


def test_unknown_pooling_is_refused() -> None:
    with pytest.raises(LoPAError, match="pooling must be one of cls, mean, last, max, got 'sum'"):
        InstanceEncoderSpec(pooling="sum")  # type: ignore[arg-type]

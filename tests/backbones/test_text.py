from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PretrainedConfig, PreTrainedModel

from lopa_lightning.backbones.base import States
from lopa_lightning.backbones.pretrained import PretrainedSpec, freeze
from lopa_lightning.backbones.text import TextBackbone
from lopa_lightning.backbones.text_spec import TextKind
from lopa_lightning.errors import LoPAError
from lopa_lightning.instances.encoder import pool
from tests.backbones.conftest import FAMILIES, Load
from tests.tiny import run

KINDS = list(FAMILIES)
CAUSAL = [kind for kind, family in FAMILIES.items() if family == "causal_lm"]
PLACEMENTS = ["before", "after_first", "after", "system"]
M, WIDTH, WORDS = 3, 32, 100


def ones(ids: Tensor) -> Tensor:
    return torch.ones_like(ids)


def padded(texts: list[Tensor], side: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Ids and mask of a batch. Any token may stand at padding: the mask alone says what counts."""
    length = max(map(len, texts))
    ids = torch.randint(WORDS, (len(texts), length), generator=generator)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        place = slice(length - len(text), None) if side == "left" else slice(len(text))
        ids[row, place], mask[row, place] = text, 1
    return ids, mask


CASES = [(kind, placement) for kind in KINDS for placement in PLACEMENTS if placement != "after" or kind in CAUSAL]


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("kind", "placement"), CASES)
def test_an_items_states_do_not_depend_on_its_batch(kind: str, placement: str, load: Load) -> None:
    backbone = TextBackbone(load(kind), placement=placement)

    @settings(max_examples=8)
    @given(st.lists(st.integers(1, 12), min_size=2, max_size=4), st.integers(0, 2**32))
    def check(lengths: list[int], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        texts = [torch.randint(WORDS, (n,), generator=generator) for n in lengths]
        prompts = torch.randn(len(texts), M, WIDTH, generator=generator)
        positions = torch.tensor([int(torch.randint(n + 1, (), generator=generator)) for n in lengths])
        alone = [
            run(backbone, prompt[None], text[None], ones(text[None]), position=position[None])
            for prompt, text, position in zip(prompts, texts, positions)
        ]
        for side in ("left", "right"):
            together = run(backbone, prompts, *padded(texts, side, generator), position=positions)
            for row, item in enumerate(alone):
                assert_same_item(together, row, item, reads_text=placement != "after")

    with torch.no_grad():
        check()


def assert_same_item(together: States, row: int, item: States, reads_text: bool = True) -> None:
    own = together.content_mask[row] == 1
    text = together.spread(torch.ones_like(together.positions))[row, own]
    assert text.all() if reads_text else not text.any()
    torch.testing.assert_close(together.hidden[row, own], item.hidden[item.content_mask == 1], atol=1e-5, rtol=1e-5)
    for pooling in ("cls", "last", "mean", "max"):
        read = pool(together.hidden, together.content_mask, pooling)[row]
        torch.testing.assert_close(read, pool(item.hidden, item.content_mask, pooling)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("kind", "placement"), CASES)
def test_states_and_gradients_are_those_of_a_plain_concatenation(kind: str, placement: str, load: Load) -> None:
    model = load(kind)
    torch.manual_seed(0)
    ids = torch.randint(WORDS, (1, 9))
    prompt = torch.randn(1, M, WIDTH, requires_grad=True)
    cut = {"before": 0, "after_first": 1, "after": 9, "system": 5}[placement]
    states = run(
        TextBackbone(model, placement=placement),
        prompt,
        ids,
        ones(ids),
        position=None if placement == "after" else torch.tensor([5]),
    )

    embedded = model.get_input_embeddings()(ids)
    raw = model.base_model(inputs_embeds=torch.cat([embedded[:, :cut], prompt, embedded[:, cut:]], dim=1))
    torch.testing.assert_close(states.hidden, raw.last_hidden_state, atol=1e-5, rtol=1e-5)
    is_read = [[0] * 9 + [1] * M] if placement == "after" else [[1] * cut + [0] * M + [1] * (9 - cut)]
    assert states.content_mask.tolist() == is_read
    assert states.positions.tolist() == [[*range(cut), *range(cut + M, 9 + M)]]

    upstream = torch.randn(states.hidden.shape)
    (ours,) = torch.autograd.grad((states.hidden * upstream).sum(), prompt)
    (expected,) = torch.autograd.grad((raw.last_hidden_state * upstream).sum(), prompt)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("placement", ["before", "after_first"])
def test_virtual_tokens_belong_to_the_first_of_a_pairs_segments(placement: str, load: Load) -> None:
    model = load("bert")
    torch.manual_seed(0)
    ids, types = torch.randint(WORDS, (1, 7)), torch.tensor([[0, 0, 0, 0, 1, 1, 1]])
    prompt = torch.randn(1, M, WIDTH)
    backbone = TextBackbone(model, placement=placement)
    hidden = run(backbone, prompt, ids, ones(ids), types).hidden

    embedded = model.bert.embeddings.word_embeddings(ids)
    cut = 1 if placement == "after_first" else 0
    raw = model.bert(
        inputs_embeds=torch.cat([embedded[:, :cut], prompt, embedded[:, cut:]], dim=1),
        token_type_ids=torch.tensor([[0] * (M + 4) + [1] * 3]),
    )
    torch.testing.assert_close(hidden, raw.last_hidden_state, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(hidden, run(backbone, prompt, ids, ones(ids)).hidden, atol=1e-2)


@pytest.mark.parametrize("kind", ["roberta", "gpt2", "llama"])
def test_a_model_without_segments_ignores_token_types(kind: str, load: Load) -> None:
    backbone = TextBackbone(load(kind))
    ids, prompt = torch.randint(WORDS, (2, 5)), torch.randn(2, M, WIDTH)
    with_types = run(backbone, prompt, ids, ones(ids), ones(ids))
    torch.testing.assert_close(with_types.hidden, run(backbone, prompt, ids, ones(ids)).hidden, atol=0, rtol=0)


def test_one_prompt_serves_a_whole_batch(load: Load) -> None:
    backbone = TextBackbone(load("bert"))
    ids, prompt = torch.randint(WORDS, (3, 5)), torch.randn(1, M, WIDTH)
    shared = run(backbone, prompt, ids, ones(ids))
    torch.testing.assert_close(shared.hidden, run(backbone, prompt.repeat(3, 1, 1), ids, ones(ids)).hidden)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_prompt_and_nothing_else(kind: str, load: Load) -> None:
    backbone = TextBackbone(load(kind))
    ids, prompt = torch.randint(WORDS, (2, 5)), torch.randn(2, M, WIDTH, requires_grad=True)
    states = run(backbone, prompt, ids, ones(ids))
    backbone.label_logits(states.hidden[:, -1], torch.tensor([7, 8])).square().sum().backward()
    assert (prompt.grad.abs().sum(-1) > 0).all()
    assert [name for name, p in backbone.named_parameters() if p.requires_grad or p.grad is not None] == []


def test_training_mode_reaches_the_backbone_only_if_its_dropout_was_asked_for(load: Load) -> None:
    ids, prompt = torch.randint(WORDS, (2, 5)), torch.randn(2, M, WIDTH)
    for dropout in (False, True):
        backbone = TextBackbone(load("bert"), dropout=dropout)
        whole = nn.ModuleList([backbone])
        still = run(backbone, prompt, ids, ones(ids)).hidden
        whole.train()
        assert {part.training for part in backbone.modules()} == {dropout}
        assert torch.equal(run(backbone, prompt, ids, ones(ids)).hidden, still) == (not dropout)
        whole.eval()
        assert {part.training for part in backbone.modules()} == {False}
        torch.testing.assert_close(run(backbone, prompt, ids, ones(ids)).hidden, still, atol=0, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_virtual_tokens_and_text_may_fill_the_positions_but_not_exceed_them(kind: str, load: Load) -> None:
    backbone = TextBackbone(load(kind))
    assert backbone.max_positions == 64
    prompt, ids = torch.randn(1, M, WIDTH), torch.randint(WORDS, (1, 62))
    assert run(backbone, prompt, ids[:, :61], ones(ids[:, :61])).hidden.shape == (1, 64, WIDTH)
    with pytest.raises(LoPAError, match="3 virtual tokens and 62 tokens of text are more than the 64 positions"):
        run(backbone, prompt, ids, ones(ids))


def test_relative_positions_have_no_limit(load: Load) -> None:
    model = load("bert")
    model.config.max_position_embeddings = -1
    assert TextBackbone(model).max_positions is None


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_and_table_are_the_models(kind: str, load: Load) -> None:
    model = load(kind)
    backbone = TextBackbone(model)
    assert (backbone.prompt_dim, backbone.hidden_dim) == (WIDTH, WIDTH)
    table, ids = backbone.embedding_table(), torch.arange(model.config.vocab_size)
    torch.testing.assert_close(table, model.get_input_embeddings()(ids), atol=0, rtol=0)


def test_table_holds_what_ids_stand_for_where_the_model_scales_its_embeddings() -> None:
    config = Gemma3TextConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=48,
        max_position_embeddings=64,
    )
    model = freeze(Gemma3ForCausalLM(config))
    ids = torch.arange(50)
    torch.testing.assert_close(TextBackbone(model).embedding_table()[ids], model.get_input_embeddings()(ids))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_registered_once_and_shared_by_copies_of_their_own(kind: str, load: Load) -> None:
    model = load(kind)
    backbone = TextBackbone(model)
    assert [f"model.{name}" for name in model.state_dict()] == list(backbone.state_dict())
    twin = copy.deepcopy(backbone).double()
    hidden, ids = torch.randn(2, WIDTH), torch.tensor([5, 9])
    torch.testing.assert_close(twin.label_logits(hidden.double(), ids).float(), backbone.label_logits(hidden, ids))


def test_half_precision_weights_take_a_prompt_in_full_precision(load: Load) -> None:
    backbone = TextBackbone(load("llama").bfloat16())
    ids, prompt = torch.randint(WORDS, (2, 5)), torch.randn(2, M, WIDTH, requires_grad=True)
    hidden = run(backbone, prompt, ids, ones(ids)).hidden
    hidden.float().square().sum().backward()
    assert hidden.dtype == torch.bfloat16
    assert prompt.grad.dtype == torch.float32
    assert (prompt.grad.abs().sum(-1) > 0).all()


class IdsOnly(PreTrainedModel):
    config_class = PretrainedConfig

    def forward(self, input_ids: Tensor) -> Tensor:
        return input_ids


def test_a_model_that_takes_no_embeddings_is_refused() -> None:
    with pytest.raises(LoPAError, match="IdsOnly takes no attention_mask and no inputs_embeds"):
        TextBackbone(IdsOnly(PretrainedConfig()))


@pytest.mark.parametrize("placement", ["behind", "", "Before"])
def test_unknown_placement_is_an_error_that_lists_the_choices(placement: str, load: Load) -> None:
    with pytest.raises(LoPAError, match=f"before, after_first, after, every_layer, system, user, got '{placement}'"):
        TextBackbone(load("bert"), placement=placement)


@pytest.mark.parametrize(
    ("trained", "fault"),
    [
        (0, "must be true, false, bias, or a number of last layers from 1 to 2, got 0"),
        (3, "from 1 to 2, got 3"),
        ("last", "from 1 to 2, got 'last'"),
        ("bias", "train_backbone: bias needs a backbone with biases, and LlamaForCausalLM has none"),
    ],
)
def test_weights_to_train_that_a_backbone_does_not_have_are_refused(trained: Any, fault: str, load: Load) -> None:
    with pytest.raises(LoPAError, match=fault):
        TextBackbone(load("llama"), trained=trained)


@pytest.mark.parametrize(("kind", "norm"), [("gpt2", "transformer.ln_f"), ("llama", "model.norm")])
def test_the_last_layer_is_trained_with_the_norm_after_it(kind: str, norm: str, load: Load) -> None:
    model = load(kind)
    backbone = TextBackbone(model, trained=1)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    last = {name for name, _ in model.named_parameters() if ".1." in name}
    assert trained == last | {f"{norm}.{name}" for name, _ in model.get_submodule(norm).named_parameters()}
    assert backbone.dropout


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", CAUSAL)
def test_reading_in_two_parts_is_reading_at_once(kind: str, side: str, load: Load) -> None:
    backbone, generator = TextBackbone(load(kind), placement="after"), torch.Generator().manual_seed(0)
    assert backbone.reads_in_parts
    ids, mask = padded([torch.randint(WORDS, (n,), generator=generator) for n in (7, 3, 5)], side, generator)
    prompt = torch.randn(3, M, WIDTH, generator=generator, requires_grad=True)
    for position in (None, torch.tensor([7, 3, 5]), torch.tensor([2, 3, 1]), torch.tensor([0, 0, 0])):
        parts = run(backbone, prompt, ids, mask, position=position)
        with mock.patch.object(backbone, "reads_in_parts", False):
            whole = run(backbone, prompt, ids, mask, position=position)
        upstream = torch.randn(parts.aligned().shape, generator=generator) * mask.unsqueeze(-1)
        seen = torch.randn(3, M, WIDTH, generator=generator)
        found = [
            torch.autograd.grad((states.aligned() * upstream).sum() + (virtual(states) * seen).sum(), prompt)[0]
            for states in (parts, whole)
        ]
        torch.testing.assert_close(virtual(parts), virtual(whole), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(parts.aligned()[mask == 1], whole.aligned()[mask == 1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", CAUSAL)
def test_padding_after_a_long_text_takes_no_position_that_a_model_lacks(kind: str, load: Load) -> None:
    backbone = TextBackbone(load(kind), placement="after")
    length = (backbone.max_positions or 0) - M
    ids, prompt = torch.randint(WORDS, (2, length)), torch.randn(2, M, WIDTH)
    together = run(backbone, prompt, ids, ones(ids), position=torch.tensor([length - 2, 2]))
    for row, position in enumerate((length - 2, 2)):
        alone = run(
            backbone, prompt[row : row + 1], ids[row : row + 1], ones(ids[:1]), position=torch.tensor([position])
        )
        torch.testing.assert_close(together.hidden[row], alone.hidden[0], atol=1e-5, rtol=1e-5)


def virtual(states: States) -> Tensor:
    """The hidden states of virtual tokens after a text, ``[B, m, h]``."""
    return states.hidden[states.content_mask == 1].view(len(states.hidden), -1, states.hidden.shape[-1])


def test_a_text_before_its_virtual_tokens_has_no_backward_pass(load: Load) -> None:
    backbone = TextBackbone(load("llama"), placement="after")
    ids, prompt = torch.randint(WORDS, (2, 60)), torch.randn(2, M, WIDTH, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        hidden = run(backbone, prompt, ids, ones(ids)).hidden
    with FlopCounterMode(display=False) as backward:
        hidden.sum().backward()
    assert 0 < backward.get_total_flops() < 0.15 * forward.get_total_flops()


def test_virtual_tokens_after_a_text_need_a_causal_model(load: Load) -> None:
    with pytest.raises(LoPAError, match=r"placement 'after' is for causal language models, and RobertaModel does not"):
        TextBackbone(load("roberta"), placement="after")


def test_a_mask_is_not_read_where_virtual_tokens_come_after_it(load: Load, tiny: Any) -> None:
    kind = TextKind(PretrainedSpec(tiny("llama")), "masked_lm")
    with pytest.raises(LoPAError, match="placement 'after' needs objective: causal_lm or head; a mask has not seen"):
        kind.input_spec(TextBackbone(load("llama"), placement="after"), M, None, None)

"""What every prompt encoder promises."""

from __future__ import annotations

import copy
import inspect
import multiprocessing
import pickle
from functools import partial
from pathlib import Path

import pytest
import torch

from lopa_lightning import prompts
from lopa_lightning.errors import LoPAError
from lopa_lightning.plain import arguments, class_name, find_class, subclasses
from lopa_lightning.prompts import (
    IDPG,
    DePT,
    LoPA,
    NoPrompt,
    PromptEncoder,
    PromptEncoderFactory,
    PromptTuning,
    PTuning,
    VisualPromptTuning,
    Vocabulary,
)
from tests.prompts.checks import WORDS, randomized

E, D, M = 6, 8, 4
HEADS = [
    f"{head}.{layer}.{kind}" for head in ("row_head", "column_head") for layer in (1, 3) for kind in ("weight", "bias")
]
LSTM = [
    f"lstm.{kind}_{part}_l{layer}{direction}"
    for layer in (0, 1)
    for direction in ("", "_reverse")
    for kind in ("weight", "bias")
    for part in ("ih", "hh")
]
OPTIONS = {"num_virtual_tokens": M}
Case = tuple[PromptEncoderFactory, list[str]]
METHODS: dict[str, Case] = {
    "lopa": (partial(LoPA, **OPTIONS, hidden_dim=5), ["shared_prompt.weight", *HEADS]),
    **{
        f"lopa_{combine}": (partial(LoPA, **OPTIONS, hidden_dim=5, combine=combine), ["shared_prompt.weight", *HEADS])
        for combine in ("add", "concat", "max")
    },
    "lopa_instance_only": (partial(LoPA, **OPTIONS, combine="instance_only"), HEADS),
    "prompt_tuning": (partial(PromptTuning, **OPTIONS), ["shared_prompt.weight"]),
    "idpg": (
        partial(IDPG, **OPTIONS, hidden_dim=10),
        ["shared_prompt.weight", "generator.1.weight", "generator.1.bias", "generator.3.weight"],
    ),
    "idpg_phm": (
        partial(IDPG, **OPTIONS, hidden_dim=10, phm=2),
        ["shared_prompt.weight", *(f"generator.{name}" for name in ("1.a", "1.b", "1.bias", "3.a", "3.b"))],
    ),
    "p_tuning_mlp": (
        partial(PTuning, **OPTIONS),
        ["inputs", *(f"mlp.{layer}.{kind}" for layer in (0, 2, 4) for kind in ("weight", "bias"))],
    ),
    "p_tuning_lstm": (
        partial(PTuning, **OPTIONS, encoder="lstm", hidden_dim=7),
        ["inputs", *LSTM, *(f"mlp.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias"))],
    ),
    "dept": (partial(DePT, **OPTIONS, max_length=9, rank=2), ["shared_prompt.weight", "offset_a", "offset_b"]),
    "visual": (partial(VisualPromptTuning, **OPTIONS, dropout=0.5), ["shared_prompt.weight"]),
    "none": (NoPrompt, []),
}


@pytest.fixture(params=METHODS)
def case(request: pytest.FixtureRequest) -> Case:
    return METHODS[request.param]


@pytest.fixture
def encoder(case: Case) -> PromptEncoder:
    torch.manual_seed(0)
    return case[0](D, E)


def method(factory: PromptEncoderFactory) -> type:
    return getattr(factory, "func", factory)


def instances(encoder: PromptEncoder, batch: int = 3) -> torch.Tensor | None:
    return torch.randn(batch, E) if encoder.uses_instance else None


def test_every_method_is_tested_here() -> None:
    ours = [cls for cls in subclasses([PromptEncoder])[1:] if cls.__module__.startswith("lopa_lightning.")]
    assert set(ours) == {method(factory) for factory, _ in METHODS.values()}
    assert set(ours) <= {getattr(prompts, name) for name in prompts.__all__}
    assert len({cls.__dict__["short_name"] for cls in ours}) == len(ours)


def test_a_file_in_the_folder_is_all_that_a_new_method_takes(tmp_path: Path) -> None:
    """In a process of its own, which leaves no class behind."""
    (tmp_path / "new.py").write_text(
        "from lopa_lightning.prompts import PromptTuning\n\n\nclass New(PromptTuning):\n    short_name = 'new'\n"
    )

    def name() -> None:
        prompts.__path__.append(str(tmp_path))
        exec(Path(prompts.__file__).read_text(), vars(prompts))  # as when it is imported, which would reset the path
        found = find_class("new", PromptEncoder)
        assert (found.__module__, class_name(found)) == ("lopa_lightning.prompts.new", "new")

    child = multiprocessing.get_context("fork").Process(target=name)
    child.start()
    child.join()
    assert child.exitcode == 0


def test_saved_keys_are_exactly_these(case: Case, encoder: PromptEncoder) -> None:
    assert sorted(encoder.state_dict()) == sorted(case[1])
    assert sorted(name for name, _ in encoder.named_parameters()) == sorted(case[1])


def test_groups_hold_every_parameter_once(encoder: PromptEncoder) -> None:
    grouped = [id(p) for group in encoder.parameter_groups().values() for p in group]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in encoder.parameters()}
    assert all(encoder.parameter_groups().values())


def test_prompts_have_the_announced_shape(encoder: PromptEncoder, vocabulary: Vocabulary) -> None:
    encoder.initialize(vocabulary)
    prompt = encoder(instances(encoder))
    assert prompt.shape == (3 if encoder.uses_instance else 1, encoder.num_virtual_tokens, D)
    shared, offset = encoder.shared_virtual_tokens(), encoder.token_offset()
    assert shared is None or shared.shape[1] == D
    assert offset is None or offset.shape[1] == D


def test_an_instances_prompt_does_not_depend_on_its_batch(encoder: PromptEncoder) -> None:
    if not encoder.uses_instance:
        assert encoder(None).shape[0] == 1
        return
    encoder = randomized(encoder, 0)
    batch = torch.randn(3, E, dtype=torch.float64)
    alone = torch.cat([encoder(row[None]) for row in batch])
    torch.testing.assert_close(encoder(batch), alone, atol=1e-12, rtol=1e-12)
    assert not torch.allclose(alone[0], alone[1])


def test_shapes_are_known_without_numbers(case: Case, encoder: PromptEncoder) -> None:
    with torch.device("meta"):
        skeleton = case[0](D, E)
        prompt = skeleton(torch.empty(3, E) if skeleton.uses_instance else None)
    assert {p.device.type for p in skeleton.parameters()} <= {"meta"}
    assert {n: p.shape for n, p in skeleton.named_parameters()} == {n: p.shape for n, p in encoder.named_parameters()}
    assert skeleton.num_virtual_tokens == encoder.num_virtual_tokens == prompt.shape[1]
    assert list(skeleton.parameter_groups()) == list(encoder.parameter_groups())
    assert (skeleton.token_offset() is None) == (encoder.token_offset() is None)


def test_copies_compute_the_same(encoder: PromptEncoder, vocabulary: Vocabulary) -> None:
    encoder.initialize(vocabulary)
    instance = instances(encoder.eval())
    for twin in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        assert twin.num_virtual_tokens == encoder.num_virtual_tokens
        torch.testing.assert_close(twin(instance), encoder(instance), atol=0, rtol=0)
        assert {id(p) for p in twin.parameters()}.isdisjoint(id(p) for p in encoder.parameters())


def test_a_trained_state_loads_into_an_encoder_that_starts_otherwise(case: Case, encoder: PromptEncoder) -> None:
    other = case[0](D, E, **{"init": "normal"} if "init" in arguments(method(case[0])) else {})
    randomized(encoder, 0).float()
    other.load_state_dict(encoder.state_dict())
    instance = instances(encoder)
    torch.testing.assert_close(other.eval()(instance), encoder(instance), atol=0, rtol=0)


def test_only_sizes_must_be_given(case: Case) -> None:
    found = arguments(method(case[0])).items()
    required = [name for name, argument in found if argument.default is inspect.Parameter.empty]
    assert required == ["embedding_dim", "instance_dim"]


def test_only_instances_are_dropped_and_only_in_training(case: Case, encoder: PromptEncoder) -> None:
    if not encoder.uses_instance:
        torch.testing.assert_close(encoder.train()(None), encoder.eval()(None), atol=0, rtol=0)
        return
    encoder = randomized(case[0](D, E, dropout=1.0), 0)
    instance = torch.randn(3, E, dtype=torch.float64)
    of_nothing, of_instance = encoder(torch.zeros_like(instance)), encoder(instance)
    assert not torch.allclose(of_nothing, of_instance)
    torch.testing.assert_close(encoder.train()(instance), of_nothing)
    torch.testing.assert_close(encoder.eval()(instance), of_instance)


def test_every_parameter_learns_from_the_second_step_on(
    case: Case, encoder: PromptEncoder, vocabulary: Vocabulary
) -> None:
    """From the first on where none starts at zero, behind which others have no gradient."""
    if not case[1]:
        return
    encoder.initialize(vocabulary)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        prompt, offset = encoder(instances(encoder)), encoder.token_offset()
        outputs = [prompt] if offset is None else [prompt, offset]
        sum((output * torch.randn_like(output)).sum() for output in outputs).backward()
        optimizer.step()
    assert [name for name, p in encoder.named_parameters() if p.grad is None or p.grad.abs().max() == 0] == []


def test_diagnostics_are_numbers_without_gaps(encoder: PromptEncoder, vocabulary: Vocabulary) -> None:
    encoder.initialize(vocabulary)
    for values in encoder.diagnostics(instances(encoder)).values():
        assert values.numel() > 0
        assert values.isfinite().all()


@pytest.mark.parametrize("m", [0, -1])
def test_a_method_with_virtual_tokens_needs_some(case: Case, m: int) -> None:
    if "num_virtual_tokens" not in arguments(method(case[0])):
        return
    with pytest.raises(LoPAError, match=f"^num_virtual_tokens must be at least 1, got {m}$"):
        case[0](D, E, num_virtual_tokens=m)


def test_a_width_below_one_is_refused(case: Case) -> None:
    with pytest.raises(LoPAError, match=r"^embedding_dim must be at least 1, got 0$"):
        case[0](0, E)


def test_starting_from_tokens_needs_a_vocabulary(case: Case, encoder: PromptEncoder) -> None:
    if "init" not in arguments(method(case[0])) or encoder.shared_virtual_tokens() is None:
        encoder.initialize(None)
        return
    with pytest.raises(LoPAError, match="init='vocabulary' needs a backbone with a vocabulary; use init='normal'"):
        encoder.initialize(None)
    case[0](D, E, init="normal").initialize(None)


def test_an_unknown_init_is_refused_with_the_choices(case: Case) -> None:
    if "init" not in arguments(method(case[0])):
        return
    with pytest.raises(LoPAError, match=r"^init must be one of vocabulary, .*normal, got 'zeros'$"):
        case[0](D, E, init="zeros")


def test_text_values_are_the_texts_tokens(case: Case, table: torch.Tensor, vocabulary: Vocabulary) -> None:
    if "init_text" not in arguments(method(case[0])):
        return
    encoder = case[0](D, E, init="text", init_text="good film bad")
    encoder.initialize(vocabulary)
    shared = encoder.shared_virtual_tokens()
    if shared is not None:
        ids = [WORDS[word] for word in ("good", "film", "bad", "good")]
        scale = 2 if isinstance(encoder, LoPA) and encoder.combine == "gate" else 1
        torch.testing.assert_close(shared.detach(), scale * table[ids], atol=1e-5, rtol=0)

"""Generation after a soft prompt: the model's own, whatever the batch, from a cache that is right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lopa_lightning.backbones.generation import _StopAt, check_samples, generate, generation_config
from lopa_lightning.backbones.injection import Placement
from lopa_lightning.backbones.text import TextBackbone
from lopa_lightning.errors import LoPAError
from tests.backbones.conftest import Load
from tests.tiny import run

KINDS = ["gpt2", "llama"]
TEXTS = [
    "the film",
    "a terrible story , badly told",
    "It",
    "No , it was bad and",
    "Yes",
    "Maybe it",
]
M, NEW = 3, 8


@pytest.fixture
def tokenizer(tiny: Any) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny("llama"))


def left_padded(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> dict[str, Tensor]:
    rows = [tokenizer(text)["input_ids"] for text in texts]
    width = max(map(len, rows))
    # Any token may stand at padding: the mask alone says what counts.
    ids = torch.tensor([[7] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    positions = torch.tensor([position_in(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "prompt_position": positions}


def position_in(row: list[int]) -> int:
    """Where a soft prompt stands in a text, with a placement that asks for a position: in its middle."""
    return len(row) // 2


def generated(
    backbone: TextBackbone,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Tensor,
    texts: list[str],
    options: dict[str, Any] | None = None,
    **kwargs: Any,
) -> list[list[str]]:
    config = generation_config({"max_new_tokens": NEW, **(options or {})}, tokenizer, backbone.model)
    return generate(backbone, prompts, left_padded(tokenizer, texts), config, tokenizer, **kwargs)


def soft_prompts(backbone: TextBackbone) -> Tensor:
    return torch.randn(len(TEXTS), M, backbone.prompt_dim, generator=torch.Generator().manual_seed(3))


def by_hand(backbone: TextBackbone, tokenizer: PreTrainedTokenizerBase, prompt: Tensor, text: str) -> str:
    """The likeliest token again and again, each time from the beginning: no cache, no padding, no ``generate``."""
    ids, new = tokenizer(text)["input_ids"], []
    position = torch.tensor([position_in(ids)])
    while len(new) < NEW and (not new or new[-1] != tokenizer.eos_token_id):
        whole = torch.tensor([[*ids, *new]])
        with torch.no_grad():
            hidden = run(backbone, prompt[None], whole, torch.ones_like(whole), position=position).hidden[:, -1]
            new.append(int(backbone.label_logits(hidden, torch.arange(backbone.model.config.vocab_size)).argmax()))
    return str(tokenizer.decode(new, skip_special_tokens=True))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("placement", ["before", "after_first", "after", "every_layer", "system"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_generates_what_each_text_does_alone_and_without_a_cache(
    kind: str, placement: Placement, load: Load, tokenizer: PreTrainedTokenizerBase
) -> None:
    backbone = TextBackbone(load(kind), placement=placement)
    prompts = soft_prompts(backbone)
    together = generated(backbone, tokenizer, prompts, TEXTS)
    alone = [generated(backbone, tokenizer, prompt[None], [text])[0] for prompt, text in zip(prompts, TEXTS)]
    assert together == alone
    assert together == [[by_hand(backbone, tokenizer, prompt, text)] for prompt, text in zip(prompts, TEXTS)]
    assert len({texts[0] for texts in together}) > 1


@pytest.mark.sampled(2)
@pytest.mark.parametrize("placement", ["before", "every_layer"])
@pytest.mark.parametrize("kind", KINDS)
def test_samples_depend_on_their_seed_and_not_on_the_batch(
    kind: str, placement: Placement, load: Load, tokenizer: PreTrainedTokenizerBase
) -> None:
    backbone = TextBackbone(load(kind), placement=placement)
    prompts, sampled = soft_prompts(backbone), {"do_sample": True, "temperature": 0.9, "top_p": 0.95}
    seeds = [(5, row) for row in range(len(TEXTS))]
    together = generated(backbone, tokenizer, prompts, TEXTS, sampled, num_samples=3, seeds=seeds)
    torch.manual_seed(77)
    for row in (0, 1, 5):
        alone = generated(
            backbone, tokenizer, prompts[[row]], [TEXTS[row]], sampled, num_samples=3, seeds=seeds[row : row + 1]
        )
        assert alone == [together[row]]
        one = generated(backbone, tokenizer, prompts[[row]], [TEXTS[row]], sampled, seeds=seeds[row : row + 1])
        assert one == [together[row][:1]]
    assert any(len(set(samples)) > 1 for samples in together)
    others = [(6, row) for row in range(len(TEXTS))]
    assert generated(backbone, tokenizer, prompts, TEXTS, sampled, num_samples=3, seeds=others) != together


def test_the_samples_of_a_text_share_one_reading(load: Load, tokenizer: PreTrainedTokenizerBase) -> None:
    backbone = TextBackbone(load("llama"))
    seen: list[tuple[int, ...]] = []
    backbone.body.layers[0].register_forward_hook(lambda _, inputs, __: seen.append(tuple(inputs[0].shape[:2])))
    options = {"do_sample": True, "eos_token_id": None, "max_new_tokens": 4}
    generated(backbone, tokenizer, soft_prompts(backbone)[:2], TEXTS[:2], options, num_samples=5, seeds=[0, 1])
    width = left_padded(tokenizer, TEXTS[:2])["input_ids"].shape[1] + M
    assert seen == [(2, width - 1), (10, 1), (10, 1), (10, 1), (10, 1)]


def test_samples_are_drawn_from_the_models_distribution(load: Load, tokenizer: PreTrainedTokenizerBase) -> None:
    backbone = TextBackbone(load("llama"))
    prompt, text = soft_prompts(backbone)[:1], left_padded(tokenizer, TEXTS[:1])
    config = generation_config(
        {"max_new_tokens": 1, "do_sample": True, "temperature": 2.0, "top_k": 5, "eos_token_id": None},
        tokenizer,
        backbone.model,
    )
    (texts,) = generate(backbone, prompt, text, config, tokenizer, num_samples=2000, seeds=[0])
    with torch.no_grad():
        hidden = backbone(prompt, text).hidden[:, -1]
        logits = backbone.label_logits(hidden, torch.arange(backbone.model.config.vocab_size))[0] / 2.0
    top = logits.topk(5)
    expected = torch.softmax(top.values, -1)
    last = text["input_ids"][0].tolist()[-1:]
    names = [tokenizer.decode([*last, token])[len(tokenizer.decode(last)) :] for token in top.indices]
    for name in set(names):
        share = float(expected[[name == other for other in names]].sum())
        assert texts.count(name) / 2000 == pytest.approx(share, abs=0.035)  # three standard errors of a half
    assert set(texts) <= set(names)


def test_beams_come_from_the_same_settings(load: Load, tokenizer: PreTrainedTokenizerBase) -> None:
    for placement in ("before", "every_layer"):
        backbone = TextBackbone(load("llama"), placement=placement)  # type: ignore[arg-type]
        prompts = soft_prompts(backbone)
        together = generated(backbone, tokenizer, prompts, TEXTS, {"num_beams": 4}, num_samples=2)
        alone = generated(backbone, tokenizer, prompts[[1]], TEXTS[1:2], {"num_beams": 4}, num_samples=2)
        assert alone == [together[1]]
        assert any(len(set(texts)) == 2 for texts in together)


def test_a_stop_string_ends_a_text_and_is_no_part_of_it(load: Load, tokenizer: PreTrainedTokenizerBase) -> None:
    backbone = TextBackbone(load("llama"))
    prompts = soft_prompts(backbone)
    free = generated(backbone, tokenizer, prompts, TEXTS)
    target = next(texts[0] for texts in free if len(texts[0]) > 8)
    stop = target[4:7]
    stopped = generated(backbone, tokenizer, prompts, TEXTS, stop=[stop])
    assert stopped == [[texts[0].split(stop)[0]] for texts in free]


def test_a_stop_string_is_looked_for_in_the_text_as_it_is_returned(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.clean_up_tokenization_spaces = True  # as older models say: "film ." would be read as "film."
    ids = torch.tensor([tokenizer("the film .", add_special_tokens=False)["input_ids"]])
    assert [_StopAt(tokenizer, [stop])(ids, None).tolist() for stop in ("film.", "film .")] == [[False], [True]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temprature": 1.0}, "generation has no temprature"),
        ({"num_return_sequences": 3}, "cannot set num_return_sequences"),
        ({"max_new_tokens": 0}, "generation .*max_new_tokens"),
        ({"do_sample": True, "num_beams": 2}, "do_sample: true needs num_beams: 1: a sample is drawn"),
        ({"guidance_scale": 1.5}, "guidance_scale reads the prompt's token ids"),
        ({"prefill_chunk_size": 2}, "prefill_chunk_size reads the prompt's token ids"),
        ({"encoder_repetition_penalty": 1.2}, "encoder_repetition_penalty reads the prompt's token ids"),
        ({"pad_token_id": None}, "pad_token_id must be a token's number, got None"),
        ({"eos_token_id": "x"}, "eos_token_id must be a token's number, got 'x'"),
    ],
)
def test_settings_that_are_wrong_are_named(
    options: dict[str, Any], message: str, load: Load, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(LoPAError, match=message):
        generation_config(options, tokenizer, load("llama"))


def test_a_cache_without_copies_has_one_sample(load: Load, tokenizer: PreTrainedTokenizerBase) -> None:
    config = generation_config({"cache_implementation": "static", "do_sample": True}, tokenizer, load("llama"))
    check_samples(config, 1)
    with pytest.raises(LoPAError, match="cache_implementation 'static' is for a cache that generate begins"):
        check_samples(config, 2)
    layered = TextBackbone(load("llama"), placement="every_layer")
    with pytest.raises(LoPAError, match=r"cache_implementation 'static' is .*, and placement every_layer"):
        generated(layered, tokenizer, soft_prompts(layered), TEXTS, options={"cache_implementation": "static"})


def test_do_sample_false_alone_makes_settings_of_sampling_greedy(
    load: Load, tokenizer: PreTrainedTokenizerBase
) -> None:
    model, sampled = load("llama"), {"do_sample": True, "temperature": 0.6, "top_p": 0.95}
    greedy = generation_config({**sampled, "do_sample": False}, tokenizer, model)
    assert greedy.to_dict() == generation_config({}, tokenizer, model).to_dict()
    config = generation_config(sampled, tokenizer, model)
    assert (config.temperature, config.top_p, config.top_k) == (0.6, 0.95, 0)  # not a model's or transformers' own 50


def test_several_samples_of_a_greedy_text_are_refused(load: Load, tokenizer: PreTrainedTokenizerBase) -> None:
    backbone = TextBackbone(load("llama"))
    with pytest.raises(LoPAError, match="2 samples need do_sample: true"):
        generated(backbone, tokenizer, soft_prompts(backbone)[:1], TEXTS[:1], num_samples=2)

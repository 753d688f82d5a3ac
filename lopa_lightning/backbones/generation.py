"""Text after a soft prompt, through transformers' own ``generate``."""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from lopa_lightning.backbones.injection import position_ids
from lopa_lightning.backbones.prefix import cache_input
from lopa_lightning.backbones.pretrained import accepted_inputs
from lopa_lightning.backbones.text import TextBackbone
from lopa_lightning.errors import LoPAError, one_line

# Said in full, so that a model's own defaults do not decide what nobody wrote down.
_GREEDY: dict[str, Any] = {"do_sample": False, "num_beams": 1, "max_new_tokens": 256}
_SAMPLED: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
_OF_SAMPLING = {*_SAMPLED, "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"}
# What transformers builds of a field, which it checks only once it generates; and the value for which it does not.
_CHECKS: dict[str, tuple[Any, float]] = {
    "temperature": (TemperatureLogitsWarper, 1.0),
    "top_k": (TopKLogitsWarper, 0),
    "top_p": (TopPLogitsWarper, 1.0),
    "min_p": (MinPLogitsWarper, 0.0),
    "typical_p": (TypicalLogitsWarper, 1.0),
    "epsilon_cutoff": (EpsilonLogitsWarper, 0.0),
    "eta_cutoff": (EtaLogitsWarper, 0.0),
    "repetition_penalty": (RepetitionPenaltyLogitsProcessor, 1.0),
    "no_repeat_ngram_size": (NoRepeatNGramLogitsProcessor, 0),
}
_OURS = ("num_return_sequences", "stop_strings", "max_length", "use_cache", "return_dict_in_generate")


def generation_config(
    options: Mapping[str, Any] | None, tokenizer: PreTrainedTokenizerBase, model: Any
) -> GenerationConfig:
    """Settings of transformers' ``generate``.

    Args:
        options: Fields of ``GenerationConfig``; what is not given is greedy, and in sampling neither cut nor scaled.
        tokenizer: The backbone's, for the end and padding tokens.
        model: The backbone; what it was published to end with is an end as well.

    Raises:
        LoPAError: If there is no such field, a value is not allowed, or the field is decided elsewhere.
    """
    given, make = dict(options or {}), cast(Any, GenerationConfig)
    known = {name for name in make().to_dict() if not name.startswith("_")}
    if unknown := sorted(set(given) - known):
        raise LoPAError(f"generation has no {', '.join(unknown)}; see transformers' GenerationConfig")
    if ours := sorted(set(given) & set(_OURS)):
        raise LoPAError(f"generation cannot set {', '.join(ours)}: use max_new_tokens, num_samples and stop")
    sampled = _SAMPLED if given.get("do_sample") else {}
    if not sampled:  # so that do_sample: false alone, put over settings of sampling, is greedy
        given = {name: value for name, value in given.items() if name not in _OF_SAMPLING}
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = [ends] if isinstance(ends, int) else ends or []
    ends = sorted({end for end in [*ends, tokenizer.eos_token_id] if end is not None and end < len(tokenizer)})
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    try:
        config = make(**{**_GREEDY, **sampled, "eos_token_id": ends, "pad_token_id": pad, **given})
        config.validate(strict=True)
        for name, (check, unused) in _CHECKS.items():
            if getattr(config, name) not in (None, unused):
                check(getattr(config, name))
    except (ValueError, TypeError) as error:
        raise LoPAError(f"generation {given}: {one_line(error)}") from error
    for name in ("max_new_tokens", "num_beams"):
        if type(value := getattr(config, name)) is not int or value < 1:
            raise LoPAError(f"generation {given}: {name} must be a whole number, at least 1; got {value!r}")
    return cast(GenerationConfig, config)


def check_generates(model: Any, is_needed: bool = True) -> None:
    """Checks that a model can continue a soft prompt, as transformers itself does once it generates.

    Args:
        model: A causal language model; weights are not needed.
        is_needed: Whether something is about to be generated. If not, there is a warning alone.

    Raises:
        LoPAError: If its ``generate`` takes no embeddings.
    """
    prepare = getattr(model, "prepare_inputs_for_generation", None)
    if prepare is not None and "inputs_embeds" in inspect.signature(prepare).parameters:
        return
    fault = (
        f"{type(model).__name__} cannot generate after virtual tokens: its generate takes token ids alone, no "
        "embeddings (inputs_embeds); use another backbone"
    )
    if is_needed:
        raise LoPAError(fault)
    rank_zero_warn(f"{fault}, or learn completions that predict, test and generate will refuse to write")


def check_samples(config: GenerationConfig, num_samples: int) -> None:
    """Checks that a text can have that many continuations.

    Raises:
        LoPAError: If there is only the likeliest one, or there are fewer beams.
    """
    beams = config.num_beams or 1
    if num_samples > 1 and not (config.do_sample and beams == 1) and beams < num_samples:
        raise LoPAError(f"{num_samples} samples need do_sample: true, or num_beams of at least as many; got {beams}")


@torch.no_grad()
def generate(
    backbone: TextBackbone,
    prompt: Tensor,
    text: tuple[Tensor, Tensor],
    config: GenerationConfig,
    tokenizer: PreTrainedTokenizerBase,
    num_samples: int = 1,
    seeds: Sequence[Any] = (),
    stop: Sequence[str] = (),
    offset: Tensor | None = None,
    synced: bool = False,
) -> list[list[str]]:
    """Continues texts, each with its own soft prompt.

    Samples are drawn by inverting the cumulative distribution at one uniform number for each token, from
    a generator of each sample's own: they depend on its seed alone, not on the batch. All samples of
    a text share one reading of it.

    Args:
        backbone: A causal language model.
        prompt: Soft prompts ``[B, m, d]``, or ``[1, m, d]`` for all.
        text: Token ids and mask of the texts, ``[B, T]`` each, padded on the left.
        config: Of transformers.
        tokenizer: The backbone's.
        num_samples: Continuations of each text; with beams, the best of them.
        seeds: One for each text, of any type that has a ``repr``; needed to sample.
        stop: Strings that end a continuation, which does not contain them.
        offset: See :meth:`Backbone.forward`.
        synced: Whether processes wait for each other in every layer: one that is done goes on until all are.

    Returns:
        Continuations, ``num_samples`` for each text.

    Raises:
        LoPAError: If more than one continuation is asked for where there is only one, or of too few beams.
    """
    check_samples(config, num_samples)
    beams = config.num_beams or 1
    embeddings, mask, cache = backbone.to_continue(prompt, *text, offset)
    options: dict[str, Any] = {"num_return_sequences": num_samples} if beams > 1 else {}
    options["synced_gpus"] = synced
    repeats = 1 if beams > 1 else num_samples
    if repeats > 1:
        embeddings, mask, cache = _shared(backbone, embeddings, mask, cache, repeats)
    elif beams > 1 and cache is not None:
        cache.batch_repeat_interleave(beams)
    if cache is not None:
        options[str(cache_input(backbone.body))] = cache
    if config.do_sample and beams == 1:
        drawn = [_uniforms((seed, sample), int(config.max_new_tokens)) for seed in seeds for sample in range(repeats)]
        uniforms = torch.stack(drawn).to(embeddings.device)
        options["custom_generate"] = functools.partial(_sample, uniforms=uniforms, synced=synced)
    tails = [ids[-1:] for ids in text[0].tolist()]
    tails = [tail for tail in tails for _ in range(num_samples)]
    if stop:
        options["stopping_criteria"] = StoppingCriteriaList([_StopAt(tokenizer, stop)])
    ids = backbone.model.generate(  # type: ignore[operator]
        inputs_embeds=embeddings, attention_mask=mask, generation_config=config, **options
    )
    written = [_decoded(tokenizer, tail, row, stop) for tail, row in zip(tails, ids.tolist())]
    return [written[start : start + num_samples] for start in range(0, len(written), num_samples)]


def _shared(
    backbone: TextBackbone, embeddings: Tensor, mask: Tensor, cache: Cache | None, repeats: int
) -> tuple[Tensor, Tensor, Cache | None]:
    """Reads the texts once, all but their last token, and repeats what was read."""
    model, width = backbone.body, embeddings.shape[1]
    known = cache.get_seq_length() if cache is not None else 0
    cache_name = cache_input(model)
    if width - 1 > known and cache_name is not None:
        cache = DynamicCache(config=model.config) if cache is None else cache
        plain = (DynamicLayer, DynamicSlidingWindowLayer)
        if all(type(layer) in plain for layer in cache.layers) and "use_cache" in accepted_inputs(model):
            options: dict[str, Any] = {cache_name: cache, "use_cache": True}
            if "position_ids" in accepted_inputs(model):
                options["position_ids"] = position_ids(mask)[:, known:-1]
            model(inputs_embeds=embeddings[:, known:-1], attention_mask=mask[:, :-1], **options)
        else:
            cache = None  # a state that is no list of tokens: every sample reads for itself
    mask = mask.repeat_interleave(repeats, 0)
    if cache is None:
        return embeddings.repeat_interleave(repeats, 0), mask, None
    cache.batch_repeat_interleave(repeats)
    # Only the last place is read; the others need no memory.
    return embeddings[:, -1:].repeat_interleave(repeats, 0).expand(-1, width, -1), mask, cache


def _uniforms(seed: Any, count: int) -> Tensor:
    digest = hashlib.sha256(repr(seed).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
    return torch.rand(count, generator=generator, dtype=torch.float64)


def _sample(
    model: Any,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    generation_config: GenerationConfig,
    uniforms: Tensor,
    synced: bool,
    **options: Any,
) -> Any:
    """The loop of transformers itself, in which the last processor leaves one token to choose."""
    logits_processor.append(_Draw(uniforms, input_ids.shape[1]))
    generation_config.do_sample = False
    # Of its own arguments, transformers hands over none that _sample has too.
    options |= {"synced_gpus": synced, "generation_config": generation_config}
    return type(model)._sample(model, input_ids, logits_processor, **options)


class _Draw(LogitsProcessor):
    """Chooses the token at which the cumulative distribution passes a row's next uniform number."""

    def __init__(self, uniforms: Tensor, start: int) -> None:
        self.uniforms = uniforms
        self.start = start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        cumulative = torch.softmax(scores.double(), -1).cumsum(-1)
        threshold = self.uniforms[:, input_ids.shape[1] - self.start, None] * cumulative[:, -1:]
        chosen = torch.searchsorted(cumulative, threshold, right=True).clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, float("-inf")).scatter(1, chosen, 0.0)


class _StopAt(StoppingCriteria):
    """Ends a row once the end of its text holds one of some strings."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.stop = stop
        # A token holds a byte at least. A few more, for those that hold none.
        self.window = max(len(text.encode()) for text in stop) + 4

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        tails = self.tokenizer.batch_decode(input_ids[:, -self.window :].tolist(), skip_special_tokens=True)
        return torch.tensor([any(text in tail for text in self.stop) for tail in tails], device=input_ids.device)


def _decoded(tokenizer: PreTrainedTokenizerBase, tail: list[int], ids: list[int], stop: Sequence[str]) -> str:
    """What ids add to a text that ends in ``tail``: some tokenizers drop the space before a text's first token."""
    before, whole, alone = (
        str(tokenizer.decode(part, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        for part in (tail, [*tail, *ids], ids)
    )
    written = whole[len(before) :] if whole.startswith(before) else alone
    return written[: min((place for text in stop if (place := written.find(text)) >= 0), default=len(written))]

"""Text after a soft prompt, through transformers' own ``generate``."""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation import logits_process

from lopa_lightning.backbones.base import Batch
from lopa_lightning.backbones.injection import position_ids
from lopa_lightning.backbones.prefix import cache_input
from lopa_lightning.backbones.pretrained import accepted_inputs, first_position
from lopa_lightning.backbones.text import TextBackbone
from lopa_lightning.errors import LoPAError, listed, one_line, shown

# Said in full, so that a model's own defaults do not decide what nobody wrote down.
_GREEDY: dict[str, Any] = {"do_sample": False, "num_beams": 1, "max_new_tokens": 256}
_SAMPLED: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
# What transformers builds of a field, which it checks only once it generates; and the value for which it does not.
_OF_SAMPLING: dict[str, tuple[Any, float | None]] = {  # in the order in which they are applied
    "temperature": (logits_process.TemperatureLogitsWarper, 1.0),
    "top_h": (logits_process.TopHLogitsWarper, None),
    "top_k": (logits_process.TopKLogitsWarper, 0),
    "top_p": (logits_process.TopPLogitsWarper, 1.0),
    "min_p": (logits_process.MinPLogitsWarper, 0.0),
    "typical_p": (logits_process.TypicalLogitsWarper, 1.0),
    "epsilon_cutoff": (logits_process.EpsilonLogitsWarper, 0.0),
    "eta_cutoff": (logits_process.EtaLogitsWarper, 0.0),
}
_CHECKS: dict[str, tuple[Any, float | None]] = {
    **_OF_SAMPLING,
    "repetition_penalty": (logits_process.RepetitionPenaltyLogitsProcessor, 1.0),
    "no_repeat_ngram_size": (logits_process.NoRepeatNGramLogitsProcessor, 0),
}
# What is made of a prompt's token ids, or of parts of it, and crashes or does nothing without them.
_IDLE = {"guidance_scale": 1, "prefill_chunk_size": None, "encoder_repetition_penalty": 1}
_OURS = {"num_return_sequences", "stop_strings", "max_length", "use_cache", "return_dict_in_generate"}
_OURS |= {"watermarking_config"}  # marks what transformers draws, and tokens are drawn here


def generation_config(
    options: Mapping[str, Any] | None, tokenizer: PreTrainedTokenizerBase, model: Any
) -> GenerationConfig:
    """Builds the settings of transformers' ``generate``.

    Args:
        options: Fields of ``GenerationConfig``; what is not given is greedy, and in sampling neither cut nor scaled.
        tokenizer: The backbone's, for the end and padding tokens.
        model: The backbone; what it was published to end with is an end as well.

    Raises:
        LoPAError: If there is no such field, a value is not allowed or does not go with another, or the field is
            decided elsewhere.
    """
    given, make = dict(options or {}), cast(Any, GenerationConfig)
    if unknown := sorted(set(given) - {name for name in make().to_dict() if not name.startswith("_")}):
        raise LoPAError(f"generation has no {', '.join(unknown)}; see transformers' GenerationConfig")
    if ours := sorted(set(given) & _OURS):
        raise LoPAError(f"generation cannot set {', '.join(ours)}: use max_new_tokens, num_samples and stop")
    sampled = _SAMPLED if given.get("do_sample") else {}
    given = given if sampled else _greedy(given)
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = [*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id]
    ends = sorted({end for end in ends if end is not None and end < len(tokenizer)})
    pad = next((each for each in (tokenizer.pad_token_id, tokenizer.eos_token_id) if each is not None), 0)
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
    _check_fields(given, config)
    if config.do_sample and config.num_beams != 1:
        raise LoPAError(
            f"generation {given}: do_sample: true needs num_beams: 1: a sample is drawn token by token, by its own seed"
        )
    return cast(GenerationConfig, config)


def _check_fields(given: Mapping[str, Any], config: Any) -> None:
    """Refuses what transformers takes, and stumbles over once it generates after embeddings."""
    for name, unused in _IDLE.items():
        if getattr(config, name, None) not in (None, unused):
            raise LoPAError(f"generation {given}: {name} reads the prompt's token ids, which virtual tokens have not")
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id or 0]
    for name, values in {"pad_token_id": [config.pad_token_id], "eos_token_id": ends}.items():
        if name in given and any(type(value) is not int for value in values):
            raise LoPAError(f"generation {given}: {name} must be a token's number, got {getattr(config, name)!r}")


def _greedy(given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns options without those of sampling: ``do_sample: false`` alone, put over them, is greedy."""
    if "do_sample" not in given and (
        idle := [
            name
            for name, (_, unused) in _OF_SAMPLING.items()
            if given.get(name) not in (None, unused, {"temperature": 0, "top_k": 1}.get(name))  # which mean greedy
        ]
    ):
        rank_zero_warn(f"generation has {', '.join(idle)} without do_sample: true, and is greedy")
    return {name: value for name, value in given.items() if name not in _OF_SAMPLING}


def stop_strings(stop: Sequence[str]) -> list[str]:
    """Returns the strings that end a continuation as a list.

    Raises:
        LoPAError: If it is one string, or one of them is empty, or none.
    """
    found = listed("stop", stop)
    if wrong := [text for text in found if not isinstance(text, str) or not text]:
        raise LoPAError(f"stop must be a list of texts that are not empty, got {shown(wrong[0])} among them")
    return found


def check_generates(model: Any, is_needed: bool = True) -> None:
    """Checks that a model can continue a soft prompt, as transformers itself does once it generates.

    Args:
        model: A causal language model; weights are not needed.
        is_needed: Whether something is about to be generated. If not, there is a warning alone.

    Raises:
        LoPAError: If its ``generate`` takes no embeddings, or counts their positions otherwise than in training.
    """
    prepare = getattr(model, "prepare_inputs_for_generation", None)
    if prepare is None or "inputs_embeds" not in inspect.signature(prepare).parameters:
        why = "takes token ids alone, no embeddings (inputs_embeds)"
    elif (first := first_position(model.base_model)) > 0:
        why = f"counts positions from 0, and the model was trained with positions from {first}"
    else:
        return
    fault = f"{type(model).__name__} cannot generate after virtual tokens: its generate {why}; use another backbone"
    if is_needed:
        raise LoPAError(fault)
    rank_zero_warn(f"{fault}, or learn completions that predict, test and generate will refuse to generate")


def check_samples(config: GenerationConfig, num_samples: int) -> None:
    """Checks that a text can have that many continuations.

    Raises:
        LoPAError: If there is only the likeliest one, there are fewer beams, or the cache cannot be copied.
    """
    beams = config.num_beams or 1
    if num_samples > 1 and beams == 1 and config.cache_implementation is not None:
        raise LoPAError(
            f"cache_implementation {config.cache_implementation!r} is for a cache that generate begins, and a text is "
            f"read once for its {num_samples} samples; leave it out, or use num_samples: 1"
        )
    if num_samples > 1 and not config.do_sample and beams < num_samples:
        raise LoPAError(f"{num_samples} samples need do_sample: true, or num_beams of at least as many; got {beams}")


@torch.no_grad()
def generate(
    backbone: TextBackbone,
    prompt: Tensor,
    texts: Batch,
    config: GenerationConfig,
    tokenizer: PreTrainedTokenizerBase,
    num_samples: int = 1,
    seeds: Sequence[Any] = (),
    stop: Sequence[str] = (),
    offset: Tensor | None = None,
    synced: bool = False,
) -> list[list[str]]:
    """Continues texts, each with its own soft prompt, and returns ``num_samples`` continuations of each.

    They are the likeliest ones, or drawn as :class:`_Draw` says.

    Args:
        backbone: A causal language model.
        prompt: Soft prompts ``[B, m, d]``, or ``[1, m, d]`` for all.
        texts: What :meth:`TextBackbone.forward` reads, padded on the left.
        config: Of transformers.
        tokenizer: The backbone's.
        num_samples: Continuations of each text; with beams, the best of them.
        seeds: One for each text, of any type that has a ``repr``; needed to sample.
        stop: Strings that end a continuation, which does not contain them.
        offset: See :meth:`TextBackbone.forward`.
        synced: Whether processes wait for each other in every layer: one that is done goes on until all are.

    Raises:
        LoPAError: See :func:`check_samples`.
    """
    check_samples(config, num_samples)
    options: dict[str, Any] = {"synced_gpus": synced, "generation_config": config}
    embeddings, mask, cache = backbone.to_continue(prompt, texts, offset)
    if (beams := config.num_beams or 1) > 1:
        options["num_return_sequences"] = num_samples
        if cache is not None:
            cache.batch_repeat_interleave(beams)
    elif num_samples > 1:
        embeddings, mask, cache = _read_once(backbone, embeddings, mask, cache, num_samples)
    if cache is not None:
        if config.cache_implementation is not None:
            what = f"cache_implementation {config.cache_implementation!r}"
            raise LoPAError(
                f"{what} is for a cache that generate begins, and placement every_layer fills one; leave it out"
            )
        options[str(cache_input(backbone.body))] = cache
    if config.do_sample:
        options |= _drawn(config, seeds, num_samples, embeddings.device)
    if stop:
        options["stopping_criteria"] = StoppingCriteriaList([_StopAt(tokenizer, stop)])
    ids = backbone.model.generate(inputs_embeds=embeddings, attention_mask=mask, **options)  # type: ignore[operator]
    before = texts["input_ids"].repeat_interleave(num_samples, 0)[:, -1:].tolist()
    continued = [_decoded(tokenizer, tail, row, stop) for tail, row in zip(before, ids.tolist())]
    return [continued[start : start + num_samples] for start in range(0, len(continued), num_samples)]


def _read_once(
    backbone: TextBackbone, embeddings: Tensor, mask: Tensor, cache: Cache | None, repeats: int
) -> tuple[Tensor, Tensor, Cache | None]:
    """Reads the texts once, all but their last token, and repeats what was read."""
    model, width, accepted = backbone.body, embeddings.shape[1], accepted_inputs(backbone.body)
    known, cache_name = cache.get_seq_length() if cache is not None else 0, cache_input(model)
    if width - 1 > known and cache_name is not None:
        cache = DynamicCache(config=model.config) if cache is None else cache
        plain = {DynamicLayer, DynamicSlidingWindowLayer}
        if "use_cache" in accepted and {type(layer) for layer in cache.layers} <= plain:
            options: dict[str, Any] = {cache_name: cache, "use_cache": True}
            if "position_ids" in accepted:
                options["position_ids"] = position_ids(mask)[:, known:-1]
            model(inputs_embeds=embeddings[:, known:-1], attention_mask=mask[:, :-1], **options)
        else:
            cache = None  # a state that is no list of tokens: every sample reads for itself
    mask = mask.repeat_interleave(repeats, 0)
    if cache is None:
        return embeddings.repeat_interleave(repeats, 0), mask, None
    cache.batch_repeat_interleave(repeats)
    # Only the last position is read; the others need no memory.
    return embeddings[:, -1:].repeat_interleave(repeats, 0).expand(-1, width, -1), mask, cache


def _drawn(config: GenerationConfig, seeds: Sequence[Any], num_samples: int, device: torch.device) -> dict[str, Any]:
    """Returns what ``generate`` is given so that its greedy search finds the one token that was drawn."""
    processors = LogitsProcessorList()
    for name, (make, unused) in _OF_SAMPLING.items():
        if (value := getattr(config, name)) not in (None, unused):
            processors.append(make(value, device=device) if name == "eta_cutoff" else make(value))
    rows = [(seed, index) for seed in seeds for index in range(num_samples)]
    processors.append(_Draw(rows, int(config.max_new_tokens), device))
    config = copy.copy(config)
    cast(Any, config).update(do_sample=False, **dict.fromkeys(_OF_SAMPLING))
    return {"generation_config": config, "logits_processor": processors}


class _Draw(LogitsProcessor):
    """Chooses the token at which the cumulative distribution passes a row's next uniform number.

    The numbers come from a generator of each row's own: samples depend on their seed alone, not on the batch. With
    embeddings in place of a text's ids, there are as many ids as tokens generated so far.
    """

    def __init__(self, seeds: Sequence[Any], count: int, device: torch.device) -> None:
        uniforms = []
        for seed in seeds:
            digest = hashlib.sha256(repr(seed).encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
            uniforms.append(torch.rand(count, generator=generator, dtype=torch.float64))
        self.uniforms = torch.stack(uniforms).to(device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        cumulative = torch.softmax(scores.double(), -1).cumsum(-1)
        threshold = self.uniforms[:, input_ids.shape[1], None] * cumulative[:, -1:]
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
        tails = self.tokenizer.batch_decode(
            input_ids[:, -self.window :].tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return torch.tensor([any(text in tail for text in self.stop) for tail in tails], device=input_ids.device)


def _decoded(tokenizer: PreTrainedTokenizerBase, tail: list[int], ids: list[int], stop: Sequence[str]) -> str:
    """Returns what ids add to a text that ends in ``tail``: some tokenizers drop the space before a first token."""
    before, whole, alone = (
        str(tokenizer.decode(part, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        for part in (tail, [*tail, *ids], ids)
    )
    added = whole[len(before) :] if whole.startswith(before) else alone
    return added[: min((index for text in stop if (index := added.find(text)) >= 0), default=len(added))]

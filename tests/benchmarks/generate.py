"""Tokens per second of ``module.generate`` against transformers' own, and n samples of a problem against n calls.

``plain`` is the frozen model's ``generate`` from the same number of tokens (virtual ones replaced by as many real ones)
to the same number of new ones, tokenising and decoding included on both sides. ``together`` writes all samples of a
problem in one call, ``singly`` in a call each.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch

from lopa_lightning import CausalLMModule
from lopa_lightning.data.completion import CompletionDataModule
from tests.benchmarks.cases import CASES, Case, Places, chosen, places_of
from tests.benchmarks.harness import Row, parser, ratios, report, summary, take_turns

_CASES = {name: case for name, case in CASES.items() if case.is_causal}
_COLUMNS = {
    "case": "case",
    "prompt_tokens": "tokens read",
    "new_tokens": "tokens written",
    "ours": "ours, tokens/s",
    "plain": "plain generate, tokens/s",
    "over_plain": "ours / plain",
    "samples": "samples n",
    "together": "n together, tokens/s",
    "singly": "n calls, tokens/s",
    "over_singly": "together / singly",
    "goals": "goals",
}


def problems(case: Case, places: Places, count: int) -> list[str]:
    """Prompts of the test half."""
    data = case.data(places, None)
    assert isinstance(data, CompletionDataModule)
    return [data.example("test", index).prompt for index in range(count)]


def plain(module: CausalLMModule, texts: list[str], new_tokens: int) -> torch.Tensor:
    """What transformers' ``generate`` makes of texts with as many tokens before them as there are virtual ones.

    Args:
        module: With loaded weights.
        texts: Prompts; cut from the left as ours are.
        new_tokens: To write for each.

    Returns:
        Ids of what was read and written, ``[B, m + T + new_tokens]``.
    """
    assert module.net is not None
    tokenizer: Any = module.input_spec.tokenizer
    model: Any = module.net.backbone.model
    m, limit = module.net.prompt_encoder.num_virtual_tokens, module.input_spec.max_tokens
    pad = tokenizer.eos_token_id
    rows = [tokenizer(text)["input_ids"] for text in texts]
    rows = rows if limit is None else [ids[-(limit - new_tokens) :] for ids in rows]
    rows = [[*(ids[:1] * m), *ids] for ids in rows]
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    written: torch.Tensor = model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=False,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        pad_token_id=pad,
    )
    tokenizer.batch_decode(written[:, width:].tolist(), skip_special_tokens=True)
    return written


def measure(case: Case, places: Places, rounds: int, texts: int, new_tokens: int, samples: int) -> Row:
    """A line of the table."""
    module = case.module(places)
    assert isinstance(module, CausalLMModule)
    module.configure_model()
    module.learned = True  # as if
    module.eval()
    prompts = problems(case, places, texts)
    length = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens}
    sampled = {**length, "do_sample": True, "temperature": 0.6, "top_p": 0.95}
    one = prompts[:1]
    seconds = take_turns(
        {
            "ours": functools.partial(module.generate, prompts, length, batch_size=texts),
            "plain": functools.partial(plain, module, prompts, new_tokens),
            "together": functools.partial(module.generate, one, sampled, num_samples=samples),
            "singly": lambda: [module.generate(one, sampled, num_samples=1, seed=seed) for seed in range(samples)],
        },
        rounds,
    )
    counts = {"ours": texts, "plain": texts, "together": samples, "singly": samples}
    return {
        "case": case.name,
        "prompt_tokens": plain(module, prompts, new_tokens).shape[1] - new_tokens,
        "new_tokens": new_tokens,
        "texts": texts,
        "samples": samples,
        **{k: summary([counts[k] * new_tokens / each for each in values]) for k, values in seconds.items()},
        "over_plain": ratios(seconds["plain"], seconds["ours"]),
        "over_singly": ratios(seconds["singly"], seconds["together"]),
        "goals": ">= 0.95, >= 2",
        "seconds": seconds,
    }


def main(arguments: list[str] | None = None) -> None:
    """Runs the benchmark."""
    options = parser("generate", __doc__)
    options.add_argument("--texts", type=int, default=4, help="prompts in a batch")
    options.add_argument("--new-tokens", type=int, default=32, help="tokens to write for each")
    options.add_argument("--samples", type=int, default=10, help="samples of one problem")
    given = options.parse_args(arguments)
    places, rounds = places_of(given), 2 if given.quick else given.rounds
    sizes = (2, 4, 3) if given.quick else (given.texts, given.new_tokens, given.samples)
    rows = [measure(case, places, rounds, *sizes) for case in chosen(given, _CASES)]
    report("generate", given, rows, _COLUMNS)


if __name__ == "__main__":
    main(sys.argv[1:])

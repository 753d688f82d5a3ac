"""Labels texts by the log probabilities that a server gives of label words. No network here."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import torch

from lopa_lightning.errors import LoPAError

MOST_WORDS = 20  # logprobs that a server returns at most for a token, by default


def labelling(
    words: Mapping[str, int], path: str = "chat/completions"
) -> Generator[dict[str, Any], Any, dict[str, Any]]:
    """Yields the options of each request that labels a text, is sent its answer, and returns what ``predict`` does.

    Words that are not among the likeliest tokens are asked for one by one, where a server does not know
    ``logprob_token_ids``.

    Args:
        words: Token of each label's word.
        path: Of the requests, see :class:`~lopa_lightning.serving.requests.ServedRequest`.
    """
    every, found = list(words.values()), dict[int, float]()
    groups = [every[first : first + MOST_WORDS] for first in range(0, len(every), MOST_WORDS)]
    for group in groups:
        found |= word_logprobs((yield word_options(group, path)), group)
    missing = [word for word in every if word not in found]
    for word in missing:
        found |= word_logprobs((yield word_options([word], path)), [word])
    return label_record(words, found, len(groups) + len(missing))


def word_options(words: Sequence[int], path: str) -> dict[str, Any]:
    """Returns the options of a request whose answer is one of some tokens, with their log probabilities."""
    extra = {"allowed_token_ids": words, "logprob_token_ids": words, "return_tokens_as_token_ids": True}
    answer: dict[str, Any] = {"temperature": 0, "max_tokens": 1, "extra_body": extra}
    if path == "completions":
        return {**answer, "logprobs": MOST_WORDS}
    return {**answer, "logprobs": True, "top_logprobs": MOST_WORDS}


def word_logprobs(answer: Any, words: Sequence[int]) -> dict[int, float]:
    """Returns log probabilities of first tokens that an answer names, those of ``words`` alone.

    Raises:
        LoPAError: If the answer has none.
    """
    logprobs = answer.choices[0].logprobs
    named: dict[str, float] = {}
    if logprobs is not None and getattr(logprobs, "content", None):  # of a chat
        first = logprobs.content[0]
        named = {each.token: each.logprob for each in (*first.top_logprobs, first)}
    elif logprobs is not None and getattr(logprobs, "top_logprobs", None):
        named = dict(logprobs.top_logprobs[0] or {})
    if not named:
        raise LoPAError("the server sent no logprobs, by which labels are chosen")
    found = {token.removeprefix("token_id:"): value for token, value in named.items()}
    return {word: found[str(word)] for word in words if str(word) in found}


def label_record(words: Mapping[str, int], logprobs: Mapping[int, float], requests: int) -> dict[str, Any]:
    """Returns what ``predict`` does: a label, and the probabilities of all.

    Args:
        words: Token of each label's word.
        logprobs: Of each of these tokens.
        requests: How many answers they come from.

    Raises:
        LoPAError: If one is not there, or they cannot be compared over several answers.
    """
    if missing := [label for label, word in words.items() if word not in logprobs]:
        raise LoPAError(f"the server sent no log probability for the words of {', '.join(missing)}")
    values = torch.tensor([logprobs[word] for word in words.values()], dtype=torch.float64)
    if requests > 1 and values.exp().sum() > 1.001:
        raise LoPAError(
            f"the label words' probabilities sum to {math.exp(values.logsumexp(0)):.3g} over {requests} requests: the "
            "server must run with --logprobs-mode raw_logprobs, its default"
        )
    named = dict(zip(words, values.softmax(0).tolist()))
    return {"label": max(named, key=lambda label: named[label]), "probabilities": named}

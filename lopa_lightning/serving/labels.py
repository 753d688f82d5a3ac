"""Labels texts by the log probabilities that a server gives of label words. No network here."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from lopa_lightning.errors import LoPAError

MOST_WORDS = 20  # logprobs that a server returns at most for a token, by default


class Labelling:
    """Labels a text by what a server answers: iterate over the options of its requests, and :meth:`add` each answer.

    Words that are not among the likeliest tokens are asked for one by one, where a server does not know
    ``logprob_token_ids``.

    Args:
        words: Token of each label's word.
        path: Of the requests, see :class:`~lopa_lightning.serving.requests.ServedRequest`.
    """

    def __init__(self, words: Mapping[str, int], path: str = "chat/completions") -> None:
        self.words, self.path, self.requests = words, path, 0
        self._asked: Sequence[int] = ()
        self._found: dict[int, float] = {}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        every = list(self.words.values())
        for first in range(0, len(every), MOST_WORDS):
            yield self._options(every[first : first + MOST_WORDS])
        for word in [word for word in every if word not in self._found]:
            yield self._options([word])

    def _options(self, words: Sequence[int]) -> dict[str, Any]:
        self._asked, self.requests = words, self.requests + 1
        return word_options(words, self.path)

    def add(self, answer: Any) -> None:
        """Takes the answer to the last request.

        Raises:
            LoPAError: If it has no log probabilities.
        """
        self._found |= word_logprobs(answer, self._asked)

    def record(self) -> dict[str, Any]:
        """Returns what ``predict`` does: a label, and the probabilities of all.

        Raises:
            LoPAError: If a word has no log probability, or they cannot be compared over several answers.
        """
        if missing := [label for label, word in self.words.items() if word not in self._found]:
            raise LoPAError(f"the server sent no log probability for the words of {', '.join(missing)}")
        values = torch.tensor([self._found[word] for word in self.words.values()], dtype=torch.float64)
        if self.requests > 1 and values.exp().sum() > 1.001:
            raise LoPAError(
                f"the label words' probabilities sum to {math.exp(values.logsumexp(0)):.3g} over {self.requests} "
                "requests: the server must run with --logprobs-mode raw_logprobs, its default"
            )
        named = dict(zip(self.words, values.softmax(0).tolist()))
        return {"label": max(named, key=lambda label: named[label]), "probabilities": named}


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

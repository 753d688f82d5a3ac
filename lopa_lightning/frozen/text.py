"""What a data module must know of the frozen models to turn text into batches for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PreTrainedTokenizerBase

from lopa_lightning.errors import LoPAError
from lopa_lightning.prompts.base import Vocabulary

Objective = Literal["masked_lm", "causal_lm", "head"]


@dataclass(frozen=True)
class TextSpec:
    """Tokenizers and lengths of the frozen models.

    Attributes:
        tokenizer: The backbone's.
        max_tokens: Tokens of text that fit into the backbone beside the virtual tokens; None if not limited.
        objective: How an answer is read, which decides what a template looks like.
        instance_tokenizer: The instance encoder's; None if no instance vector is needed.
        instance_max_tokens: Tokens that the instance encoder reads at most; None if not limited.
    """

    tokenizer: PreTrainedTokenizerBase
    max_tokens: int | None
    objective: Objective
    instance_tokenizer: PreTrainedTokenizerBase | None
    instance_max_tokens: int | None


def label_word_ids(tokenizer: PreTrainedTokenizerBase, words: list[str]) -> list[int]:
    """The token of each label word as it stands in running text, after a space.

    Args:
        tokenizer: The backbone's.
        words: The verbalizer's words, one for each label.

    Raises:
        LoPAError: If a word is not one token, or two words are the same one.
    """
    ids: list[int] = []
    for word in words:
        # Seen after another word, as in a sentence: byte-pair tokenizers have a token of its own for that.
        context = tokenizer.encode("x", add_special_tokens=False)
        tokens = tokenizer.encode(f"x {word}", add_special_tokens=False)[len(context) :]
        if len(tokens) != 1 or tokens[0] == tokenizer.unk_token_id:
            pieces = tokenizer.convert_ids_to_tokens(tokens)
            raise LoPAError(
                f"label word {word!r} must be one token of the backbone, but it is {pieces}; choose another word"
            )
        ids += tokens
    if len(set(ids)) < len(ids):
        raise LoPAError(f"the label words {words} must differ in their tokens, got {ids}")
    return ids


def vocabulary(
    tokenizer: PreTrainedTokenizerBase, size: int, embed: Callable[[torch.Tensor], torch.Tensor]
) -> Vocabulary:
    """The backbone's tokens, for soft prompts to start from.

    Args:
        tokenizer: The backbone's.
        size: Rows V of its embedding table, which may be fewer than the tokenizer's tokens.
        embed: Token ids ``[n]`` to what stands for them where virtual tokens go, ``[n, d]``.
    """
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    ordinary = [
        index
        for token, index in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
        if index < size and index not in special and not token.startswith("[unused")
    ]
    return Vocabulary(embed, ordinary, lambda text: tokenizer.encode(text, add_special_tokens=False))

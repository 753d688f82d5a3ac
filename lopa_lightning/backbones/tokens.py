"""Token ids of label words, of running text, and of the tokens that soft prompts are initialised from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from lopa_lightning.errors import LoPAError
from lopa_lightning.prompts.base import Vocabulary

_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


def label_word_ids(
    tokenizer: PreTrainedTokenizerBase, words: list[str], answer: Callable[[str], str] | None = None
) -> list[int]:
    """Returns the token of each label word as it stands in running text, after a space.

    Args:
        tokenizer: The backbone's.
        words: The verbalizer's words, one for each label.
        answer: Maps a word to what a chat's answer begins with; None where words stand in running text.

    Raises:
        LoPAError: If a word is not one token, or two words are the same one.
    """
    ids: list[int] = []
    for word in words:
        # Seen after another word, as in a sentence: byte-pair tokenizers have a token of its own for that.
        before, whole = ("", answer(word)) if answer is not None else ("x", f"x {word}")
        context = tokenizer.encode(before, add_special_tokens=False)
        tokens = tokenizer.encode(whole, add_special_tokens=False)[len(context) :]
        if len(tokens) != 1 or tokens[0] == tokenizer.unk_token_id:
            pieces = tokenizer.convert_ids_to_tokens(tokens)
            raise LoPAError(
                f"label word {word!r} must be one token of the backbone, but it is {pieces}; choose another word"
            )
        ids += tokens
    if len(set(ids)) < len(ids):
        raise LoPAError(f"the label words {words} must differ in their tokens, got {ids}")
    return ids


def check_token_ids(tokenizer: PreTrainedTokenizerBase, rows: int, name: str) -> None:
    """Checks that a model has an embedding for each token that its tokenizer may give it.

    Special tokens without a role (padding, mask, ...) that the chat template does not have either are in no text.

    Args:
        tokenizer: The model's.
        rows: Rows of its embedding table.
        name: What it is called, for the message.

    Raises:
        LoPAError: If there is a token without an embedding.
    """
    template = str(tokenizer.chat_template or "")
    unused = {
        index
        for index, token in tokenizer.added_tokens_decoder.items()
        if token.special and token.content not in template
    }
    unused -= {getattr(tokenizer, f"{role}_token_id") for role in _ROLES}
    beyond = {token: index for token, index in tokenizer.get_vocab().items() if index >= rows and index not in unused}
    if beyond:
        token = min(beyond, key=lambda token: beyond[token])
        raise LoPAError(
            f"{name!r} has no embedding for {len(beyond)} of its tokenizer's tokens, such as {token!r} with id "
            f"{beyond[token]}: the table has {rows} rows, for ids below that; save the model after "
            "resize_token_embeddings, or the tokenizer without the token"
        )


def vocabulary(tokenizer: PreTrainedTokenizerBase, size: int, embed: Callable[[Tensor], Tensor]) -> Vocabulary:
    """Returns the backbone's tokens, from which soft prompts are initialised.

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
    return Vocabulary(embed, ordinary, lambda text: tokenizer.encode(text, add_special_tokens=False), tokenizer.decode)


def running_ids(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], with_special: bool = False
) -> list[list[int]]:
    """Returns the token ids of texts that stand within a longer one.

    Args:
        tokenizer: A fast one.
        texts: The texts.
        with_special: Whether what looks like a special token is one, as in a chat that a template wrote.

    Returns:
        Ids without special tokens around them.
    """
    if not texts:
        return []
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_attention_mask=False,
        split_special_tokens=not with_special,
        verbose=False,  # the warning on long texts would come before they are cut
    )
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def end_of(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_tokens: int | None) -> dict[str, list[Any]]:
    """Encodes texts with special tokens around them; of what is too long, the end.

    Args:
        tokenizer: A fast one.
        texts: The texts.
        max_tokens: Tokens of one at most, special ones included; None for no limit.

    Returns:
        ``input_ids``, ``token_type_ids`` where the tokenizer has them, and ``truncated``, a list of bools.
    """
    options: dict[str, Any] = {"return_attention_mask": False, "split_special_tokens": True, "verbose": False}
    side = tokenizer.truncation_side
    tokenizer.truncation_side = "left"
    try:
        encoded = tokenizer(list(texts), truncation=max_tokens is not None, max_length=max_tokens, **options)
    finally:
        tokenizer.truncation_side = side
        tokenizer.backend_tokenizer.no_truncation()  # it is part of what a tokenizer is told apart by
    found = {key: list(encoded[key]) for key in ("input_ids", "token_type_ids") if key in encoded}
    return {**found, "truncated": [bool(each.overflowing) for each in encoded.encodings or []]}


def cut_left(prompts: Sequence[list[int]], room: int, kept: int = 0) -> list[list[int]]:
    """Cuts prompts from the left, behind the tokens that every text starts with; warns of it.

    Args:
        prompts: Token ids.
        room: Tokens of one at most.
        kept: Tokens at its start that stay.

    Example:
        >>> cut_left([[1, 5, 6], [1, 5]], 3, kept=1)
        [[1, 5, 6], [1, 5]]
    """
    if long := sum(len(ids) > room for ids in prompts):
        rank_zero_warn(f"{long} of {len(prompts)} prompts were cut to their last {room} tokens")
    return [ids if len(ids) <= room else [*ids[:kept], *ids[kept - room :]] for ids in prompts]


def padded(rows: Sequence[list[int]], pad_id: int, side: str, device: Any = None) -> tuple[Tensor, Tensor]:
    """Returns token ids as a batch, and the mask that is 1 at them, each ``[B, T]``.

    Args:
        rows: Token ids.
        pad_id: At padding.
        side: Where it goes.
        device: Of the batch.

    Example:
        >>> padded([[5, 6], [7]], 0, "left")
        (tensor([[5, 6],
                [0, 7]]), tensor([[1, 1],
                [0, 1]]))
    """
    tensors = [torch.tensor(row) for row in rows]
    ids, mask = (
        pad_sequence(each, batch_first=True, padding_value=value, padding_side=side)
        for each, value in ((tensors, pad_id), ([torch.ones_like(row) for row in tensors], 0))
    )
    return ids.to(device), mask.to(device)  # at once: each copy to a GPU waits for it

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lopa_lightning.backbones.base import Objective
from lopa_lightning.backbones.text_spec import TextSpec

TokenizerOf = Callable[[str], PreTrainedTokenizerBase]
SpecOf = Callable[..., TextSpec]


@pytest.fixture(scope="session")
def tokenizer(tiny: Callable[[str], str]) -> TokenizerOf:
    """The tokenizer of a tiny model, by the model's kind."""
    return functools.cache(lambda kind: AutoTokenizer.from_pretrained(tiny(kind)))


@pytest.fixture(scope="session")
def text_spec(tokenizer: TokenizerOf) -> SpecOf:
    """What a module would ask of its data, by the kinds of its frozen models."""

    def make(
        kind: str = "bert",
        objective: Objective = "head",
        max_tokens: int | None = None,
        instance: str | None = None,
        instance_max_tokens: int | None = None,
    ) -> TextSpec:
        instance_tokenizer = None if instance is None else tokenizer(instance)
        return TextSpec(tokenizer(kind), max_tokens, objective, instance_tokenizer, instance_max_tokens)

    return make

"""The tiny models of the tests are the same wherever they are made."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from transformers import PreTrainedTokenizerFast

from tests.tiny import bert_tokenizer, causal_tokenizer, roberta_tokenizer


@pytest.mark.parametrize("make", [bert_tokenizer, roberta_tokenizer, causal_tokenizer])
def test_a_tokenizer_made_twice_is_the_same(make: Callable[[], PreTrainedTokenizerFast]) -> None:
    assert make().backend_tokenizer.to_str() == make().backend_tokenizer.to_str()

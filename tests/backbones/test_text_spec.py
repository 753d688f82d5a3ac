from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lopa_lightning.backbones.pretrained import PretrainedSpec, load_tokenizer
from lopa_lightning.backbones.tokens import label_word_ids, vocabulary
from lopa_lightning.errors import LoPAError

TOKENIZERS = ["bert", "roberta", "gpt2"]


@pytest.fixture
def tokenizer_of(tiny: Callable[[str], str]) -> Callable[[str], PreTrainedTokenizerBase]:
    return lambda kind: load_tokenizer(PretrainedSpec(tiny(kind)))


TokenizerOf = Callable[[str], PreTrainedTokenizerBase]


@pytest.mark.parametrize(
    ("kind", "tokens"),
    [
        ("bert", ["great", "terrible", "yes"]),
        ("roberta", ["Ġgreat", "Ġterrible", "ĠYes"]),
        ("gpt2", ["Ġgreat", "Ġterrible", "ĠYes"]),
    ],
)
def test_a_label_word_is_its_token_in_running_text(kind: str, tokens: list[str], tokenizer_of: TokenizerOf) -> None:
    tokenizer = tokenizer_of(kind)
    ids = label_word_ids(tokenizer, ["great", "terrible", "Yes"])
    assert tokenizer.convert_ids_to_tokens(ids) == tokens
    sentence = tokenizer.encode("the film was great", add_special_tokens=False)
    assert sentence[-1] == ids[0]


@pytest.mark.parametrize("kind", ["roberta", "gpt2"])
def test_a_word_of_several_tokens_is_refused_with_its_tokens(kind: str, tokenizer_of: TokenizerOf) -> None:
    pieces = tokenizer_of(kind).tokenize(" zebra")
    assert len(pieces) > 1
    with pytest.raises(
        LoPAError, match=re.escape("label word 'zebra' must be one token") + ".*" + re.escape(str(pieces))
    ):
        label_word_ids(tokenizer_of(kind), ["great", "zebra"])


@pytest.mark.parametrize("word", ["great film", "", "zebra"])
def test_words_that_are_not_one_known_token_are_refused(word: str, tokenizer_of: TokenizerOf) -> None:
    with pytest.raises(LoPAError, match=f"label word '{word}' must be one token"):
        label_word_ids(tokenizer_of("bert"), [word])


def test_words_that_become_the_same_token_are_refused(tokenizer_of: TokenizerOf) -> None:
    for kind, words in (("gpt2", ["good", "bad", "good"]), ("bert", ["Yes", "yes"])):
        with pytest.raises(LoPAError, match=re.escape(f"label words {words} must differ")):
            label_word_ids(tokenizer_of(kind), words)
    assert len(set(label_word_ids(tokenizer_of("gpt2"), ["Yes", "No"]))) == 2


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_vocabulary_is_every_token_but_the_special_ones(kind: str, tokenizer_of: TokenizerOf) -> None:
    tokenizer = tokenizer_of(kind)
    specials = {"bert": {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"}, "gpt2": {"<|endoftext|>"}}.get(
        kind, {"<s>", "<pad>", "</s>", "<unk>", "<mask>"}
    )
    table = torch.randn(len(tokenizer), 4)
    found = vocabulary(tokenizer, len(table), table.__getitem__)
    assert set(tokenizer.convert_ids_to_tokens(list(found.ordinary_ids))) == set(tokenizer.get_vocab()) - specials
    assert len(set(found.ordinary_ids)) == len(found.ordinary_ids) == len(tokenizer) - len(specials)
    assert torch.equal(found.embed(torch.tensor([3, 1])), table[[3, 1]])


@pytest.fixture
def words() -> PreTrainedTokenizerFast:
    """A tokenizer with reserved tokens, as BERT's, and one that was added later."""
    names = ["[PAD]", "[UNK]", "[unused0]", "good", "bad", "[unused1]", "film"]
    backend = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")
    tokenizer.add_tokens(["[USER]"], special_tokens=True)
    return tokenizer


def test_reserved_and_added_tokens_are_not_ordinary(words: PreTrainedTokenizerFast) -> None:
    assert list(vocabulary(words, 8, torch.zeros(8, 4).__getitem__).ordinary_ids) == [3, 4, 6]


def test_tokens_without_an_embedding_are_not_ordinary(words: PreTrainedTokenizerFast) -> None:
    assert list(vocabulary(words, 5, torch.zeros(5, 4).__getitem__).ordinary_ids) == [3, 4]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_text_becomes_tokens_without_special_ones(kind: str, tokenizer_of: TokenizerOf) -> None:
    tokenizer = tokenizer_of(kind)
    encode = vocabulary(tokenizer, len(tokenizer), torch.zeros(len(tokenizer), 4).__getitem__).encode
    tokens = {"bert": ["the", "film"]}.get(kind, ["the", "Ġfilm"])
    assert tokenizer.convert_ids_to_tokens(encode("the film")) == tokens

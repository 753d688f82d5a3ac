"""Tiny models with random weights and real tokenizers, saved as folders that ``from_pretrained`` loads."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

from lopa_lightning.backbones.base import States
from lopa_lightning.backbones.pretrained import PretrainedSpec
from lopa_lightning.backbones.text import TextBackbone
from lopa_lightning.backbones.text_spec import TextKind

TEXTS = [
    "the film was great and the cast was good",
    "a terrible story , badly told",
    "It was great . Yes , it was good",
    "No , it was bad and terrible",
    "Maybe the second half of it is better than the first",
    "Question : do both mean the same ? Answer : Yes No Maybe",
    "this is correct but that is incorrect",
    "True or false",
]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% if m.role == 'assistant' %}<|endoftext|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
POSITIONS = 64
WIDTH = 32


def bert_tokenizer() -> PreTrainedTokenizerFast:
    # Not trained: the trainer breaks ties at random, and two tokenizers may differ in size.
    words = sorted(set(" ".join(TEXTS).lower().split()))
    letters = sorted(set("".join(words)))
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters), *words]
    pieces += [f"word{number}" for number in range(40)]  # tests draw ids up to 100
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ids = {name: tokenizer.token_to_id(name) for name in ("[CLS]", "[SEP]")}
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"]))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def _byte_tokenizer(specials: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=specials, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXTS * 20, trainer)
    return tokenizer


def roberta_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = _byte_tokenizer(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    ids = {name: tokenizer.token_to_id(name) for name in ("<s>", "</s>")}
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", ids["</s>"]), ("<s>", ids["<s>"]))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        cls_token="<s>",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
        model_input_names=["input_ids", "attention_mask"],
    )


def causal_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = _byte_tokenizer(["<|endoftext|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", model_input_names=["input_ids", "attention_mask"]
    )


def save_tiny(kind: str, folder: Path) -> str:
    """Saves a tiny model and its tokenizer, and returns the folder."""
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    torch.manual_seed(sum(map(ord, kind)))
    if kind in ("bert", "bert_base"):
        tokenizer = bert_tokenizer()
        config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=POSITIONS, **sizes)
        model = BertForMaskedLM(config) if kind == "bert" else BertModel(config)
    elif kind == "roberta":
        tokenizer = roberta_tokenizer()
        config = RobertaConfig(
            vocab_size=len(tokenizer), max_position_embeddings=POSITIONS + 2, type_vocab_size=1, pad_token_id=1, **sizes
        )
        model = RobertaForMaskedLM(config)
    elif kind == "gpt2":
        tokenizer = causal_tokenizer()
        config = GPT2Config(vocab_size=len(tokenizer), n_positions=POSITIONS, n_embd=WIDTH, n_layer=2, n_head=4)
        model = GPT2LMHeadModel(config)
    elif kind in ("llama", "chat"):
        tokenizer = causal_tokenizer()
        tokenizer.chat_template = CHAT_TEMPLATE if kind == "chat" else None
        config = LlamaConfig(
            vocab_size=len(tokenizer), max_position_embeddings=POSITIONS, num_key_value_heads=2, **sizes
        )
        model = LlamaForCausalLM(config)
    else:
        raise ValueError(kind)
    for parameter in model.parameters():  # large enough that every token matters to the fifth digit
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.tie_weights()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


TEXT = TextKind(PretrainedSpec("any"), "head")
"""Reads tokens with whatever model it is given."""


def run(
    backbone: TextBackbone,
    prompt: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor,
    token_type_ids: Tensor | None = None,
    offset: Tensor | None = None,
    position: Tensor | None = None,
) -> States:
    """Calls a backbone with the entries of a batch, each ``[B, T]`` but ``position [B]``."""
    batch = {"input_ids": input_ids, "attention_mask": attention_mask}
    if position is not None:
        batch["prompt_position"] = position
    return backbone(prompt, batch if token_type_ids is None else {**batch, "token_type_ids": token_type_ids}, offset)


def on_hub(folder: str, name: str, commit: str, cache: Path) -> None:
    """Puts a model into a cache of the hub as huggingface_hub lays it out, at the branch main."""
    at = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, at / "snapshots" / commit, dirs_exist_ok=True)
    (at / "refs").mkdir(exist_ok=True)
    (at / "refs" / "main").write_text(commit)

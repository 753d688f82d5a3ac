"""Writes the checkpoints that every later version must load: one folder for each format.

``python -m tests.checkpoints.write format_1`` wrote the first, with the code that had this format. For a new
format run it with a new name; never write an old folder again. For a new argument of a class that checkpoints name, run
it with ``defaults``. The backbones lie beside them, with 2 layers of
width 8 and 30 words. A batch is all of the data, so that nothing depends on the order of examples.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lopa_lightning import (
    IDPG,
    CausalLMModule,
    ClassificationModule,
    CompletionDataModule,
    InstanceEncoderSpec,
    LoPA,
    LoPALightningModule,
    NoPrompt,
    PretrainedSpec,
    PromptEncoder,
    PromptTuning,
    Task,
    TextClassificationDataModule,
    Verbalizer,
)
from lopa_lightning.migrations import FORMAT
from lopa_lightning.plain import defaults, subclasses

HERE = Path(__file__).parent
TEXTS = {"the film was great": "good", "a bad story": "bad", "the cast was good": "good", "it was terrible": "bad"}
_SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[END]"]
_WORDS = "the film was great a bad story cast good it terrible . is and not no yes but half better than this true"
_SIZES: dict[str, Any] = {
    "vocab_size": len(_SPECIALS) + len(_WORDS.split()),
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "max_position_embeddings": 24,
}
_TINY: dict[str, Any] = {"num_virtual_tokens": 2, "init": "normal"}


def write_backbone(kind: str) -> None:
    """Saves a model of random weights with a tokenizer of whole words."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*_SPECIALS, *_WORDS.split()])}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "eos_token": "[END]"}
    inputs = ["input_ids", "attention_mask"]
    if kind == "bert":
        tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
        names |= {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
        inputs = ["input_ids", "token_type_ids", "attention_mask"]
    torch.manual_seed(1)
    model: Any = BertForMaskedLM(BertConfig(**_SIZES)) if kind == "bert" else LlamaForCausalLM(LlamaConfig(**_SIZES))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.tie_weights()
    model.save_pretrained(HERE / kind)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=inputs, **names).save_pretrained(HERE / kind)


def module(name: str) -> LoPALightningModule:
    """Returns the module of a checkpoint, as its writer configured it. Backbones are named from this folder."""
    method: Any = {
        "lopa": functools.partial(LoPA, rank=1, hidden_dim=3, dropout=0.0, **_TINY),
        "prompt_tuning": functools.partial(PromptTuning, **_TINY),
        "idpg": functools.partial(IDPG, hidden_dim=3, dropout=0.0, num_virtual_tokens=2),
        "deep": functools.partial(LoPA, rank=1, hidden_dim=3, dropout=0.0, **_TINY),
        "head": NoPrompt,
        "causal_lm": functools.partial(LoPA, rank=1, hidden_dim=3, dropout=0.0, combine="add", **_TINY),
    }[name]
    options: dict[str, Any] = {
        "backbone": PretrainedSpec("llama" if name == "causal_lm" else "bert"),
        "prompt_encoder": method,
        "optimizer": functools.partial(torch.optim.AdamW, lr=0.02),
    }
    if name == "causal_lm":
        return CausalLMModule(generation={"max_new_tokens": 3}, **options)
    if name == "lopa":
        options |= {"warmup": 1, "learning_rates": {"shared_prompt": 0.05}}
        options["lr_scheduler"] = functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=10)
    elif name == "idpg":
        options["instance_encoder"] = InstanceEncoderSpec("bert", pooling="cls", normalize=False)
    elif name == "deep":
        options["placement"] = "every_layer"
    return ClassificationModule(objective="head" if name == "head" else "masked_lm", **options)


def data(name: str, folder: Path) -> LightningDataModule:
    """Returns the data of a checkpoint, the same rows in every split."""
    file = folder / f"{name}.jsonl"
    rows = [{"text": f"{text} .", "label": label, "completion": f" it is {label}"} for text, label in TEXTS.items()]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if not file.is_file() or file.read_text() != text:  # else what ``datasets`` made of it would be made again
        file.write_text(text)
    files = {split: str(file) for split in ("train", "validation", "test")}
    options: dict[str, Any] = {"data_files": files, "batch_size": len(rows), "num_workers": 0}
    if name == "causal_lm":
        return CompletionDataModule(prompt_column="text", **options)
    template = ("{text} it was {mask}",)
    words = ["great", "terrible"]
    return TextClassificationDataModule(labels=["good", "bad"], words=words, template=template, **options)


def trainer(folder: Path, epochs: int) -> Trainer:
    """Returns a Trainer that keeps the last checkpoint in a folder."""
    return Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        callbacks=[ModelCheckpoint(folder, filename="last", enable_version_counter=False)],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
    )


def loss(model: LoPALightningModule, name: str, folder: Path, path: Path | None = None) -> float:
    """Returns the loss on the data, with a checkpoint's weights or the module's own."""
    (found,) = trainer(folder, 1).validate(model, data(name, folder), ckpt_path=path, verbose=False)
    return round(found["val/loss"], 6)


def known_defaults() -> dict[str, dict[str, Any]]:
    """Returns the defaults of our arguments that a checkpoint may leave out, by class."""
    named = [cls for cls in subclasses((PromptEncoder, LoPALightningModule)) if cls.__dict__.get("short_name")]
    ours = [cls for cls in named if cls.__module__.startswith("lopa_lightning.")]
    classes = [*ours, PretrainedSpec, InstanceEncoderSpec, Task, Verbalizer]
    return {cls.__name__: {key: value for key, value in defaults(cls).items() if key != "optimizer"} for cls in classes}


def write_defaults(into: Path) -> None:
    """Adds the defaults of new arguments; one that is there stays, whatever it is now."""
    path = into / "defaults.json"
    written = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(_with_new(written, known_defaults()), indent=2, sort_keys=True) + "\n")


def _with_new(written: Any, now: Any) -> Any:
    """Adds what is new, also among the arguments of an argument."""
    if not isinstance(written, dict) or not isinstance(now, dict):
        return written
    return {**now, **{key: _with_new(value, now.get(key)) for key, value in written.items()}}


NAMES = ("lopa", "prompt_tuning", "idpg", "deep", "head", "causal_lm")


def write(into: Path, scratch: Path) -> None:
    """Writes every checkpoint after 3 steps, and its loss there and after 3 steps more."""
    into.mkdir()
    expected = {}
    for name in NAMES:
        folder = scratch / name
        folder.mkdir()
        seed_everything(1)
        trainer(folder, 3).fit(module(name), data(name, folder))
        path = (folder / "last.ckpt").rename(into / f"{name}.ckpt")
        saved = loss(module(name), name, folder, path)
        model = module(name)
        trainer(folder, 6).fit(model, data(name, folder), ckpt_path=path)
        expected[name] = {"saved": saved, "resumed": loss(model, name, folder)}
    (into / "expected.json").write_text(json.dumps(expected, indent=2) + "\n")
    write_defaults(into)


if __name__ == "__main__":
    os.chdir(HERE)
    if sys.argv[1] == "defaults":
        write_defaults(HERE / f"format_{FORMAT}")
        raise SystemExit
    for kind in ("bert", "llama"):
        if not (HERE / kind).is_dir():
            write_backbone(kind)
    with tempfile.TemporaryDirectory() as scratch:
        write(HERE / sys.argv[1], Path(scratch))

"""Checkpoints of every kind of task, trained for a step on tiny models."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lopa_lightning import (
    DePT,
    ImageClassificationDataModule,
    ImageClassificationModule,
    InstanceEncoderSpec,
    LoPALightningModule,
    NoPrompt,
    PretrainedSpec,
    PromptTuning,
    VisualPromptTuning,
)
from tests.data.image_files import write_images
from tests.modules.helpers import LoPATiny, causal, completions, module, reviews, trainer, with_own_encoder
from tests.tiny_images import save_vision, vision_model

Tiny = Callable[[str], str]
LORA = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj", "v_proj"]}
IA3 = {"peft_type": "IA3", "target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
_SOFT = functools.partial(PromptTuning, num_virtual_tokens=3)
_KINDS: dict[str, dict[str, Any]] = {
    "completion": {},
    "words": {"objective": "causal_lm"},
    "trained encoder": {"objective": "causal_lm", "reads": {"trainable": True}},
    "adapted encoder": {
        "objective": "causal_lm",
        "prompt_encoder": functools.partial(LoPATiny, heads_init="normal"),  # a gradient at the first step
        "reads": {"adapter": {"peft_type": "LORA", "r": 2}},
    },
    "control": {"objective": "causal_lm", "reads": {"control": "constant"}},
    "soft": {"prompt_encoder": _SOFT},
    "soft words": {"prompt_encoder": _SOFT, "objective": "causal_lm"},
    "soft mask": {"prompt_encoder": _SOFT, "objective": "masked_lm"},
    "masked": {"objective": "masked_lm"},
    "head": {"objective": "head"},
    "backbone": {"encoder": "backbone"},
    "every layer": {"placement": "every_layer"},
    "after first": {"placement": "after_first", "prompt_encoder": _SOFT},
    "after": {"placement": "after"},
    "words after": {"placement": "after", "objective": "causal_lm"},
    "chat system": {"placement": "system"},
    "chat user": {"placement": "user"},
    "chat words": {"placement": "system", "objective": "causal_lm"},
    "soft in a chat": {"placement": "system", "prompt_encoder": _SOFT},
    "dept": {"prompt_encoder": functools.partial(DePT, num_virtual_tokens=2, max_length=4, rank=2)},
    "lora": {"prompt_encoder": NoPrompt, "adapter": LORA},
    "lora words": {"prompt_encoder": NoPrompt, "adapter": LORA, "objective": "causal_lm"},
    "ia3": {"prompt_encoder": NoPrompt, "adapter": IA3},
    "full": {"prompt_encoder": NoPrompt, "train_backbone": True},
}


def checkpoint(kind: str, folder: Path, tiny: Tiny, backbone: str | None = None) -> tuple[LoPALightningModule, Path]:
    """Trains a module for a step; returns it in eval mode, with its checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    options = dict(_KINDS[kind])
    encoder, own = options.pop("encoder", None), options.pop("reads", {})
    if encoder is None:
        options["instance_encoder"] = with_own_encoder(tiny("bert_base"), **own, max_length=12)
    objective = options.get("objective")
    default = "chat" if options.get("placement") in ("system", "user") else "llama"
    name = backbone or tiny("bert" if objective == "masked_lm" else default)
    model: Any = causal(name, **options) if objective is None else module(name, **options)
    run = trainer(folder, callbacks=[], max_steps=1, limit_val_batches=0, enable_checkpointing=False)
    # In a chat no space is before a word, and the template has tokens of its own.
    reads: dict[str, Any] = {"max_length": 60, "words": ["Yes", "No"]} if default == "chat" else {"max_length": 30}
    run.fit(model, completions(folder / "data") if objective is None else reviews(folder, **reads))
    run.save_checkpoint(folder / "best.ckpt")
    return model.eval(), folder / "best.ckpt"


_DEEP = {"placement": "every_layer"}
IMAGE_KINDS: dict[str, dict[str, Any]] = {
    "vpt shallow": {"prompt_encoder": functools.partial(PromptTuning, num_virtual_tokens=3)},
    "vpt deep": {"prompt_encoder": functools.partial(VisualPromptTuning, num_virtual_tokens=3), **_DEEP},
    "lopa": {"prompt_encoder": LoPATiny, "reads": {"name": "clip", "pooling": "cls"}},
    "lopa, same pixels": {"prompt_encoder": LoPATiny, "reads": {"name": "deit"}},
    "lopa of the backbone": {"prompt_encoder": LoPATiny},
    "lopa deep": {"prompt_encoder": LoPATiny, "reads": {"name": "deit"}, **_DEEP},
    "linear probe": {"prompt_encoder": NoPrompt},
}


def image_home(folder: Path) -> Path:
    """Writes images and tiny models; that of CLIP has another image processor."""
    for kind, processor in {"vit": {}, "deit": {}, "clip": {"image_mean": [0.1, 0.2, 0.3], "resample": 3}}.items():
        save_vision(vision_model(kind), folder / kind, **processor)
    write_images(str(folder / "images"))
    return folder


def image_checkpoint(kind: str, home: Path) -> tuple[ImageClassificationModule, Path]:
    """Trains a module on images for a step, with models named from their folder; returns it with its checkpoint."""
    options = dict(IMAGE_KINDS[kind])
    if own := options.pop("reads", None):
        options["instance_encoder"] = InstanceEncoderSpec(**own)
    model = ImageClassificationModule(backbone=PretrainedSpec("vit"), **options)
    path = home / f"{kind}.ckpt"
    run = trainer(home, callbacks=[], max_steps=1, limit_val_batches=0, enable_checkpointing=False)
    run.fit(model, ImageClassificationDataModule(path=os.path.join(home, "images"), view="crop_flip", batch_size=6))
    with torch.no_grad():
        for value in filter(lambda each: each.requires_grad, model.parameters()):
            value += 0.3 * torch.randn_like(value)  # so that all of it matters
    run.save_checkpoint(path)
    return model.eval(), path

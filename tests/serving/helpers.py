"""Checkpoints of every kind of task, trained for a step on tiny models."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lopa_lightning import DePT, LoPALightningModule, NoPrompt, PromptTuning
from tests.modules.helpers import LoPATiny, causal, completions, module, reviews, trainer, with_own_encoder

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

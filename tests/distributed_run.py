"""What each of the two processes runs: fit, validate, and save what this process saw."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.strategies import DDPStrategy

from lopa_lightning import (
    CosineDecay,
    ImageClassificationDataModule,
    ImageClassificationModule,
    InstanceEncoderSpec,
    NoPrompt,
    PretrainedSpec,
)
from lopa_lightning.instances.encoder import InstanceEncoder
from tests.modules.helpers import LoPATiny, causal, completions, module, reviews, trainer
from tests.modules.test_window import OPTIONS, SIZES, UNEQUAL, Windows

MATCHING: dict[str, Any] = {
    "prompt_encoder": NoPrompt,
    "train_backbone": True,
    "exact_match": 5,
    "generation": {"max_new_tokens": 3},
}

INSTANCE_LOSSES = (0.0, 0.5)

# A step as large as the gradient, where AdamW makes a whole step of a gradient that is all rounding.
SGD = functools.partial(torch.optim.SGD, lr=0.1)


def encoder_at_every_step(backbone: str, folder: Path) -> dict[str, torch.Tensor]:
    """The same fit without vectors from the disk."""
    seed_everything(3)
    model = module(backbone, objective="head", optimizer=SGD, instance_encoder=InstanceEncoderSpec(cache=False))
    run = trainer(folder / "plain", epochs=2, devices=2, strategy=DDPStrategy(process_group_backend="gloo"))
    run.fit(model, reviews(folder, rows=21))
    return model.state_dict()


def adapted(
    backbone: str, folder: Path, batch_size: int, instance_loss: float = 0.0, **devices: Any
) -> dict[str, torch.Tensor]:
    """A fit of an adapted instance encoder, without dropout, whose every step reads all rows."""
    seed_everything(3)
    encoder = InstanceEncoderSpec(adapter={"peft_type": "LORA", "r": 2})
    prompt = functools.partial(LoPATiny, dropout=0.0)
    # Without Adam's scale, little reaches an encoder behind MLPs that start near 0.
    rates = {"low_rank": 3.0, "instance_encoder": 1.0 if instance_loss else 1e3}
    options: dict[str, Any] = {"objective": "head", "optimizer": SGD, "learning_rates": rates}
    options |= {"instance_encoder": encoder, "prompt_encoder": prompt, "instance_loss": instance_loss}
    model = module(backbone, **options)
    run = trainer(folder, epochs=4, num_sanity_val_steps=0, limit_val_batches=0, **devices)
    run.fit(model, reviews(folder, rows=12, batch_size=batch_size))
    return model.state_dict()


def of_images(folder: Path, batch_size: int, epochs: int = 3, **devices: Any) -> dict[str, Any]:
    """What is learned from images in parts drawn at random, where every step reads all of them, and the scores."""
    seed_everything(3)
    options: dict[str, Any] = {"prompt_encoder": functools.partial(LoPATiny, dropout=0.0), "placement": "every_layer"}
    options |= {"optimizer": SGD, "lr_scheduler": CosineDecay}
    model = ImageClassificationModule(backbone=PretrainedSpec(str(folder / "vit")), **options)
    run = trainer(folder, epochs, callbacks=[], num_sanity_val_steps=0, **devices)
    data = ImageClassificationDataModule(path=str(folder / "images"), view="crop_flip", batch_size=batch_size)
    run.fit(model, data)
    (validated,) = run.validate(model, data, verbose=False)
    return {"state": model.state_dict(), "validated": validated}


def accumulated(backbone: str, folder: Path, size: dict[str, int]) -> dict[str, Any]:
    """The rows of each optimizer step on this process, and the gradient that it takes."""
    seed_everything(3)
    windows, model = Windows(), causal(backbone, **OPTIONS)
    run = trainer(
        folder,
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo"),
        callbacks=[windows],
        accumulate_grad_batches=2,
        limit_val_batches=0,
    )
    run.fit(model, completions(folder, UNEQUAL, **size))
    rows = [[int(row) for batch in step for row in batch["index"]] for step in windows.batches[:-1]]
    return {"rows": rows, "gradients": windows.gradients, "state": model.state_dict()}


def fit_and_evaluate(backbone: str, causal_backbone: str, folder: Path) -> None:
    (folder / "plain").mkdir(exist_ok=True)
    plain_state, encoded = encoder_at_every_step(backbone, folder), []
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda part, args, result: encoded.append(len(result)) if isinstance(part, InstanceEncoder) else None
    )
    seed_everything(3)
    model, data = module(backbone, objective="head", optimizer=SGD), reviews(folder, rows=21)
    run = trainer(folder, epochs=2, devices=2, strategy=DDPStrategy(process_group_backend="gloo"))
    run.fit(model, data)
    hook.remove()
    (validated,) = run.validate(model, data, verbose=False)
    data.setup("predict")
    run.predict(model, data)
    seen = [int(i) for batch in run.predict_loop.predictions for i in batch["index"]]
    ignored = set(run.model.parameters_to_ignore) if hasattr(run.model, "parameters_to_ignore") else set()
    ignored |= set(model._ddp_params_and_buffers_to_ignore)
    plain = causal(causal_backbone, prompt_encoder=NoPrompt, train_backbone=True)  # as loaded: nothing is drawn
    (completed,) = run.validate(plain, completions(folder / "completions"), verbose=False)
    rows = json.loads((folder / "matching.json").read_text())
    (matched,) = run.validate(
        causal(causal_backbone, **MATCHING), completions(folder / "matching", rows), verbose=False
    )
    torch.save(
        {
            "matched": matched["val/exact_match"],
            "completed": completed,
            "state": model.state_dict(),
            "validated": validated,
            "seen": seen,
            "ignored": ignored,
            "plain_state": plain_state,
            "encoded": sum(encoded),
            "adapted": {
                weight: adapted(
                    backbone,
                    folder / "adapted",
                    6,
                    weight,
                    devices=2,
                    strategy=DDPStrategy(process_group_backend="gloo"),
                )
                for weight in INSTANCE_LOSSES
            },
            "of_images": of_images(folder / "photos", 6, devices=2, strategy=DDPStrategy(process_group_backend="gloo")),
            "accumulated": [accumulated(causal_backbone, folder / "unequal", size) for size in SIZES],
        },
        folder / f"rank{run.global_rank}.pt",
    )

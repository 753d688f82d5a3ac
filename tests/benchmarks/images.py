"""A training step on images over the least that it can cost, and beside PEFT's LoRA.

The floor is the frozen model's forward on the batch's pixels, with m more tokens from the first layer on, and its
backward to what the first layer reads; the loss is the sum of the last hidden states. LoRA of rank 8 on query and value
with a linear layer on CLS is trained by a plain loop. Both get the batch that was just trained on, in turns.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from lopa_lightning import (
    ImageClassificationDataModule,
    ImageClassificationModule,
    InstanceEncoderSpec,
    LoPA,
    LoPALightningModule,
    PretrainedSpec,
    PromptTuning,
    VisualPromptTuning,
)
from lopa_lightning.backbones.pretrained import load_model
from lopa_lightning.backbones.vision import VisionBackbone, last_hidden_states
from lopa_lightning.errors import LoPAError
from lopa_lightning.experiments.sizes import StepTracker
from tests.benchmarks.cases import Places, places_of
from tests.benchmarks.harness import Row, now, parser, ratios, report, summary
from tests.benchmarks.training import Batch, Turns, fit

CLIP = "openai/clip-vit-base-patch16"
IMAGES = "images/clothing10"
M = 10
CASES: dict[str, tuple[str, Any]] = {
    "vpt_shallow": ("before", functools.partial(PromptTuning, num_virtual_tokens=M)),
    "vpt_deep": ("every_layer", functools.partial(VisualPromptTuning, num_virtual_tokens=M)),
    "lopa_deep": ("every_layer", functools.partial(LoPA, num_virtual_tokens=M, rank=4, hidden_dim=64)),
}
_COLUMNS = {
    "case": "case",
    "images": "images a step",
    "ours": "ours, ms a step",
    "floor": "floor, ms a step",
    "lora": "LoRA, ms a step",
    "ratio": "ours / floor",
    "goal": "goal",
    "over_lora": "LoRA / ours",
    "operations": "operations: ours / floor",
    "lora_operations": "operations: LoRA / ours",
}


@torch.enable_grad()
def floor_of(module: LoPALightningModule, batch: Batch) -> None:
    """Runs the floor on a batch."""
    backbone: Any = module.net.backbone if module.net is not None else None
    assert isinstance(backbone, VisionBackbone)

    def lengthened(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = torch.cat([args[0], args[0][:, :M]], dim=1)
        return (hidden.detach().requires_grad_(), *args[1:])

    hook = backbone.layers()[0].register_forward_pre_hook(lengthened)
    last_hidden_states(backbone.body, batch["pixels"], backbone.processing).sum().backward()
    hook.remove()


class LoRALoop:
    """PEFT's LoRA with a linear layer on CLS, in a plain loop.

    Args:
        name: Of the model.
        classes: Number of labels.
        targets: Names of the layers of query and value.
    """

    def __init__(self, name: str, classes: int, targets: list[str]) -> None:
        model: Any = load_model(PretrainedSpec(name), "encoder")
        self.model: Any = get_peft_model(model, LoraConfig(r=8, target_modules=targets))
        self.head = nn.Linear(model.config.hidden_size, classes)
        trained = [p for p in [*self.model.parameters(), *self.head.parameters()] if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-3)

    def loss(self, module: LoPALightningModule, batch: Batch) -> Tensor:
        """The loss of a batch, whose pixels are scaled as ours are."""
        backbone: Any = module.net.backbone if module.net is not None else None
        body = self.model.get_base_model()
        cls = last_hidden_states(body, batch["pixels"], backbone.processing)[:, 0]
        return nn.functional.cross_entropy(self.head(cls), batch["labels"])

    @torch.enable_grad()
    def step(self, module: LoPALightningModule, batch: Batch) -> None:
        """Trains on a batch."""
        self.loss(module, batch).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def measure(case: str, places: Places, images: int, rounds: int) -> Row:
    """A line of the table."""
    placement, prompt_encoder = CASES[case]
    # As many examples as a step has: an epoch is a step, and the instance vectors are made before.
    data = ImageClassificationDataModule(
        path=places.dataset(IMAGES), batch_size=images, max_train_examples=images, num_workers=0
    )
    module = ImageClassificationModule(
        backbone=PretrainedSpec(places.model(CLIP)),
        prompt_encoder=prompt_encoder,
        placement=placement,
        instance_encoder=InstanceEncoderSpec(pooling="cls"),
        optimizer=functools.partial(torch.optim.AdamW, lr=1e-3),
    )
    loops: list[LoRALoop] = []

    def beside(module: Any, batches: list[Batch], number: int) -> dict[str, float]:
        if not loops:
            loops.append(LoRALoop(places.model(CLIP), module.required_task().num_outputs, ["q_proj", "v_proj"]))
        sides = {"floor": floor_of, "lora": loops[0].step}
        seconds = {}
        for name in list(sides)[:: -1 if number % 2 else 1]:
            start = now()
            sides[name](module, batches[0])
            seconds[name] = now() - start
        return seconds

    turns = Turns(after_batch=beside)
    fit(module, data, 1 + rounds, turns)  # type: ignore[arg-type]
    seconds, batch = dict(turns.seconds), turns.batches[0]
    passes = {
        "ours": lambda: module.loss(module(batch), batch).backward(),
        "floor": lambda: floor_of(module, batch),
        "lora": lambda: loops[0].loss(module, batch).backward(),
    }
    operations = {}
    for name, run in passes.items():
        with StepTracker([]) as tracker:
            run()
        operations[name] = tracker.flops
    return {
        "case": case,
        "images": len(batch["index"]),
        **{name: summary([1000 * each for each in values]) for name, values in seconds.items()},
        "ratio": ratios(seconds["ours"], seconds["floor"]),
        "goal": "<= 1.10",
        "over_lora": ratios(seconds["lora"], seconds["ours"]),
        "operations": operations["ours"] / operations["floor"],
        "lora_operations": operations["lora"] / operations["ours"],
        "seconds": seconds,
    }


def main(arguments: list[str] | None = None) -> None:
    """Runs the benchmark."""
    options = parser("images", __doc__)
    options.add_argument("--images", type=int, default=16, help="images of a step")
    given = options.parse_args(arguments)
    places = places_of(given)
    names = given.cases or list(CASES)
    if unknown := sorted(set(names) - set(CASES)):
        raise LoPAError(f"no case {', '.join(unknown)}; the cases are {', '.join(CASES)}")
    images, rounds = (2, 2) if given.quick else (given.images, given.rounds)
    report("images", given, [measure(name, places, images, rounds) for name in names], _COLUMNS)


if __name__ == "__main__":
    main(sys.argv[1:])

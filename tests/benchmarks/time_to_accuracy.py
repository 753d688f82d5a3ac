"""Seconds and examples until a validation accuracy: ours, and PEFT's prompt tuning and LoRA in plain loops.

Two accuracies are to be reached: those of PEFT's prompt tuning and of PEFT's LoRA at the end of their budget. All sides
train on the same examples with the same head, ours as a Trainer does it; time to load, to tokenise, to make instance
vectors and to validate is not counted.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, seed_everything

from lopa_lightning import LoPA, LoPALightningModule, PromptTuning
from lopa_lightning.data.text import TextDataModule
from tests.benchmarks.alternatives import PEERS, Example, PlainLoop, examples_in
from tests.benchmarks.cases import Case, Places, chosen, places_of
from tests.benchmarks.harness import Row, now, parser, report
from tests.benchmarks.training import Batch, fit

Point = tuple[int, float, float]
"""Examples seen, seconds, accuracy."""

# Of soft prompts, heads and LoRA's factors, for all sides: those of configs/methods.
_PROMPT_RATE, _HEAD_RATE, _RATE = 3e-2, 3e-3, 1e-3
_COLUMNS = {
    "case": "case",
    "side": "side",
    "final": "accuracy at the end",
    "seconds": "s in all",
    **{
        f"{what}_{name}": f"{unit} to {title}'s"
        for name, title in (("prompt_tuning", "(a)"), ("lora", "(b)"))
        for what, unit in (("examples", "examples"), ("seconds", "s"), ("ratio", "share of its s"))
    },
}
_TITLES = {"prompt_tuning": "(a) PEFT prompt tuning", "lora": "(b) PEFT LoRA r=8"}


class Curve(Callback):
    """Validates our training now and then, with the clock stopped.

    Args:
        every: Examples between two validations.
        validation: Batches to validate on; filled in before training.
    """

    def __init__(self, every: int, data: TextDataModule) -> None:
        self.every, self.data = every, data
        self.points: list[Point] = []
        self.batches: list[Batch] = []
        self._seen, self._seconds, self._since = 0, 0.0, 0.0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._since = now()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._seconds += now() - self._since
        before, self._seen = self._seen, self._seen + len(batch["index"])
        self.batches.append(batch)
        if self._seen // self.every > before // self.every:
            self.points.append((self._seen, self._seconds, self._accuracy(pl_module)))
        self._since = now()

    @torch.no_grad()
    def _accuracy(self, module: LoPALightningModule) -> float:
        loaders: Any = self.data.val_dataloader()
        module.eval()
        hits = [
            module.predictions(module(batch)) == batch["labels"]
            for loader in (loaders if isinstance(loaders, list) else [loaders])
            for batch in loader
        ]
        module.train()
        return float(torch.cat(hits).float().mean())


def ours(case: Case, places: Places, data: TextDataModule, method: type, epochs: int, every: int) -> Curve:
    """Trains one of our methods."""
    config = case.model_config(places)["init_args"]
    module = case.module(places)
    options: dict[str, Any] = {"num_virtual_tokens": case.num_virtual_tokens}
    if method is LoPA:
        options |= {"rank": case.rank, "hidden_dim": 256}
    module = type(module)(
        backbone=module.builder.backbone,
        instance_encoder=module.builder.instance_encoder,
        prompt_encoder=functools.partial(method, **options),
        objective=config["objective"],
        head_pooling="cls",
        optimizer=functools.partial(torch.optim.AdamW, lr=_RATE),
        learning_rates={"shared_prompt": _PROMPT_RATE, "head": _HEAD_RATE},
    )
    curve = Curve(every, data)
    fit(module, data, epochs, curve)
    return curve


def peer(loop: PlainLoop, epochs: Sequence[list[Example]], validation: list[Example], every: int) -> list[Point]:
    """Trains an alternative on the examples of each of our epochs."""
    rates: Callable[[str], float] = lambda name: (  # noqa: E731 - one expression
        _PROMPT_RATE if "prompt" in name else _RATE if "lora" in name else _HEAD_RATE
    )
    trained = [(name, p) for name, p in loop.model.named_parameters() if p.requires_grad]
    loop.optimizer = torch.optim.AdamW([{"params": [p], "lr": rates(name)} for name, p in trained])
    points: list[Point] = []
    seen, seconds, size = 0, 0.0, -(-every // loop.case.batch_size) * loop.case.batch_size
    for number, examples in enumerate(epochs):
        for start in range(0, len(examples), size):
            part = examples[start : start + size]
            began = now()
            loop.epoch(part, number)
            seconds, seen = seconds + now() - began, seen + len(part)
            points.append((seen, seconds, accuracy(loop, validation)))
    return points


@torch.no_grad()
def accuracy(loop: PlainLoop, validation: list[Example]) -> float:
    """Share of validation examples that an alternative is right on."""
    loop.model.eval()
    hits, size = 0, 2 * loop.case.batch_size
    for start in range(0, len(validation), size):
        batch = loop.padded(validation[start : start + size])
        labels = batch.pop("labels")
        hits += int((loop.model(**batch).logits.argmax(-1) == labels).sum())
    loop.model.train()
    return hits / len(validation)


def reached(points: Sequence[Point], wanted: float) -> tuple[int | None, float | None]:
    """Examples and seconds until an accuracy; None if it was not reached.

    Example:
        >>> reached([(10, 1.0, 0.5), (20, 2.0, 0.7)], 0.6), reached([(10, 1.0, 0.5)], 0.6)
        ((20, 2.0), (None, None))
    """
    return next(((seen, seconds) for seen, seconds, found in points if found >= wanted), (None, None))


def measure(case: Case, places: Places, examples: int | None, epochs: int, every: int) -> list[Row]:
    """The lines of a case."""
    curves: dict[str, list[Point]] = {}
    for name, method in (("ours, prompt tuning", PromptTuning), ("ours, LoPA", LoPA)):
        data = case.data(places, examples)
        curve = ours(case, places, data, method, epochs, every)
        curves[name] = curve.points
    per_epoch = -(-len(curve.batches) // epochs)
    parts = [curve.batches[start : start + per_epoch] for start in range(0, len(curve.batches), per_epoch)]
    seen = [examples_in(part, data) for part in parts]
    loaders: Any = data.val_dataloader()
    validation = examples_in([*(loaders[0] if isinstance(loaders, list) else loaders)], data, "validation")
    for name, title in _TITLES.items():
        seed_everything(0, verbose=False)
        curves[title] = peer(PEERS[name](case, places), seen, validation, every)
    rows = []
    for side, points in curves.items():
        row: Row = {"case": case.name, "side": side, "final": points[-1][2], "seconds": points[-1][1], "points": points}
        for name, title in _TITLES.items():
            wanted = curves[title][-1][2]
            row[f"examples_{name}"], row[f"seconds_{name}"] = reached(points, wanted)
            theirs, own = reached(curves[title], wanted)[1], row[f"seconds_{name}"]
            row[f"ratio_{name}"] = None if own is None or theirs is None else own / theirs
        rows.append(row)
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Runs the benchmark."""
    options = parser("time_to_accuracy", __doc__)
    options.add_argument("--examples", type=int, default=3000, help="training examples")
    options.add_argument("--epochs", type=int, default=3, help="passes over them")
    options.add_argument("--every", type=int, default=320, help="examples between two validations")
    given = options.parse_args(arguments)
    places = places_of(given)
    examples, epochs, every = (8, 1, 4) if given.quick else (given.examples, given.epochs, given.every)
    given.cases = given.cases or ["minilm_sst2"]
    rows = [row for case in chosen(given) for row in measure(case, places, examples, epochs, every)]
    report("time_to_accuracy", given, rows, _COLUMNS)


if __name__ == "__main__":
    main(sys.argv[1:])

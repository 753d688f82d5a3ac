"""Our training step over the bare floor: the frozen model's forward and its backward to the input embeddings.

The floor has the batch's own tokens and as many virtual ones, without padding: a rectangle of as many rows of the mean
length. No loss but a sum, no labels, no optimizer, no loader. ``padded`` is the same on the batch as it was padded;
``with_loss`` puts in the sum's place what nobody who learns completions can leave out: the vocabulary's logits at the
labelled tokens, and their cross entropy; ``padded_with_loss`` is both, so that what is left over it is ours alone.
Floating-point operations, which no other program disturbs, are counted too.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lopa_lightning import CausalLMModule, LoPALightningModule
from lopa_lightning.data.completion import CompletionDataModule
from lopa_lightning.data.text import TextDataModule
from lopa_lightning.experiments.sizes import StepTracker
from lopa_lightning.files import write_whole
from lopa_lightning.task import IGNORED
from tests.benchmarks.cases import CASES, Case, Places, build_data, chosen, examples_of, places_of, pool_of
from tests.benchmarks.harness import Row, now, parser, ratios, report, summary
from tests.benchmarks.training import Batch, Turns, fit, tokens

FIXED = "smollm2_4x256"
KNOWN = {**CASES, FIXED: dataclasses.replace(CASES["smollm2_mbpp"], name=FIXED, max_length=256, examples=16)}
_GOALS = {FIXED: 1.05}
_COLUMNS = {
    "case": "case",
    "tokens": "tokens",
    "padding": "padding",
    "ours": "ours, ms a step",
    "floor": "floor, ms a step",
    "ratio": "ours / floor",
    "goal": "goal",
    "over_padded": "ours / padded floor",
    "over_with_loss": "ours / floor with loss",
    "over_padded_with_loss": "ours / padded floor with loss",
    "operations": "operations: ours / floor",
}


def rectangle(batch: Batch) -> Tensor:
    """A batch's real token ids as rows of one length, their rounded mean: as many tokens, no padding.

    Args:
        batch: ``input_ids`` and ``attention_mask``, ``[B, T]``.

    Returns:
        ``[B, round(mean length)]``.

    Example:
        >>> ids, mask = torch.tensor([[5, 6, 7], [8, 0, 0]]), torch.tensor([[1, 1, 1], [1, 0, 0]])
        >>> rectangle({"input_ids": ids, "attention_mask": mask})
        tensor([[5, 6],
                [7, 8]])
    """
    real = batch["input_ids"][batch["attention_mask"] == 1]
    rows = len(batch["input_ids"])
    width = max(1, round(len(real) / rows))
    return torch.cat([real, real])[: rows * width].view(rows, width)


def bare(module: LoPALightningModule, ids: Tensor, mask: Tensor | None, targets: Tensor | None = None) -> float:
    """Seconds of one forward and one backward to the input embeddings.

    Args:
        module: With loaded weights.
        ids: ``[B, L]``, of virtual tokens any ids: what matters is their number.
        mask: ``[B, L]`` where there is padding.
        targets: Tokens to predict, at any positions, by the model's head, ``[N]``; None for a sum.
    """
    assert module.net is not None
    body: Any = module.net.backbone.body
    model: Any = module.net.backbone.model
    embedded = body.get_input_embeddings()(ids).detach().requires_grad_()
    options = {"use_cache": False} if hasattr(body.config, "use_cache") else {}
    start = now()
    hidden = body(inputs_embeds=embedded, attention_mask=mask, **options).last_hidden_state
    if targets is None:
        loss = hidden.sum()
    else:
        loss = cross_entropy(model.get_output_embeddings()(hidden.flatten(0, 1)[: len(targets)]), targets)
    loss.backward()
    return now() - start


@torch.enable_grad()
def floor_of(module: LoPALightningModule, batch: Batch, kind: str = "floor") -> float:
    """Seconds of a floor on a batch.

    Args:
        module: With loaded weights.
        batch: One that it was trained on.
        kind: ``floor``, ``padded``, ``with_loss`` or ``padded_with_loss``.
    """
    assert module.net is not None
    m, text, mask, targets = module.net.prompt_encoder.num_virtual_tokens, batch["attention_mask"], None, None
    ids = rectangle(batch)
    if kind.startswith("padded"):
        ids, mask = batch["input_ids"], torch.cat([text.new_ones(len(text), m), text], dim=1)
    if kind.endswith("with_loss"):
        targets = batch["labels"][batch["labels"] != IGNORED]
    return bare(module, torch.cat([ids[:, :1].expand(-1, m), ids], dim=1), mask, targets)


def floors(module: LoPALightningModule, batches: list[Batch], number: int) -> dict[str, float]:
    """All floors of a batch, in turns."""
    with_loss = ["with_loss", "padded_with_loss"] if isinstance(module, CausalLMModule) else []
    kinds = ["floor", "padded", *with_loss]
    return {kind: floor_of(module, batches[0], kind) for kind in kinds[:: -1 if number % 2 else 1]}


def operations(module: LoPALightningModule, batches: list[Batch]) -> float:
    """Floating-point operations of our forward and backward passes over those of the floor.

    Args:
        module: With loaded weights.
        batches: Ones that it was trained on.
    """
    counted = {"ours": 0, "floor": 0}
    for batch in batches:
        with StepTracker([]) as ours:
            module.loss(module(batch), batch).backward()
        with StepTracker([]) as floor:
            floor_of(module, batch)
        counted = {"ours": counted["ours"] + ours.flops, "floor": counted["floor"] + floor.flops}
    return counted["ours"] / counted["floor"]


def fixed_data(places: Places, folder: Path, examples: int) -> TextDataModule:
    """Rows of exactly as many tokens as the case allows: MBPP's prompts one after another, cut from the left."""
    case = KNOWN[FIXED]
    problems = CASES["smollm2_mbpp"].data(places, None)
    assert isinstance(problems, CompletionDataModule)
    found = [problems.example("train", index) for index in range(len(problems.load_split("train", "train")))]
    before = "".join(example.prompt + (example.completion or "") + "\n" for example in found[-20:])
    rows = [{"prompt": before + each.prompt, "completion": each.completion} for each in found[:examples]]
    files = {split: str(folder / f"{split}.jsonl") for split in ("train", "validation")}
    for path in files.values():
        write_whole(Path(path), "".join(json.dumps(row) + "\n" for row in rows))
    options = {"batch_size": case.batch_size, "max_length": case.max_length}
    return build_data(
        {"class_path": "lopa_lightning.CompletionDataModule", "init_args": {"data_files": files, **options}}
    )


def data_of(case: Case, places: Places, examples: int, folder: Path) -> TextDataModule:
    """A case's data, of which the one with a fixed length is written to a folder."""
    return fixed_data(places, folder, examples) if case.name == FIXED else case.data(places, examples)


def measure(case: Case, places: Places, examples: int, pool: int, rounds: int, folder: Path) -> Row:
    """A line of the table."""
    turns, data, module = Turns(after_batch=floors), data_of(case, places, pool, folder), case.module(places)
    fit(module, data, 1 + rounds, turns, limit_train_batches=-(-examples // case.batch_size))
    seconds = dict(turns.seconds)
    held = tokens(turns.batches, case.num_virtual_tokens)
    step = {name: summary([1000 * each / held["batches"] for each in seconds[name]]) for name in ("ours", "floor")}
    return {
        "case": case.name,
        **held,
        **step,
        "ratio": ratios(seconds["ours"], seconds["floor"]),
        "goal": f"<= {_GOALS.get(case.name, 1.10)}",
        **{f"over_{kind}": ratios(seconds["ours"], seconds[kind]) for kind in seconds if kind not in step},
        "operations": operations(module, turns.batches),
        "seconds": seconds,
    }


def main(arguments: list[str] | None = None) -> None:
    """Runs the benchmark."""
    options = parser("floor", __doc__)
    options.add_argument("--examples", type=int, default=None, help="training examples of a round")
    given = options.parse_args(arguments)
    places, rounds = places_of(given), 2 if given.quick else given.rounds
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            measure(case, places, examples_of(case, given), pool_of(case, given), rounds, Path(folder))
            for case in chosen(given, KNOWN)
        ]
    report("floor", given, rows, _COLUMNS)


if __name__ == "__main__":
    main(sys.argv[1:])

"""The share of padding in batches, and in those of a plain shuffle. No model's weights are read, nothing is timed."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lopa_lightning.data.sampler import LengthGroupedSampler
from tests.benchmarks.cases import CASES, Case, Places, chosen, places_of
from tests.benchmarks.harness import parser, report

SIZES = {  # batch and most tokens, as in configs/
    "minilm_sst2": (16, 256),
    "minilm_rte": (16, 256),
    "smollm2_mbpp": (8, 1024),
    "smollm2_cruxeval_output": (8, 1024),
}
EPOCHS = 5
_COLUMNS = {
    "case": "",
    "batch": "batch",
    "plain": "plain shuffle",
    "train": "training",
    "tokens": "`batch_tokens`",
    "budget": "training with it",
    "val": "evaluation",
}


def share(lengths: NDArray[np.int64], batches: Iterable[Any]) -> float:
    """What part of all positions is padding."""
    cut = [lengths[batch] for batch in batches]
    return 1 - sum(int(batch.sum()) for batch in cut) / sum(len(batch) * int(batch.max()) for batch in cut)


def epochs(sampler: Any) -> list[Any]:
    """The batches of some epochs."""
    found = []
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        found += list(sampler)
    return found


def measure(case: Case, places: Places, examples: int | None) -> dict[str, Any]:
    """The shares of a case, in percent; virtual tokens are counted as tokens.

    A budget is as many tokens as a batch has on average.
    """
    batch_size, max_length = SIZES[case.name]
    case = dataclasses.replace(case, batch_size=batch_size, max_length=max_length)
    data, spec = case.data(places, examples), case.module(places).input_spec
    data.connect(dataclasses.replace(spec, instance_vectors=None))
    data.setup("fit")
    lengths = {role: np.asarray(data.datasets[role][0]["length"]) + spec.virtual_tokens for role in ("train", "val")}
    order = np.random.default_rng(0).permutation(len(lengths["train"]))
    plain = [order[start : start + case.batch_size] for start in range(0, len(order), case.batch_size)]
    train = epochs(data.train_dataloader().sampler)
    tokens = round(np.mean([len(batch) * int(lengths["train"][batch].max()) for batch in train]))
    budget = LengthGroupedSampler(lengths["train"], batch_tokens=max(tokens, int(lengths["train"].max())))
    shares = {
        "plain": share(lengths["train"], plain),
        "train": share(lengths["train"], train),
        "budget": share(lengths["train"], epochs(budget)),
        "val": share(lengths["val"], data.val_dataloader()[0].sampler),
    }
    percent = {name: 100 * value for name, value in shares.items()}
    return {"case": case.name, "batch": case.batch_size, "tokens": tokens, **percent}


def main(arguments: list[str] | None = None) -> None:
    """Runs the benchmark."""
    options = parser("padding", __doc__)
    options.add_argument("--examples", type=int, default=None, help="training examples; by default all")
    given = options.parse_args(arguments)
    places = places_of(given)
    report("padding", given, [measure(case, places, given.examples) for case in chosen(given, CASES)], _COLUMNS)


if __name__ == "__main__":
    main(sys.argv[1:])

"""Examples per second of a training epoch: ours, PEFT's prompt tuning and LoRA, and the paper's recipe as released.

All train on the same examples in each round; ours as a Trainer's epoch, which makes its batches by length, the others
as plain loops over shuffled batches. Beside them the bare floor of our batches, which tells how far ahead a step of
ours could be at most.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from lopa_lightning import LoPALightningModule
from lopa_lightning.data.text import TextDataModule
from tests.benchmarks.alternatives import PEERS, PlainLoop, examples_in
from tests.benchmarks.cases import Case, Places, chosen, examples_of, places_of, pool_of
from tests.benchmarks.floor import floor_of
from tests.benchmarks.harness import Row, now, parser, ratios, report, summary
from tests.benchmarks.training import Batch, Turns, fit, tokens

_COLUMNS = {
    "case": "case",
    "examples": "examples",
    "ours": "ours, examples/s",
    "prompt_tuning": "(a) PEFT prompt tuning",
    "lora": "(b) PEFT LoRA r=8",
    "released": "(c) released recipe",
    "over_prompt_tuning": "ours / (a)",
    "over_lora": "ours / (b)",
    "over_released": "ours / (c)",
    "goals": "goals",
    "floor_over_prompt_tuning": "floor / (a)",
    "floor_over_lora": "floor / (b)",
    "floor_over_released": "floor / (c)",
}
_RELEASED_GOALS = {"smollm2_mbpp": 4.0, "minilm_rte": 2.0}


class Peers:
    """Epochs of the alternatives and of the floor, on the examples that our epoch had.

    Args:
        case: Backbone and sizes.
        places: Where models are.
        data: Has the examples' texts.
        names: Of :data:`~tests.benchmarks.alternatives.PEERS`.
    """

    def __init__(self, case: Case, places: Places, data: TextDataModule, names: Sequence[str]) -> None:
        self.case, self.places, self.data, self.names = case, places, data, names
        self.loops: dict[str, PlainLoop] = {}

    @torch.enable_grad()
    def __call__(self, module: LoPALightningModule, batches: list[Batch], number: int) -> dict[str, float]:
        """Seconds of each one's epoch."""
        if not self.loops:
            self.loops = {name: PEERS[name](self.case, self.places) for name in self.names}
        examples = examples_in(batches, self.data)
        seconds = {"floor": sum(floor_of(module, batch) for batch in batches)}
        for name in list(self.loops)[:: -1 if number % 2 else 1]:
            start = now()
            self.loops[name].epoch(examples, number)
            seconds[name] = now() - start
        return seconds


def measure(case: Case, places: Places, examples: int, pool: int, rounds: int, names: Sequence[str]) -> Row:
    """A line of the table."""
    data = case.data(places, pool)
    turns = Turns(after_epoch=Peers(case, places, data, names))
    fit(case.module(places), data, 1 + rounds, turns, limit_train_batches=-(-examples // case.batch_size))
    seconds = dict(turns.seconds)
    held = tokens(turns.batches, case.num_virtual_tokens)
    goals = {"prompt_tuning": 1.3, "lora": 1.3, "released": _RELEASED_GOALS.get(case.name)}
    return {
        "case": case.name,
        **held,
        **{name: summary([held["examples"] / each for each in values]) for name, values in seconds.items()},
        **{f"over_{name}": ratios(seconds[name], seconds["ours"]) for name in names},
        **{f"floor_over_{name}": ratios(seconds[name], seconds["floor"]) for name in names},
        "goals": ", ".join(f">= {goals[name]}" for name in names if goals[name]),
        "seconds": seconds,
    }


def main(arguments: list[str] | None = None) -> None:
    """Runs the benchmark."""
    options = parser("peers", __doc__)
    options.add_argument("--examples", type=int, default=None, help="training examples of a round")
    options.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS), help="which alternatives")
    given = options.parse_args(arguments)
    places, rounds = places_of(given), 2 if given.quick else given.rounds
    rows = [
        measure(case, places, examples_of(case, given), pool_of(case, given), rounds, given.peers)
        for case in chosen(given)
    ]
    report("peers", given, rows, _COLUMNS)


if __name__ == "__main__":
    main(sys.argv[1:])

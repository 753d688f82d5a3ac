"""Peak resident memory of training above the loaded weights, each case and alternative in a process of its own.

Counted by Linux (VmHWM, set back once weights are loaded and read). The floor is the frozen model's forward pass and
its backward pass to the input embeddings, on the batches that ours has.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from lopa_lightning.files import write_whole
from tests.benchmarks.alternatives import PEERS, examples_in
from tests.benchmarks.cases import CASES, Case, Places, chosen, examples_of, places_of
from tests.benchmarks.floor import floor_of
from tests.benchmarks.harness import Row, Spawn, parser, ratios, report, spawn, summary
from tests.benchmarks.resident import Peak, forget_peak, resident, touch
from tests.benchmarks.training import fit

_NAMES = ["ours", "floor", *PEERS]
_COLUMNS = {
    "case": "case",
    "ours": "ours, MiB",
    "floor": "floor",
    "prompt_tuning": "(a) PEFT prompt tuning",
    "lora": "(b) PEFT LoRA r=8",
    "released": "(c) released recipe",
    "over_prompt_tuning": "ours / (a)",
    "over_released": "ours / (c)",
    "goals": "goals",
    "floor_over_released": "floor / (c)",
}


class PeakOfFloor(Peak):
    """MiB at most in the floor's passes, on the batches of an epoch that is not looked at itself."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_start(trainer, pl_module)
        for batch in trainer.train_dataloader:
            floor_of(pl_module, batch, "padded")
        super().on_train_end(trainer, pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """What training took is not the floor's."""


def measure(case: Case, places: Places, examples: int, name: str) -> dict[str, float]:
    """What this process holds to train for an epoch: ``loaded`` and ``above`` in MiB.

    Args:
        case: Backbone and sizes.
        places: Where models and data are.
        examples: Of the epoch.
        name: ``ours``, ``floor`` or one of :data:`~tests.benchmarks.alternatives.PEERS`.
    """
    module, data = case.module(places), case.data(places, examples)
    if name in ("ours", "floor"):
        peak = Peak() if name == "ours" else PeakOfFloor()
        fit(module, data, 1, peak)
        return {"loaded": peak.loaded, "above": peak.above}
    data.connect(module.input_spec)
    data.setup("fit")
    rows = examples_in(list(data.train_dataloader()), data)
    loop = PEERS[name](case, places)
    touch(loop.pretrained())
    forget_peak()
    loaded = resident()
    loop.epoch(rows, 0)
    return {"loaded": loaded, "above": resident(peak=True) - loaded}


def compared(case: Case, options: argparse.Namespace, run: Spawn) -> Row:
    """A line of the table."""
    above: dict[str, list[float]] = {name: [] for name in _NAMES}
    loaded = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        shared = ["--cases", case.name, "--json", str(path), "--examples", str(examples_of(case, options))]
        for option, root in (("--models-root", options.models_root), ("--data-root", options.data_root)):
            shared += [] if root is None else [option, str(root)]
        for _ in range(1 if options.quick else options.rounds):
            for name in _NAMES:
                run(["tests.benchmarks.memory", "--worker", name, *shared], {})
                found = json.loads(path.read_text())
                above[name].append(found["above"])
                loaded[name] = found["loaded"]
    return {
        "case": case.name,
        **{name: summary(values) for name, values in above.items()},
        "over_prompt_tuning": ratios(above["ours"], above["prompt_tuning"]),
        "over_released": ratios(above["ours"], above["released"]),
        "floor_over_released": ratios(above["floor"], above["released"]),
        "goals": "<= 1.0, <= 0.5",
        "above": above,
        "loaded": loaded,
    }


def main(arguments: list[str] | None = None, run: Spawn = spawn) -> None:
    """Runs the benchmark, or with ``--worker`` measures one alternative in this process."""
    options = parser("memory", __doc__)
    options.add_argument("--examples", type=int, default=None, help="training examples of the epoch")
    options.add_argument("--worker", choices=_NAMES, default=None, help="measure this one, in this process")
    given = options.parse_args(arguments)
    places = places_of(given)
    if given.worker is not None:
        (case,) = chosen(given)
        write_whole(given.json, json.dumps(measure(case, places, examples_of(case, given), given.worker)) + "\n")
        return
    cases = chosen(given) if given.cases or not given.quick else [CASES["minilm_sst2"]]
    report("memory", given, [compared(case, given, run) for case in cases], _COLUMNS)


if __name__ == "__main__":
    main(sys.argv[1:])

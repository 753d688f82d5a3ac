"""What options cost or save: our forward and backward pass with each, over the one without, on one batch.

Beside the time: by how much the gradient of what is trained differs from the plain one's, as a share of its length,
where the same is trained; and its floating-point operations over the plain one's, where both use the same kernels,
without those inside torch's attention on a CPU. The plain one has the vectors of its frozen instance encoder from
before.
"""

from __future__ import annotations

import copy
import functools
import sys
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lopa_lightning import LoPALightningModule
from lopa_lightning.task import IGNORED
from tests.benchmarks.cases import Case, Places, build_module, chosen, places_of, pool_of
from tests.benchmarks.harness import Row, now, parser, ratios, report, summary, take_turns
from tests.benchmarks.training import Batch, Turns, fit, tokens

OPTIONS: dict[str, dict[str, Any]] = {
    "compile": {"backbone": {"compile": True}},
    "eager": {"backbone": {"attn_implementation": "eager"}},
    "bfloat16": {"backbone": {"dtype": "bfloat16"}},
    "bfloat16_eager": {"backbone": {"dtype": "bfloat16", "attn_implementation": "eager"}},
    "adapted_encoder": {"instance_encoder": {"adapter": {"peft_type": "LORA", "r": 8}}},
    "after": {"placement": "after"},
}
_COLUMNS = {
    "case": "case",
    "option": "option",
    "padding": "padding",
    "first": "first pass, s",
    "ours": "ms",
    "plain": "plain, ms",
    "ratio": "plain / ours",
    "operations": "operations, ours / plain",
    "difference": "gradients differ by",
}


def a_batch(case: Case, places: Places, pool: int) -> tuple[Batch, Any]:
    """A training batch with what the instance encoder reads, and what it is to be classified into.

    Args:
        case: Which.
        places: Where models and data are.
        pool: Examples that it is drawn from, so that texts are of like length.
    """
    config = with_options(case, places, instance_encoder={"cache": False})
    turns, module = Turns(), build_module(config)
    fit(module, case.data(places, pool), 1, turns, limit_train_batches=1)
    return turns.batches[0], getattr(module, "task", None)


def with_options(case: Case, places: Places, **options: Any) -> dict[str, Any]:
    """A case's module in a YAML, with other options, or more of those of its parts."""
    config: dict[str, Any] = copy.deepcopy(case.model_config(places))
    for part, more in options.items():
        config["init_args"][part] = {**config["init_args"][part], **more} if isinstance(more, dict) else more
    return config


def loaded(case: Case, places: Places, task: Any, **options: Any) -> LoPALightningModule:
    """A case's module with weights, the trained ones always the same, and with options."""
    module = build_module(with_options(case, places, **options))
    if task is not None:
        module.task = task
    torch.manual_seed(0)
    module.configure_model()
    return module


def gradient(module: LoPALightningModule, batch: Batch) -> Tensor:
    """One forward and one backward pass; the gradient of all that is trained, as one vector."""
    torch.manual_seed(0)  # of the prompt encoder's dropout
    module.zero_grad()
    module.loss(module(batch), batch).backward()
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


def operations(module: LoPALightningModule, batch: Batch) -> int:
    """Floating-point operations of a forward and a backward pass, without those inside torch's attention on a CPU."""
    with FlopCounterMode(display=False) as counter:
        gradient(module, batch)
    return int(counter.get_total_flops())


def measure(case: Case, places: Places, pool: int, names: list[str], rounds: int) -> list[Row]:
    """The lines of a case."""
    batch, task = a_batch(case, places, pool)
    padding = tokens([batch], case.num_virtual_tokens)["padding"]
    modules = {"plain": loaded(case, places, task)}
    net: Any = modules["plain"].net
    with_vectors = {**batch, "instance": net.encode_instance(batch)}
    batches = {
        name: batch if "instance_encoder" in OPTIONS.get(name, {}) else with_vectors for name in ["plain", *names]
    }
    if "after" in names:  # the same batch, with where each completion begins
        asked = (batch["labels"] == IGNORED) & (batch["attention_mask"] == 1)
        batches["after"] = {**with_vectors, "prompt_position": asked.sum(dim=1)}
    exact, rows = gradient(modules["plain"], with_vectors), {}
    plain_operations = operations(modules["plain"], with_vectors)
    for name in names:
        modules[name] = loaded(case, places, task, **OPTIONS[name])
        start = now()
        found = gradient(modules[name], batches[name])
        first = now() - start
        is_same = len(found) == len(exact) and name != "after"
        difference = float((found - exact).norm() / exact.norm()) if is_same else None
        has_other_kernels = name in ("compile", "eager", "bfloat16_eager")
        share = None if has_other_kernels else operations(modules[name], batches[name]) / plain_operations
        rows[name] = {"case": case.name, "option": name, "padding": padding, "first": first}
        rows[name] |= {"operations": share, "difference": difference}
    seconds = take_turns({name: functools.partial(gradient, modules[name], batches[name]) for name in modules}, rounds)
    step = {name: summary([1000 * each for each in values]) for name, values in seconds.items()}
    return [
        {
            **row,
            "ours": step[name],
            "plain": step["plain"],
            "ratio": ratios(seconds["plain"], seconds[name]),
            "seconds": {key: seconds[key] for key in ("plain", name)},
        }
        for name, row in rows.items()
    ]


def fitting(case: Case, names: list[str]) -> list[str]:
    """Those of the options that go with a case: virtual tokens after a text need a causal model."""
    return [name for name in names if name != "after" or case.is_causal]


def main(arguments: list[str] | None = None) -> None:
    """Runs the benchmark."""
    options = parser("options", __doc__)
    options.add_argument("--examples", type=int, default=None, help="training examples that the batch is drawn from")
    options.add_argument("--options", nargs="+", choices=list(OPTIONS), default=list(OPTIONS), help="which")
    given = options.parse_args(arguments)
    places, rounds = places_of(given), 2 if given.quick else given.rounds
    rows = [
        row
        for case in chosen(given)
        for row in measure(case, places, given.examples or pool_of(case, given), fitting(case, given.options), rounds)
    ]
    report("options", given, rows, _COLUMNS)


if __name__ == "__main__":
    main(sys.argv[1:])

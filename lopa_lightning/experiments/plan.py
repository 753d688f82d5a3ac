"""``lopa plan``: what a run will take, from its configuration alone, before any weight is read."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from typing import Any, NoReturn

from lopa_lightning.errors import LoPAError
from lopa_lightning.experiments.resolve import built
from lopa_lightning.experiments.sizes import Sizes, Step, sizes
from lopa_lightning.parsing import UsageError

_TOKENS = 128  # of a text, where the configuration sets no limit


class _Options(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def placed(found: Sizes, devices: Sequence[int]) -> list[dict[str, Any]]:
    """Memory and bytes sent of each device, by strategy.

    Args:
        found: Of a step.
        devices: How many, for the strategies over several; each count gives two rows.

    Returns:
        Rows with ``strategy``, ``devices``, the parts of the memory, ``total`` and ``sent``, in bytes.
    """
    places = [("single", 1), *((strategy, count) for count in devices for strategy in ("ddp", "fsdp"))]
    rows = []
    for strategy, count in places:
        sent = found.sent(strategy, count)
        rows.append({"strategy": strategy, "devices": count, **found.memory(strategy, count), "sent": sent})
    return rows


def report(found: Sizes, step: Step, devices: Sequence[int]) -> str:
    """The figures as text.

    Args:
        found: Of a step.
        step: The batch.
        devices: How many, for the strategies over several.
    """
    rows = placed(found, devices)
    columns = [name for name in rows[0] if name not in ("strategy", "devices")]
    lines = [
        f"trained       {found.trained:,} parameters, {_shown(found.trained_bytes)}",
        f"frozen        {found.frozen:,} parameters, {_shown(found.frozen_bytes)}",
        f"checkpoint    {_shown(found.checkpoint_bytes)}: what is trained, and the optimizer's state",
        f"batch         {step.examples} examples of {step.tokens} tokens on each device",
        f"step          {found.flops / 1e12:.3g} TFLOP on each device",
        "",
        "of each device:" + "".join(f"{name:>13}" for name in columns),
    ]
    for row in rows:
        place = f"{row['strategy']:<8}{row['devices']:>7}"
        lines.append(place + "".join(f"{_shown(row[name]):>13}" for name in columns))
    return "\n".join([*lines, "", "Computed from the configuration, not measured. Sent: in a step."])


def own_options(args: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Reads the options of ``lopa plan`` itself.

    Args:
        args: All that follows on the command line.

    Returns:
        Its own options, and those of ``lopa fit``.

    Raises:
        LoPAError: If a number is below 1.
    """
    parser = _Options(
        prog="lopa plan",
        description="What a run will take: parameters, checkpoint, memory of each device, operations of a step. "
        "All other options are those of lopa fit. No weight is read.",
        allow_abbrev=False,
    )
    parser.add_argument("--devices", type=int, nargs="+", default=[8], help="devices of ddp and fsdp (default: 8)")
    parser.add_argument("--tokens", type=int, help=f"of a text (default: data.max_length, or {_TOKENS})")
    parser.add_argument("--instance_tokens", type=int, help="that the instance encoder reads (default: as many)")
    parser.add_argument("--completion_tokens", type=int, help="of a text, its completion's (default: half of them)")
    parser.add_argument("--json", action="store_true", help="print all figures, in bytes, as JSON")
    options, rest = parser.parse_known_args(list(args))
    counts = {name: value for name, value in vars(options).items() if name != "json" and value is not None}
    for name, value in counts.items():
        if min(value if isinstance(value, list) else [value]) < 1:
            raise LoPAError(f"--{name} must be at least 1, got {value}")
    return options, rest


def main(args: Sequence[str]) -> None:
    """Runs ``lopa plan``.

    Args:
        args: Its own options, and those of ``lopa fit``.

    Raises:
        LoPAError: If the configuration cannot be run.
    """
    options, rest = own_options(args)
    module, data = built(rest)
    tokens = _least(module.input_spec.max_tokens, options.tokens or data.max_length or _TOKENS)
    budget, read = data.batch_tokens, tokens + module.input_spec.virtual_tokens
    step = Step(
        examples=data.batch_size if budget is None else max(1, budget // read),
        tokens=tokens,
        instance_tokens=_least(module.input_spec.instance_max_tokens, options.instance_tokens or tokens),
        completion_tokens=_least(options.completion_tokens or max(1, tokens // 2), tokens),
    )
    found = sizes(module, step)
    if options.json:
        rows = placed(found, options.devices)
        print(json.dumps({**dataclasses.asdict(step), **dataclasses.asdict(found), "places": rows}, indent=2))
    else:
        print(report(found, step, options.devices))


def _least(*limits: int | None) -> int:
    return min(limit for limit in limits if limit is not None)


def _shown(count: float) -> str:
    """Bytes in a unit that leaves few digits.

    Example:
        >>> _shown(1536), _shown(3 * 2**30)
        ('1.5 KiB', '3.0 GiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"

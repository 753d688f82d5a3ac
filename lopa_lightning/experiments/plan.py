"""Says what a run will take, from its configuration alone, before any weight is read: ``lopa plan``."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from lopa_lightning.backbones.text_spec import TextSpec
from lopa_lightning.command_line.parser import Options
from lopa_lightning.errors import LoPAError
from lopa_lightning.experiments.resolve import built
from lopa_lightning.experiments.sizes import Sizes, Step, sizes
from lopa_lightning.modules import CausalLMModule

_TOKENS = 128  # of a text, where the configuration sets no limit
_OPTIONS = {
    "tokens": f"of a text (default: data.max_length, or {_TOKENS})",
    "instance_tokens": "that the instance encoder reads (default: as many)",
    "completion_tokens": "of a text, its completion's (default: half of them)",
}


def places(found: Sizes, devices: Sequence[int]) -> list[dict[str, Any]]:
    """Returns memory and bytes sent of each device, by strategy.

    Args:
        found: Of a step.
        devices: How many, for the strategies over several; each count gives two rows.

    Returns:
        Rows with ``strategy``, ``devices``, the parts of the memory, ``total`` and ``sent``, in bytes.
    """
    named = [("single", 1), *((strategy, count) for count in devices for strategy in ("ddp", "fsdp"))]
    return [{"strategy": s, "devices": n, **found.memory(s, n), "sent": found.sent(s, n)} for s, n in named]


def report(found: Sizes, step: Step, devices: Sequence[int]) -> str:
    """Returns the figures as text.

    Args:
        found: Of a step.
        step: The batch.
        devices: How many, for the strategies over several.
    """
    rows = places(found, devices)
    lines = [
        f"trained       {found.trained:,} parameters, {_shown(found.trained_bytes)}",
        f"frozen        {found.frozen:,} parameters, {_shown(found.frozen_bytes)}",
        f"checkpoint    {_shown(found.checkpoint_bytes)}: what is trained, and the optimizer's state",
        f"batch         {step.examples} examples of {step.tokens} tokens on each device",
        f"step          {found.flops / 1e12:.3g} TFLOP on each device",
        "\nof each device:" + "".join(f"{name:>13}" for name in list(rows[0])[2:]),
    ]
    for strategy, count, *figures in (row.values() for row in rows):
        lines.append(f"{strategy:<8}{count:>7}" + "".join(f"{_shown(figure):>13}" for figure in figures))
    return "\n".join([*lines, "\nComputed from the configuration, not measured. Sent: in a step."])


def own_options(args: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Reads the options of ``lopa plan`` itself.

    Args:
        args: All that follows on the command line.

    Returns:
        Its own options, and those of ``lopa fit``.

    Raises:
        UsageError: If one is wrong.
    """
    description = "What a run will take: parameters, checkpoint, memory of each device, operations of a step. "
    description += "All other options are those of lopa fit. No weight is read."
    parser = Options("plan", description)
    parser.add_argument("--devices", type=_count, nargs="+", default=[8], help="of ddp and fsdp (default: 8)")
    for name, meaning in _OPTIONS.items():
        parser.add_argument(f"--{name}", type=_count, help=meaning)
    parser.add_argument("--json", action="store_true", help="print all figures, in bytes, as JSON")
    return parser.parse_known_args(list(args))


def main(args: Sequence[str]) -> None:
    """Runs ``lopa plan``.

    Args:
        args: Its own options, and those of ``lopa fit``.

    Raises:
        LoPAError: If the configuration cannot be run.
    """
    options, rest = own_options(args)
    module, data = built(rest)
    _check_read(options, module)
    step = _step(options, module, data)
    found = sizes(module, step)
    figures = {**dataclasses.asdict(step), **dataclasses.asdict(found), "places": places(found, options.devices)}
    print(json.dumps(figures, indent=2) if options.json else report(found, step, options.devices))


def _check_read(options: argparse.Namespace, module: Any) -> None:
    """Raises a LoPAError that names an option of a step that this module does not read."""
    reads_texts, method = isinstance(module.input_spec, TextSpec), module.builder.skeleton.prompt_encoder
    read = {
        "tokens": reads_texts,
        "instance_tokens": reads_texts and method.uses_instance,
        "completion_tokens": isinstance(module, CausalLMModule),
    }
    if unread := [name for name in _OPTIONS if getattr(options, name) is not None and not read[name]]:
        what = f"{type(module).__name__} with {type(method).__name__} reads none of these tokens"
        raise LoPAError(f"--{', --'.join(unread)}: {what}; leave it out")


def _step(options: argparse.Namespace, module: Any, data: Any) -> Step:
    """Returns the batch that options and configuration say; other inputs than texts have as many tokens each."""
    spec = module.input_spec
    if not isinstance(spec, TextSpec):
        tokens = int(module.builder.skeleton.backbone.count_tokens(module.builder.kind.blank_batch(1, 1)))
        return Step(data.batch_size, tokens, tokens, tokens)
    tokens = options.tokens or data.max_length or _TOKENS
    tokens = min(tokens, spec.max_tokens or tokens)
    instance_tokens = options.instance_tokens or tokens
    by_tokens = data.batch_tokens and max(1, data.batch_tokens // (tokens + spec.virtual_tokens))
    return Step(
        examples=by_tokens or data.batch_size,
        tokens=tokens,
        instance_tokens=min(instance_tokens, spec.instance_max_tokens or instance_tokens),
        completion_tokens=min(options.completion_tokens or max(1, tokens // 2), tokens),
    )


def _count(text: str) -> int:
    """Reads a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text}")
    return int(text)


def _shown(count: float) -> str:
    """Returns bytes in a unit that leaves few digits.

    Example:
        >>> _shown(1536), _shown(3 * 2**30)
        ('1.5 KiB', '3.0 GiB')
    """
    power = min(4, max(0, int(count).bit_length() - 1) // 10)
    return f"{count / 1024**power:.1f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"

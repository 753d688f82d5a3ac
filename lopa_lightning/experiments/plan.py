"""``lopa plan``: what a run will take, from its configuration alone, before any weight is read."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from lopa_lightning.errors import LoPAError
from lopa_lightning.experiments.resolve import built
from lopa_lightning.frozen.stack import transformer_layers
from lopa_lightning.modules import LoPALightningModule
from lopa_lightning.modules.net import PromptedModel

_TOKENS = 128  # of a text, where the configuration sets no limit


@dataclass(frozen=True)
class Sizes:
    """What a model takes for a training step of one device.

    Attributes:
        trained: Trained parameters.
        frozen: Frozen parameters.
        trained_bytes: Of the trained parameters.
        frozen_bytes: Of the frozen ones.
        around_bytes: Of those frozen ones that lie outside of the layers.
        layer_bytes: Of the largest layer.
        state_bytes: Of the optimizer's state.
        kept_bytes: Of what the forward pass keeps for the backward pass.
        flops: Floating-point operations of a step, forward and backward.
        batch: Examples, and tokens of each.
    """

    trained: int
    frozen: int
    trained_bytes: int
    frozen_bytes: int
    around_bytes: int
    layer_bytes: int
    state_bytes: int
    kept_bytes: int
    flops: int
    batch: tuple[int, int]

    @property
    def checkpoint_bytes(self) -> int:
        """Of the tensors in a checkpoint: what is trained, and the optimizer's state."""
        return self.trained_bytes + self.state_bytes

    def memory(self, strategy: str, devices: int) -> int:
        """Bytes on each device: weights, gradients, optimizer's state, and what is kept for the backward pass.

        Args:
            strategy: ``single``, ``ddp`` or ``fsdp``.
            devices: How many.
        """
        gradients = self.trained_bytes
        own = self.trained_bytes + gradients + self.state_bytes
        if strategy != "fsdp":
            buckets = gradients if strategy == "ddp" else 0
            return self.frozen_bytes + own + buckets + self.kept_bytes
        # Gathered at a time: what lies around the layers, the layer at work and the next, what is trained.
        gathered = self.around_bytes + 2 * self.layer_bytes + self.trained_bytes + gradients
        return (self.frozen_bytes + own) // devices + gathered + self.kept_bytes

    def sent(self, strategy: str, devices: int) -> int:
        """Bytes that each device sends in a step.

        Args:
            strategy: ``single``, ``ddp`` or ``fsdp``.
            devices: How many.
        """
        if strategy == "single":
            return 0
        averaged = 2 * self.trained_bytes
        # Layers are gathered for the forward and once more for the backward pass.
        gathered = 2 * self.frozen_bytes - self.around_bytes if strategy == "fsdp" else 0
        return (averaged + gathered) * (devices - 1) // devices


def sizes(module: LoPALightningModule, batch_size: int, tokens: int) -> Sizes:
    """Runs a training step of a module on tensors without numbers.

    Args:
        module: As configured; nothing of it is loaded, and nothing will be.
        batch_size: Examples on each device.
        tokens: Of each text.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        net = module.hollow_net()
        batch = _batch(net, batch_size, tokens, module)
        with kept_for_backward() as kept, FlopCounterMode(display=False) as flops:
            torch.autograd.backward(module.loss(net(batch)[0], batch))
        own = {tensor.untyped_storage()._cdata for tensor in [*net.parameters(), *net.buffers()]}
        trained = [p for p in net.parameters() if p.requires_grad]
        frozen = [p for p in net.parameters() if not p.requires_grad]
        layers = [_bytes(p for p in layer.parameters() if not p.requires_grad) for layer in _layers(net)]
        return Sizes(
            trained=sum(p.numel() for p in trained),
            frozen=sum(p.numel() for p in frozen),
            trained_bytes=_bytes(trained),
            frozen_bytes=_bytes(frozen),
            around_bytes=_bytes(frozen) - sum(layers),
            layer_bytes=max(layers, default=0),
            state_bytes=int(_bytes(trained) * _states(module)),
            kept_bytes=sum(size for storage, size in kept.items() if storage not in own),
            flops=flops.get_total_flops(),
            batch=(batch_size, tokens),
        )


def report(found: Sizes, devices: int) -> str:
    """The figures as text.

    Args:
        found: Of a step.
        devices: How many, for the strategies over several.
    """
    examples, tokens = found.batch
    lines = [
        f"trained       {found.trained:,} parameters, {_shown(found.trained_bytes)}",
        f"frozen        {found.frozen:,} parameters, {_shown(found.frozen_bytes)}",
        f"checkpoint    {_shown(found.checkpoint_bytes)}: what is trained, and the optimizer's state",
        f"batch         {examples} examples of {tokens} tokens on each device; "
        f"{_shown(found.kept_bytes)} kept for the backward pass",
        f"step          {found.flops / 1e12:.3g} TFLOP on each device",
        "",
        f"{'strategy':<14}{'devices':>8}{'memory of each':>18}{'sent by each a step':>22}",
    ]
    for strategy, count in (("single", 1), ("ddp", devices), ("fsdp", devices)):
        memory, sent = found.memory(strategy, count), found.sent(strategy, count)
        lines.append(f"{strategy:<14}{count:>8}{_shown(memory):>18}{_shown(sent):>22}")
    return "\n".join([*lines, "", "Computed from the configuration, not measured."])


def own_options(args: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Reads the options of ``lopa plan`` itself.

    Args:
        args: All that follows on the command line.

    Returns:
        Its own options, and those of ``lopa fit``.

    Raises:
        LoPAError: If a number is below 1.
    """
    parser = argparse.ArgumentParser(
        prog="lopa plan",
        description="What a run will take: parameters, checkpoint, memory of each device, operations of a step. "
        "All other options are those of lopa fit. No weight is read.",
        allow_abbrev=False,
    )
    parser.add_argument("--devices", type=int, default=8, help="devices of ddp and fsdp (default: 8)")
    parser.add_argument("--tokens", type=int, help=f"of a text (default: data.max_length, or {_TOKENS})")
    options, rest = parser.parse_known_args(list(args))
    if options.devices < 1 or (options.tokens is not None and options.tokens < 1):
        raise LoPAError(f"--devices and --tokens must be at least 1, got {options.devices} and {options.tokens}")
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
    limits = [n for n in (module.text_spec.max_tokens, options.tokens or data.max_length or _TOKENS) if n is not None]
    tokens = min(limits)
    budget, read = data.batch_tokens, tokens + module.text_spec.virtual_tokens
    rows = data.batch_size if budget is None else max(1, budget // read)
    print(report(sizes(module, rows, tokens), options.devices))


def _batch(net: PromptedModel, batch_size: int, tokens: int, module: LoPALightningModule) -> dict[str, Tensor]:
    ids, rows = torch.zeros(batch_size, tokens, dtype=torch.long), torch.zeros(batch_size, dtype=torch.long)
    batch = {"index": rows, "labels": rows, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if net.instance_encoder is not None and module.builder.instance_vectors is not None:
        batch["instance"] = torch.zeros(batch_size, module.builder.instance_dim(net.backbone))
    elif net.instance_encoder is not None:
        limit = module.text_spec.instance_max_tokens
        read = ids[:, : tokens if limit is None else min(tokens, limit)]
        batch |= {"instance_input_ids": read, "instance_attention_mask": torch.ones_like(read)}
    return batch


@contextmanager
def kept_for_backward() -> Iterator[dict[int, int]]:
    """Bytes of each storage that is kept for the backward pass."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


def _layers(net: PromptedModel) -> list[nn.Module]:
    return [layer for model in net.pretrained_models() for layer in transformer_layers(model)]


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _states(module: LoPALightningModule) -> float:
    """Numbers that the optimizer keeps for each trained one, found on a small stand-in."""
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        stand_in = nn.Parameter(torch.ones(4, 4))
        stand_in.grad = torch.ones(4, 4)
        optimizer = module.make_optimizer([{"params": [stand_in]}])
        optimizer.step()
        states = [value for value in optimizer.state[stand_in].values() if isinstance(value, Tensor) and value.dim()]
        return sum(value.numel() for value in states) / stand_in.numel()


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

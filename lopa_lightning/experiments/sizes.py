"""What a training step takes, found by running it on tensors without numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import masking_utils

from lopa_lightning.data.vectors import agrees_with
from lopa_lightning.experiments.live import Live, kept_for_backward
from lopa_lightning.frozen.quantization import saved_bytes
from lopa_lightning.frozen.stack import transformer_layers
from lopa_lightning.modules import LoPALightningModule
from lopa_lightning.modules.net import CompletionReadout, PromptedModel
from lopa_lightning.task import IGNORED


@dataclass(frozen=True)
class Step:
    """A batch of one device.

    Attributes:
        examples: Texts.
        tokens: Of each text, virtual ones not counted.
        instance_tokens: That the instance encoder reads of each.
        completion_tokens: Of each text, those whose loss is learned by a module that learns completions.
    """

    examples: int
    tokens: int
    instance_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
        weights: Frozen and trained ones; with FSDP, this device's part and what is gathered at a time.
        gradients: Of what is trained, with DDP's buckets.
        optimizer: Its state.
        activations: At their peak: what the forward pass keeps for the backward pass, and what is at work.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class Sizes:
    """What a model takes for a training step of one device.

    Attributes:
        trained: Trained parameters.
        frozen: Frozen parameters.
        trained_bytes: Of the trained parameters.
        frozen_bytes: Of the frozen ones.
        root_bytes: Of those parameters that lie outside of the layers.
        layer_bytes: Of the largest layer.
        gathered_bytes: Of all that is brought together from its parts in a step, where weights are sharded.
        state_bytes: Of the optimizer's state.
        kept_bytes: Of what the forward pass keeps for the backward pass.
        peak_bytes: Of all tensors of a step at their peak, without parameters and their gradients.
        flops: Floating-point operations of a step, forward and backward.
    """

    trained: int
    frozen: int
    trained_bytes: int
    frozen_bytes: int
    root_bytes: int
    layer_bytes: int
    gathered_bytes: int
    state_bytes: int
    kept_bytes: int
    peak_bytes: int
    flops: int

    @property
    def checkpoint_bytes(self) -> int:
        """Of the tensors in a checkpoint: what is trained, and the optimizer's state."""
        return self.trained_bytes + self.state_bytes

    def memory(self, strategy: str, devices: int) -> Memory:
        """What lies on each device.

        Args:
            strategy: ``single``, ``ddp`` or ``fsdp``.
            devices: How many.
        """
        weights, gradients = self.frozen_bytes + self.trained_bytes, self.trained_bytes
        if strategy != "fsdp":
            buckets = gradients if strategy == "ddp" else 0
            return Memory(weights, gradients + buckets, self.state_bytes, self.peak_bytes)
        # Gathered at a time: what lies around the layers, the layer at work and the next.
        weights = weights // devices + self.root_bytes + 2 * self.layer_bytes
        return Memory(weights, gradients // devices + gradients, self.state_bytes // devices, self.peak_bytes)

    def sent(self, strategy: str, devices: int) -> int:
        """Bytes that each device sends in a step.

        Args:
            strategy: ``single``, ``ddp`` or ``fsdp``.
            devices: How many.
        """
        # An average over all is a sum of parts, which are then gathered: DDP does both, FSDP the first half.
        moved = {"single": 0, "ddp": 2 * self.trained_bytes, "fsdp": self.gathered_bytes + self.trained_bytes}
        return moved[strategy] * (devices - 1) // devices


def sizes(module: LoPALightningModule, step: Step) -> Sizes:
    """Runs a training step of a module on tensors without numbers, in the Trainer's precision.

    Args:
        module: As configured, and set up by a Trainer; nothing of it is loaded, and nothing will be.
        step: The batch.
    """
    precision = module.trainer.precision_plugin
    with FakeTensorMode(allow_non_fake_inputs=True), _new_parameters():
        net: PromptedModel = precision.convert_module(module.hollow_net())  # type: ignore[assignment]
        own = [*net.parameters(), *net.buffers()]
        live = Live(own)
        batch = _batch(module, net, step)
        with _gathers(net) as gathers, kept_for_backward(own) as kept, live, live.without_gradients(net):
            with _nothing_packed(), _Answers(step.examples * step.completion_tokens), precision.forward_context():
                loss = module.loss(net(batch)[0], batch)
            kept_bytes = sum(kept.values())
            torch.autograd.backward(loss)
        trained = [p for p in net.parameters() if p.requires_grad]
        frozen = [p for p in net.parameters() if not p.requires_grad]
        root = size_of([*trained, *frozen]) - sum(size for _, size in gathers)
        return Sizes(
            trained=sum(p.numel() for p in trained),
            frozen=sum(p.numel() for p in frozen),
            trained_bytes=size_of(trained),
            frozen_bytes=size_of(frozen) - saved_bytes(net.backbone.model, module.backbone_spec.quantization),
            root_bytes=root,
            layer_bytes=max((size for _, size in gathers), default=0),
            gathered_bytes=root + sum(times * size for times, size in gathers),
            state_bytes=int(size_of(trained) * _states(module)),
            kept_bytes=kept_bytes,
            peak_bytes=live.most,
            flops=live.flops,
        )


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors.

    Args:
        tensors: Each counts.

    Example:
        >>> size_of([torch.zeros(3), torch.zeros(2, 2, dtype=torch.bfloat16)])
        20
    """
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@contextmanager
def _new_parameters() -> Iterator[None]:
    """Modules that are moved or converted get new parameters: torch cannot change those without numbers in place."""
    before = nn.Module._apply
    made: dict[int, tuple[Tensor, Tensor]] = {}  # tied ones stay tied; the old ones are kept, so that ids are theirs

    def changed(tensor: Tensor, fn: Any) -> Tensor:
        if id(tensor) not in made:
            new = fn(tensor.detach())
            is_parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = tensor, nn.Parameter(new, tensor.requires_grad) if is_parameter else new
        return made[id(tensor)][1]

    def apply(module: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
        for part in module.modules() if recurse else [module]:
            for tensors in (part._parameters, part._buffers):
                values: dict[str, Any] = tensors
                values |= {name: changed(value, fn) for name, value in values.items() if value is not None}
        made.clear()
        return module

    module_class: Any = nn.Module
    module_class._apply = apply
    try:
        yield
    finally:
        module_class._apply = before


@contextmanager
def _gathers(net: PromptedModel) -> Iterator[list[tuple[int, int]]]:
    """For each layer, how often a step needs it whole, and its bytes; to be read after the block.

    Once for each forward pass, and once more for a backward pass through it. FSDP2 also fetches ahead what ran
    before, and so the last layer of an instance encoder that has no backward pass.
    """
    layers = [layer for model in net.pretrained_models() for layer in transformer_layers(model)]
    times = dict.fromkeys(map(id, layers), 0)
    passes: list[tuple[int, bool]] = []

    def count(layer: nn.Module, _: Any, output: Any) -> None:
        outputs = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        passes.append((id(layer), any(leaf.requires_grad for leaf in outputs)))

    hooks = [layer.register_forward_hook(count) for layer in layers]
    found: list[tuple[int, int]] = []
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
        for place, (key, is_passed_back) in enumerate(passes):
            is_fetched = place + 1 < len(passes) and passes[place + 1][1] and not is_passed_back
            times[key] += 1 + (is_passed_back or is_fetched)
        found += [(times[id(layer)], size_of(layer.parameters())) for layer in layers]


class _Answers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Says how many tokens are labelled, and yes to what is asked of all of a mask: there is no padding.

    Tensors without numbers cannot tell.
    """

    def __init__(self, count: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.nonzero.default:
            return args[0].new_empty((self.count, args[0].dim()), dtype=torch.long)
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            return True
        return func(*args, **(kwargs or {}))


@contextmanager
def _nothing_packed() -> Iterator[None]:
    """Without a mask, transformers looks for several texts in a row, and finds some where there are no numbers."""
    known: Any = masking_utils
    before = known.find_packed_sequence_indices
    known.find_packed_sequence_indices = lambda *_, **__: None
    try:
        yield
    finally:
        known.find_packed_sequence_indices = before


def _batch(module: LoPALightningModule, net: PromptedModel, step: Step) -> dict[str, Tensor]:
    ids, rows = torch.zeros(step.examples, step.tokens, dtype=torch.long), torch.zeros(step.examples, dtype=torch.long)
    labels = torch.full_like(ids, IGNORED) if isinstance(net.readout, CompletionReadout) else rows
    batch = {"index": rows, "labels": labels, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    vectors = module.builder.instance_vectors
    if vectors is not None and agrees_with(vectors, module.trainer):
        batch["instance"] = torch.zeros(step.examples, module.builder.instance_dim(net.backbone))
    elif net.instance_encoder is not None:
        read = ids.new_zeros(step.examples, step.instance_tokens)
        batch |= {"instance_input_ids": read, "instance_attention_mask": torch.ones_like(read)}
    return batch


def _states(module: LoPALightningModule) -> float:
    """Numbers that the optimizer keeps for each trained one, found on a small stand-in."""
    with unset_fake_temporarily():
        stand_in = nn.Parameter(torch.ones(4, 4))
        stand_in.grad = torch.ones(4, 4)
        optimizer = module.make_optimizer([{"params": [stand_in]}])
        optimizer.step()
        states = [value for value in optimizer.state[stand_in].values() if isinstance(value, Tensor) and value.dim()]
        return sum(value.numel() for value in states) / stand_in.numel()

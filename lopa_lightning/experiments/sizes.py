"""Finds what a training step takes by running it on fake tensors: they have shapes and dtypes, and no values."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode  # the only way to run a model without its weights
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from lopa_lightning.backbones.quantization import saved_bytes
from lopa_lightning.backbones.transformer_layers import transformer_layers
from lopa_lightning.data.instance_vectors import agrees_with
from lopa_lightning.modules import ClassificationModule, LoPALightningModule
from lopa_lightning.modules.optimizer_groups import with_rates
from lopa_lightning.modules.readouts import CompletionReadout, WordReadout
from lopa_lightning.task import IGNORED

_forward_flops: Any = sdpa_flop_count
_backward_flops: Any = sdpa_backward_flop_count
_cpu_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_cpu_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _with_all_heads(query: torch.Size, *others: torch.Size) -> tuple[torch.Size, ...]:
    """Returns shapes ``[B, heads, T, d]`` with the query's heads: old torch counts no shared keys and values."""
    return query, *(torch.Size((*each[:1], query[1], *each[2:])) for each in others)


# torch counts the attention kernels of GPUs alone.
ATTENTION_FLOPS: dict[Any, Any] = {
    _cpu_attention: lambda *shapes, **_: _forward_flops(*_with_all_heads(*shapes[:3])),
    _cpu_attention_backward: lambda grad, *shapes, **_: _backward_flops(grad, *_with_all_heads(*shapes[:3])),
}


@dataclass(frozen=True)
class Step:
    """Sizes of a batch of one device.

    Attributes:
        examples: Inputs.
        tokens: Of each input, virtual ones not counted.
        instance_tokens: Tokens of each that the instance encoder reads.
        completion_tokens: Labelled tokens of each text, for a module that learns completions.
    """

    examples: int
    tokens: int
    instance_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Sizes:
    """Holds what a model takes for a training step of one device.

    Attributes:
        trained: Trained parameters.
        frozen: Frozen parameters.
        trained_bytes: Of the trained parameters.
        frozen_bytes: Of the frozen ones.
        root_bytes: Of those parameters that lie outside of the layers.
        layer_bytes: Of the largest layer.
        gathered_bytes: Of all that is gathered in a step, where weights are sharded.
        state_bytes: Of the optimizer's state.
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
    peak_bytes: int
    flops: int

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of the tensors in a checkpoint: what is trained, and the optimizer's state."""
        return self.trained_bytes + self.state_bytes

    def memory(self, strategy: str, devices: int) -> dict[str, int]:
        """Returns the bytes on each of ``devices`` under ``single``, ``ddp`` or ``fsdp``.

        Returns:
            ``weights``, frozen and trained; with FSDP this device's part and what is gathered at a time.
            ``gradients`` of what is trained, with DDP's buckets. ``optimizer``: its state. ``activations`` at
            their peak. ``total``: all of it.
        """
        weights, gradients, state = self.frozen_bytes + self.trained_bytes, self.trained_bytes, self.state_bytes
        if strategy == "ddp":
            gradients *= 2
        if strategy == "fsdp":
            # Gathered at a time: what lies around the layers, the layer at work and the next.
            weights = weights // devices + self.root_bytes + 2 * self.layer_bytes
            gradients, state = gradients // devices + gradients, state // devices
        parts = {"weights": weights, "gradients": gradients, "optimizer": state, "activations": self.peak_bytes}
        return {**parts, "total": sum(parts.values())}

    def sent(self, strategy: str, devices: int) -> int:
        """Returns the bytes that each of ``devices`` sends in a step under ``single``, ``ddp`` or ``fsdp``."""
        # An average over all is a sum of parts, which are then gathered: DDP does both, FSDP the first half.
        moved = {"single": 0, "ddp": 2 * self.trained_bytes, "fsdp": self.gathered_bytes + self.trained_bytes}
        return moved[strategy] * (devices - 1) // devices


class StepTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that a block makes, and its floating-point operations by torch's formulas.

    Args:
        known: Tensors that do not count. The gradients of trained ones do not count once they are whole.

    Attributes:
        now: Bytes of the tensors that are still there.
        peak: Bytes at their peak.
        flops: Floating-point operations.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = self.flops = 0
        self._seen: dict[int, int] = {}
        for tensor in known:
            self._seen[tensor.untyped_storage()._cdata] = 0
            if tensor.requires_grad:
                tensor.register_post_accumulate_grad_hook(self._leave_out)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, packet = func(*args, **(kwargs or {})), func._overloadpacket
        if packet in ATTENTION_FLOPS:
            self.flops += ATTENTION_FLOPS[packet](*(arg.shape for arg in args if isinstance(arg, Tensor)))
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=result)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and (key := leaf.untyped_storage()._cdata) not in self._seen:
                self._seen[key] = leaf.untyped_storage().nbytes()
                self.now += self._seen[key]
                self.peak = max(self.peak, self.now)
                weakref.finalize(leaf.untyped_storage(), self._forget, key)
        return result

    def _forget(self, key: int) -> None:
        """Takes off the bytes of a tensor that has gone."""
        self.now -= self._seen.pop(key, 0)

    def _leave_out(self, parameter: Tensor) -> None:
        """Takes off the bytes of a parameter's gradient."""
        if parameter.grad is not None:
            key = parameter.grad.untyped_storage()._cdata
            self.now -= self._seen.get(key, 0)
            self._seen[key] = 0


def sizes(module: LoPALightningModule, step: Step) -> Sizes:
    """Runs a training step of a module on fake tensors, in the Trainer's precision.

    Parameters are fake, and with them all that is computed of them. A batch's ids and masks are real and small, so
    that a model may look at them.

    Args:
        module: As configured, and set up by a Trainer; nothing of it is loaded, and nothing will be.
        step: The batch.
    """
    precision = module.trainer.precision_plugin
    net = _with_fake_tensors(precision.convert_module(module.meta_net()))
    layers = [layer for model in net.pretrained_models() for layer in transformer_layers(model)]
    passes: list[tuple[int, bool]] = []  # bytes of a layer, and whether the backward pass goes through it as well
    for layer in layers:
        layer.register_forward_hook(lambda layer, _, output: passes.append((size_of(layer), _requires_grad(output))))
    batch, tracker = _batch(module, net, step), StepTracker([*net.parameters(), *net.buffers()])
    with tracker:
        with precision.forward_context():
            losses = module.training_losses(net(batch), batch)
        torch.autograd.backward(list(losses.values()))
    trained = [p for p in net.parameters() if p.requires_grad]
    frozen = [p for p in net.parameters() if not p.requires_grad]
    optimizer = module.make_optimizer(with_rates(net.parameter_groups(), {}))
    optimizer.step()
    state = [leaf for leaf in tree_leaves(list(optimizer.state.values())) if isinstance(leaf, Tensor) and leaf.dim()]
    root = size_of(net) - sum(map(size_of, layers))
    # Each layer is gathered for either pass. FSDP2 also fetches ahead what ran before, and so the last layer of an
    # encoder without a backward pass.
    following = [has_backward for _, has_backward in passes[1:]] + [False]
    gathered = sum(size * (1 + (own or after)) for (size, own), after in zip(passes, following))
    return Sizes(
        trained=sum(p.numel() for p in trained),
        frozen=sum(p.numel() for p in frozen),
        trained_bytes=size_of(trained),
        frozen_bytes=size_of(frozen) - saved_bytes(net.backbone.model, module.backbone_spec.quantization),
        root_bytes=root,
        layer_bytes=max(map(size_of, layers), default=0),
        gathered_bytes=root + gathered,
        state_bytes=size_of(state),
        peak_bytes=tracker.peak,
        flops=tracker.flops,
    )


def _requires_grad(output: Any) -> bool:
    """Returns whether the backward pass goes through what a layer returned."""
    return any(leaf.requires_grad for leaf in tree_leaves(output) if isinstance(leaf, Tensor))


def _with_fake_tensors(net: nn.Module) -> Any:
    """Replaces the meta tensors of a net by fake ones, which pass for tensors on a CPU; tied ones stay tied."""
    made: dict[int, Tensor] = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        for part in net.modules():
            for name, tensor in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
                if id(tensor) not in made:
                    fake = torch.empty_like(tensor, device="cpu")
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
                setattr(part, name, made[id(tensor)])
    return net


def size_of(tensors: nn.Module | Iterable[Tensor]) -> int:
    """Returns the bytes of tensors, or of a module's parameters.

    Example:
        >>> size_of([torch.zeros(3), torch.zeros(2, 2, dtype=torch.bfloat16)])
        20
    """
    tensors = tensors.parameters() if isinstance(tensors, nn.Module) else tensors
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _batch(module: LoPALightningModule, net: Any, step: Step) -> dict[str, Tensor]:
    """Makes a batch that means nothing."""
    kind, rows = module.builder.kind, torch.zeros(step.examples, dtype=torch.long)
    read, labels = kind.blank_batch(step.examples, step.tokens), rows
    if module.placement == "after":  # all of a text comes before virtual tokens, but of a completion
        read.pop("prompt_position", None)
    if isinstance(net.readout, CompletionReadout):
        mask = read["attention_mask"]
        to_come = mask.flip(1).cumsum(1).flip(1)
        labels = torch.where((to_come <= step.completion_tokens) & (mask == 1), 0, IGNORED)
        if module.placement == "after":
            read["prompt_position"] = ((labels == IGNORED) & (mask == 1)).sum(dim=1)
    elif isinstance(module, ClassificationModule) and (task := module.required_task()).multi_label:
        labels = torch.zeros(step.examples, len(task.labels), dtype=torch.long)
    elif isinstance(net.readout, WordReadout):
        labels = torch.zeros_like(read["input_ids"])
    batch = {"index": rows, "labels": labels, **read}
    vectors = module.builder.instance_vectors
    if vectors is not None and agrees_with(vectors, module.trainer):
        batch["instance"] = torch.zeros(step.examples, module.builder.instance_dim(net.backbone))
    elif net.instance_encoder is not None:
        batch |= kind.blank_instances(step.examples, step.instance_tokens)
    return batch

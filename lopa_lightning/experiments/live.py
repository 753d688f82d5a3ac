"""What is in memory, and what is computed, while a block of code runs."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count


def _attention(*shapes: Any, **_: Any) -> int:
    return int(sdpa_flop_count(*shapes[:3]))  # type: ignore[no-untyped-call]


def _attention_backward(*shapes: Any, **_: Any) -> int:
    return int(sdpa_backward_flop_count(*shapes[:4]))  # type: ignore[no-untyped-call]


# torch counts the attention kernels of GPUs alone.
ATTENTION_FLOPS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the tensors made in a block that are still there, and the operations done in it.

    torch's own counter of operations keeps what gradient checkpointing gives back.

    Args:
        known: Tensors that do not count.

    Attributes:
        now: Bytes.
        most: Bytes at their peak.
        flops: Floating-point operations.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = self.flops = 0
        self._seen = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in ATTENTION_FLOPS:
            self.flops += ATTENTION_FLOPS[packet](*(arg.shape for arg in args if isinstance(arg, Tensor)))
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=result)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: Any) -> None:
        key = storage._cdata
        if key not in self._seen:
            self._seen[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self._seen.pop(key, 0)

    @contextmanager
    def without_gradients(self, net: nn.Module) -> Iterator[None]:
        """The gradients of parameters do not count once they are whole.

        Args:
            net: Whose parameters.
        """

        def leave_out(parameter: Tensor) -> None:
            if parameter.grad is not None and self._seen.get(key := parameter.grad.untyped_storage()._cdata):
                self.now -= self._seen[key]
                self._seen[key] = 0

        trained = [p for p in net.parameters() if p.requires_grad]
        hooks = [p.register_post_accumulate_grad_hook(leave_out) for p in trained]  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


@contextmanager
def kept_for_backward(known: Iterable[Tensor]) -> Iterator[dict[int, int]]:
    """Bytes of each storage that is kept for the backward pass, as long as it is.

    Args:
        known: Tensors that do not count.
    """
    own = {tensor.untyped_storage()._cdata for tensor in known}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own and storage._cdata not in kept:
            kept[storage._cdata] = storage.nbytes()
            weakref.finalize(storage, kept.pop, storage._cdata, None)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept

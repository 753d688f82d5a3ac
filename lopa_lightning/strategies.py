"""Spreads a run over processes: checks which strategies serve a frozen backbone, and sets up FSDP2 for one."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.optim import Optimizer

from lopa_lightning.backbones.sharding import placed_like, whole
from lopa_lightning.errors import LoPAError

_OVERLAY = "put configs/trainer/fsdp.yaml over the configuration (FSDP2, lopa_lightning.strategies.FSDP2Strategy)"


class FSDP2Strategy(ModelParallelStrategy):
    """Runs FSDP2 over all processes, with checkpoints that any other strategy writes and reads too.

    A checkpoint is one file. It holds the trained tensors whole, and the optimizer's state numbered as
    the optimizer itself numbers it; frozen weights are gathered neither to save nor to load.

    Args:
        process_group_backend: ``nccl``, ``gloo``, ...; None for what the devices take.
        timeout: How long a process waits for the others.
    """

    def __init__(
        self, process_group_backend: str | None = None, timeout: timedelta | None = default_pg_timeout
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lets Lightning load the optimizer's state, as for a strategy that shards nothing."""
        return True

    def setup_environment(self) -> None:
        """Takes all processes of all nodes as one group."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Returns the optimizer's state, whole, on every process."""
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer._optimizer
        saved = optimizer.state_dict()
        state = {
            index: {key: whole(value).cpu() if isinstance(value, Tensor) else value for key, value in entry.items()}
            for index, entry in saved["state"].items()
        }
        return {**saved, "state": state}

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads the file; the module and the optimizer take what is theirs afterwards."""
        torch.cuda.empty_cache()
        loaded: dict[str, Any] = self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)
        return loaded

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Loads the trained tensors, checked as everywhere."""
        assert self.lightning_module is not None
        self.lightning_module.load_state_dict(checkpoint["state_dict"], strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Loads this process's part of the optimizer's state."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"]):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            state = {
                index: {key: _like(value, parameters[index]) for key, value in entry.items()}
                for index, entry in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": state})


def send_trained_alone(module: nn.Module) -> None:
    """Lets DistributedDataParallel send trained tensors alone: the frozen ones are the same on every rank.

    The private name is the only way to say so.

    Args:
        module: The one that is wrapped.
    """
    named = [*module.named_parameters(), *module.named_buffers()]
    frozen = [name for name, tensor in named if not tensor.requires_grad]
    module._ddp_params_and_buffers_to_ignore = frozen  # type: ignore[assignment]


def check_strategy(strategy: Strategy) -> None:
    """Refuses strategies that would train wrongly, or write checkpoints that others cannot read.

    Args:
        strategy: A Trainer's.

    Raises:
        LoPAError: If it is one of these.
    """
    check_strategy_name(type(strategy).__name__)
    if getattr(strategy, "_start_method", "popen") != "popen":
        raise LoPAError("a strategy that spawns or forks processes loses what is trained in them; use strategy: ddp")
    if isinstance(strategy, ModelParallelStrategy) and strategy._save_distributed_checkpoint:
        raise LoPAError(
            f"{type(strategy).__name__} with save_distributed_checkpoint: true writes folders that no other strategy "
            f"reads; set it to false, or {_OVERLAY}"
        )


def check_strategy_name(name: str) -> None:
    """Refuses a strategy by its name, or by that of its class.

    Args:
        name: As in ``trainer.strategy``, or of a class.

    Raises:
        LoPAError: If it is FSDP1 or DeepSpeed.

    Example:
        >>> check_strategy_name("ddp")
    """
    short = name.rpartition(".")[2].lower()
    if short.startswith("fsdp") and short != "fsdp2strategy":
        raise LoPAError(f"strategy {name!r} is FSDP1, which cannot shard what is partly frozen; {_OVERLAY}")
    if short.startswith("deepspeed"):
        raise LoPAError(f"strategy {name!r} shards the trained tensors that a checkpoint must hold whole; {_OVERLAY}")


def _like(value: Any, parameter: Tensor) -> Any:
    """Returns optimizer state as its parameter is held: moments have its shape, a count of steps has not."""
    if isinstance(value, Tensor) and value.shape == parameter.shape and value.dim() > 0:
        return placed_like(value, parameter)
    return value

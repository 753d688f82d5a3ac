"""Builds the optimizer of a module: its learning rates and its kind by group of what is trained."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim import Optimizer


def with_rates(groups: Mapping[str, list[nn.Parameter]], rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """Returns parameter groups as an optimizer takes them.

    Args:
        groups: Trained parameters by group.
        rates: Learning rates by group, over the optimizer's own. One for a group that is not trained
            here has no effect, which is warned of.
    """
    _warn_of_unused("learning_rates", rates, groups)
    return [
        {"name": name, "params": params, **({"lr": rates[name]} if name in rates else {})}
        for name, params in groups.items()
    ]


class OptimizerByGroup(Optimizer):
    """Steps an optimizer for each group of parameters as one optimizer, as Lightning's automatic optimization wants it.

    Groups and state are its own and those of the others at once: schedulers, gradient clipping and scaling, strategies
    and checkpoints treat it as any optimizer.

    Args:
        groups: Parameter groups with a ``name``.
        default: The optimizer of a group; still wants parameters.
        others: The optimizers of groups that have another, by name. One for a group that is not trained here has no
            effect, which is warned of.
    """

    def __init__(
        self, groups: list[dict[str, Any]], default: OptimizerCallable, others: Mapping[str, OptimizerCallable]
    ) -> None:
        _warn_of_unused("optimizers", others, [group["name"] for group in groups])
        self._default, self._others = default, others
        self._parts: list[Optimizer] = []
        super().__init__(groups, {})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group with an optimizer of its own.

        Args:
            param_group: With a ``name``.
        """
        part = self._others.get(param_group["name"], self._default)([param_group])
        super().add_param_group(part.param_groups[0])
        self.state.update(part.state)
        part.state = self.state
        self._parts.append(part)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Takes a step of each optimizer.

        Args:
            closure: Computes the loss and its gradients, once.

        Returns:
            What it returned.
        """
        loss = None if closure is None else closure()
        for part in self._parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the state of all groups.

        Args:
            state_dict: As from ``state_dict``.
        """
        super().load_state_dict(state_dict)  # which replaces groups and state
        for part, group in zip(self._parts, self.param_groups):
            own = {param: self.state[param] for param in group["params"] if param in self.state}
            part.__setstate__({"state": own, "param_groups": [group]})
            part.state = self.state


def _warn_of_unused(option: str, given: Collection[str], trained: Collection[str]) -> None:
    # A rate for a head stands in every overlay of a method, which serves tasks with a head and without.
    if unused := sorted(set(given) - {*trained, "head"}):
        rank_zero_warn(f"{option} has no effect for {', '.join(unused)}; trained are {', '.join(trained)}")

"""What the tests of all methods share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

ORDINARY = range(5, 30)
WORDS = {"good": 7, "bad": 9, "film": 11}
M = TypeVar("M", bound=nn.Module)


def randomized(module: M, seed: int) -> M:
    """In float64, far from the initial values, biases too."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double().eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, generator=generator)
    return module


def assert_follows(
    module: nn.Module,
    formula: Callable[[dict[str, Tensor]], Tensor],
    ours: Callable[[], Tensor],
    **inputs: Tensor,
) -> None:
    """Output and gradients of all parameters and inputs must be those of a formula in the parameters, at 1e-10.

    The formula is given parameters of its own with the same values, so the two share no tensor but the inputs.
    """
    parameters = dict(module.named_parameters())
    copies = {name: p.detach().clone().requires_grad_() for name, p in parameters.items()}
    got, wanted = ours(), formula(copies)
    torch.testing.assert_close(got, wanted, atol=1e-10, rtol=1e-10)
    assert got.dtype == torch.float64

    weights = torch.randn(got.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    names = [*inputs, *parameters]
    ours_by, formulas = (
        # A parameter that an output does not depend on, as where max takes none of its numbers, has zeros.
        torch.autograd.grad((output * weights).sum(), [*inputs.values(), *by_name.values()], materialize_grads=True)
        for output, by_name in ((got, parameters), (wanted, copies))
    )
    for name, mine, theirs in zip(names, ours_by, formulas):
        torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


def tokens_at_scale(weight: Tensor, table: Tensor, scale: float = 1.0) -> list[int]:
    """The token behind each virtual token, which must be that token's embedding times ``scale``."""
    same = (weight[:, None] == scale * table[None]).all(-1)
    assert same.sum(1).tolist() == [1] * len(weight)
    return same.int().argmax(1).tolist()

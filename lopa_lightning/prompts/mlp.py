"""The MLP from an instance vector to a part of a soft prompt, of dense or hypercomplex layers."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from lopa_lightning.errors import LoPAError
from lopa_lightning.prompts.base import positive

_STD = 0.02


def mlp(
    instance_dim: int, hidden_dim: int, output_dim: int, dropout: float, bias: bool = True, phm: int = 0
) -> nn.Sequential:
    """Builds Dropout → Linear(e, h) → tanh → Linear(h, o), with initial weights N(0, 0.02²) and biases 0.

    Args:
        instance_dim: Width e of the instance vector.
        hidden_dim: Width h between the layers.
        output_dim: Width o of the output.
        dropout: Dropout on the instance vector.
        bias: Whether the second layer has a bias; the first always has.
        phm: Number of components of both layers, see :class:`PHMLinear`; 0 for dense layers.

    Raises:
        LoPAError: If a width, ``dropout`` or ``phm`` is out of range, or ``phm`` does not divide all widths.
    """
    if not 0 <= dropout <= 1:
        raise LoPAError(f"dropout must be from 0 to 1, got {dropout!r}")
    sizes = positive("instance_dim", instance_dim), positive("hidden_dim", hidden_dim), output_dim
    make = functools.partial(PHMLinear, n=phm) if phm else _dense
    return nn.Sequential(nn.Dropout(dropout), make(*sizes[:2]), nn.Tanh(), make(*sizes[1:], bias=bias))


def _dense(in_features: int, out_features: int, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(in_features, out_features, bias)
    nn.init.normal_(layer.weight, std=_STD)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


class PHMLinear(nn.Module):
    """A linear layer of parameterised hypercomplex multiplication (Zhang et al., ICLR 2021, arXiv 2102.08597).

    y = W x + b with W = Σᵢ Aᵢ ⊗ Bᵢ, i = 1..n, which has about n times fewer parameters than a dense
    W ``[out, in]``. Parameters, with ``W`` oriented as torch's: ``a [n, n, n]`` holds Aᵢ ``[n, n]``,
    ``b [n, out/n, in/n]`` holds Bᵢ, and ``bias [out]``: n³ + in·out/n + out numbers.

    Initial values are N(0, 1/n) for A and N(0, 0.02²) for B: an entry of W is a sum of n products, so its standard
    deviation is √(n · 1/n) · 0.02 = 0.02, as of a dense layer here.

    Args:
        in_features: Width of x.
        out_features: Width of y.
        n: Number of components.
        bias: Whether there is a bias.

    Raises:
        LoPAError: If n is below 1 or does not divide both widths.

    Example:
        >>> layer = PHMLinear(1024, 256, n=16)
        >>> sum(p.numel() for p in layer.parameters())  # a dense layer has 262400
        20736
    """

    def __init__(self, in_features: int, out_features: int, n: int, bias: bool = True) -> None:
        super().__init__()
        if in_features % positive("phm", n) or out_features % n:
            raise LoPAError(f"phm must divide a layer's widths, got {n} for one from {in_features} to {out_features}")
        self.a = nn.Parameter(torch.empty(n, n, n).normal_(std=n**-0.5))
        self.b = nn.Parameter(torch.empty(n, out_features // n, in_features // n).normal_(std=_STD))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Computes W x + b, without W: Aᵢ mixes the n parts of x, then Bᵢ maps each.

        Args:
            x: ``[..., in]``.

        Returns:
            ``[..., out]``.
        """
        parts = x.reshape(*x.shape[:-1], len(self.a), -1)
        mixed = torch.einsum("irs,...st->...rit", self.a, parts)
        y = torch.einsum("...rit,iqt->...rq", mixed, self.b).flatten(-2)
        return y if self.bias is None else y + self.bias

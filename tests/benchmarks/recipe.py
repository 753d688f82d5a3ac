"""Prompt encoders that were tried and not kept: ``--model.prompt_encoder tests.benchmarks.recipe.WideGate``.

What they gave stands in ``configs/README.md``, "A recipe for LoPA".
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from lopa_lightning import LoPA


class WideGate(LoPA):
    """LoPA whose gate lies between 0 and 4, 4σ(U Vᵀ - ln 3), and is 1 at first: Z_S begins as the embeddings."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.initial_scale = 1.0

    def gate(self, instance: Tensor | None) -> Tensor:
        """Returns the gate ``[B, m, d]`` of instance vectors ``[B, e]``."""
        return 4 * (self.low_rank(instance) - math.log(3)).sigmoid()

    def forward(self, instance: Tensor | None) -> Tensor:
        """Makes the soft prompts ``[B, m, d]`` of instance vectors ``[B, e]``."""
        shared = self.shared_virtual_tokens()
        assert shared is not None
        return shared * self.gate(instance)


class LinearGate(WideGate):
    """LoPA whose gate has no bounds, 1 + U Vᵀ."""

    def gate(self, instance: Tensor | None) -> Tensor:
        """Returns the gate ``[B, m, d]`` of instance vectors ``[B, e]``."""
        return 1 + self.low_rank(instance)


class StandardizedVectors(LoPA):
    """LoPA that reads instance vectors whose entries have mean 0 and variance 1 in each training batch.

    Running statistics serve evaluation; no checkpoint holds them, so only the run itself can be asked.
    """

    def __init__(self, embedding_dim: int, instance_dim: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(embedding_dim, instance_dim, *args, **kwargs)
        self.standardize = nn.BatchNorm1d(instance_dim, affine=False)

    def low_rank(self, instance: Tensor | None) -> Tensor:
        """Returns U Vᵀ ``[B, m, d]`` of instance vectors ``[B, e]``."""
        return super().low_rank(self.standardize(instance))

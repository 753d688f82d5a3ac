"""LoPA, Low-Rank Prompt Adaptation (Jain, Chaudhuri, Reps, Jermaine, NeurIPS 2024, arXiv 2405.15282)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lopa_lightning.prompts.base import PromptEncoder, Vocabulary, positive
from lopa_lightning.prompts.shared import PromptInit, SharedPrompt


class LoPA(PromptEncoder):
    """A shared soft prompt behind a low-rank gate of the instance: Z = Z_S ∘ σ(U Vᵀ).

    ``Z_S [m, d]`` is learned and shared by the task. ``U [m, r]`` and ``V [d, r]`` come from the
    instance vector, each through dropout → Linear(e, h) → tanh → Linear(h, ·). Trained parameters:
    m·d + 2·(e + 1)·h + (h + 1)·(m + d)·r.

    The heads start at N(0, 0.02²) with zero biases. The gate so starts near σ(0) = ½ for every
    instance, and Z_S at twice the embeddings it is drawn from: the first step is prompt tuning's.

    Args:
        embedding_dim: Width d of the backbone's input embeddings.
        instance_dim: Width e of the instance vector.
        num_virtual_tokens: Number m of virtual tokens.
        rank: Rank r of the gate's logits; the paper uses 1, 2 and 4.
        hidden_dim: Width h of the two heads; the paper uses 256 for NLU and 1024 for code.
        dropout: Dropout on the instance vector in both heads.
        init: What Z_S starts from, see :class:`~lopa_lightning.prompts.shared.SharedPrompt`. The
            paper's own start is ``normal`` with ``init_std=1``.
        init_text: The text of ``init="text"``.
        init_std: Standard deviation of ``init="normal"``.

    Raises:
        LoPAError: If a size is below 1.

    Example:
        The published 1.60 M parameters of r=4 on RoBERTa-large:

        >>> lopa = LoPA(embedding_dim=1024, instance_dim=1024, num_virtual_tokens=10, rank=4, hidden_dim=256)
        >>> sum(p.numel() for p in lopa.parameters())
        1597992
        >>> lopa(torch.randn(2, 1024)).shape
        torch.Size([2, 10, 1024])
    """

    def __init__(
        self,
        embedding_dim: int,
        instance_dim: int,
        num_virtual_tokens: int = 10,
        rank: int = 4,
        hidden_dim: int = 256,
        dropout: float = 0.1,
        init: PromptInit = "vocabulary",
        init_text: str | None = None,
        init_std: float = 1.0,
    ) -> None:
        super().__init__(num_virtual_tokens)
        self.rank = positive("rank", rank)
        sizes = positive("instance_dim", instance_dim), positive("hidden_dim", hidden_dim)
        self.shared_prompt = SharedPrompt(num_virtual_tokens, embedding_dim, init, init_text, init_std, scale=2.0)
        self.row_head = _head(*sizes, num_virtual_tokens * rank, dropout)
        self.column_head = _head(*sizes, embedding_dim * rank, dropout)

    def gate(self, instance: Tensor) -> Tensor:
        """σ(U Vᵀ), between 0 and 1.

        Args:
            instance: Instance vectors ``[B, e]``.

        Returns:
            The gate of each instance, ``[B, m, d]``.
        """
        u = self.row_head(instance).unflatten(-1, (-1, self.rank))
        v = self.column_head(instance).unflatten(-1, (-1, self.rank))
        return torch.sigmoid(u @ v.mT)

    def forward(self, instance: Tensor | None) -> Tensor:
        """Z = Z_S ∘ σ(U Vᵀ), equation 3 of the paper.

        Args:
            instance: Instance vectors ``[B, e]``.

        Returns:
            Soft prompts ``[B, m, d]``.
        """
        assert instance is not None, "LoPA makes its prompt from an instance vector"
        return self.shared_prompt.weight * self.gate(instance)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """``shared_prompt`` is Z_S; ``low_rank`` the two heads."""
        heads = [*self.row_head.parameters(), *self.column_head.parameters()]
        return {"shared_prompt": [self.shared_prompt.weight], "low_rank": heads}

    def initialize(self, vocabulary: Vocabulary | None) -> None:
        """Sets the start values of Z_S."""
        self.shared_prompt.initialize(vocabulary)

    def diagnostics(self, instance: Tensor | None) -> dict[str, Tensor]:
        """The gate of each instance."""
        assert instance is not None
        return {"gate": self.gate(instance)}

    def shared_virtual_tokens(self) -> Tensor:
        """Z_S, ``[m, d]``."""
        return self.shared_prompt.weight


def _head(instance_dim: int, hidden_dim: int, output_dim: int, dropout: float) -> nn.Sequential:
    layers = nn.Linear(instance_dim, hidden_dim), nn.Linear(hidden_dim, output_dim)
    for layer in layers:
        nn.init.normal_(layer.weight, std=0.02)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(nn.Dropout(dropout), layers[0], nn.Tanh(), layers[1])

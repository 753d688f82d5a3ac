"""LoPA, Low-Rank Prompt Adaptation (Jain, Chaudhuri, Reps, Jermaine, NeurIPS 2024, arXiv 2405.15282)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn

from lopa_lightning.errors import LoPAError
from lopa_lightning.prompts.base import PromptEncoder, Vocabulary, positive
from lopa_lightning.prompts.heads import head
from lopa_lightning.prompts.shared import PromptInit, SharedPrompt

Combine = Literal["gate", "add", "concat", "max", "instance_only"]
HeadsInit = Literal["zero_u", "normal"]


class _Rule(NamedTuple):
    """How Z_S ``[m, d]`` and U Vᵀ ``[B, m, d]`` become the soft prompt."""

    combine: Callable[[Any, Tensor], Tensor]
    shared: bool = True
    scale: float = 1.0
    tokens: int = 1


_RULES: dict[str, _Rule] = {
    "gate": _Rule(lambda shared, low_rank: shared * low_rank.sigmoid(), scale=2.0),
    "add": _Rule(torch.add),
    "concat": _Rule(lambda shared, low_rank: torch.cat([shared.expand_as(low_rank), low_rank], dim=-2), tokens=2),
    "max": _Rule(torch.maximum),
    "instance_only": _Rule(lambda shared, low_rank: low_rank, shared=False),
}


class LoPA(PromptEncoder):
    """A shared soft prompt behind a low-rank gate of the instance: Z = Z_S ∘ σ(U Vᵀ).

    ``Z_S [m, d]`` is learned and shared by the task. ``U [m, r]`` and ``V [d, r]`` come from the
    instance vector, each through dropout → Linear(e, h) → tanh → Linear(h, ·). Trained parameters:
    m·d + 2·(e + 1)·h + (h + 1)·(m + d)·r.

    With ``heads_init: zero_u``, U starts at 0 and V at N(0, 1), as LoRA's two factors do; the layers before at
    N(0, 0.02²). The gate so starts at σ(0) = ½ for every instance, and Z_S at twice the embeddings it is drawn from:
    the first step is prompt tuning's, and the instance has a gradient from then on.

    The paper's ablation combines Z_S and U Vᵀ in other ways, ``combine``:

    - ``gate``: Z_S ∘ σ(U Vᵀ), the method itself.
    - ``add``: Z_S + U Vᵀ.
    - ``concat``: [Z_S; U Vᵀ], which is 2m virtual tokens.
    - ``max``: the larger of Z_S and U Vᵀ, entry by entry. It starts at max(Z_S, 0).
    - ``instance_only``: U Vᵀ without a Z_S and its m·d parameters. It starts at 0.

    Args:
        embedding_dim: Width d of a virtual token.
        instance_dim: Width e of the instance vector.
        num_virtual_tokens: Number m of rows of Z_S and U.
        rank: Rank r of the gate's logits, up to d; the paper uses 1, 2 and 4.
        hidden_dim: Width h of the two heads; None for the instance vector's. The paper's released code has 256 for
            NLU, and the instance vector's for code.
        dropout: Dropout on the instance vector in both heads.
        init: What Z_S starts from, see :class:`~lopa_lightning.prompts.shared.SharedPrompt`. The
            released code's initial values are ``normal`` with ``init_std=1``.
        init_text: The text of ``init="text"``.
        init_std: Standard deviation of ``init="normal"``.
        combine: How Z_S and U Vᵀ become the soft prompt.
        heads_init: Initial values of the two heads. ``zero_u``: as above. ``normal``, as in the released code: all
            weights N(0, 0.02²), the last biases 0, the first ones as torch's ``Linear`` draws them.

    Raises:
        LoPAError: If a size or ``dropout`` is out of range, or ``combine``, ``init`` or ``heads_init`` unknown.

    Example:
        The published 1.60 M parameters of r=4 on RoBERTa-large:

        >>> lopa = LoPA(embedding_dim=1024, instance_dim=1024, num_virtual_tokens=10, rank=4, hidden_dim=256)
        >>> sum(p.numel() for p in lopa.parameters())
        1597992
        >>> lopa(torch.randn(2, 1024)).shape
        torch.Size([2, 10, 1024])
    """

    short_name = "lopa"
    start_arguments = PromptEncoder.start_arguments | {"heads_init"}

    def __init__(
        self,
        embedding_dim: int,
        instance_dim: int,
        num_virtual_tokens: int = 10,
        rank: int = 4,
        hidden_dim: int | None = 256,
        dropout: float = 0.1,
        init: PromptInit = "vocabulary",
        init_text: str | None = None,
        init_std: float = 1.0,
        combine: Combine = "gate",
        heads_init: HeadsInit = "zero_u",
    ) -> None:
        if combine not in _RULES:
            raise LoPAError(f"combine must be one of {', '.join(_RULES)}, got {combine!r}")
        if heads_init not in get_args(HeadsInit):
            raise LoPAError(f"heads_init must be one of {', '.join(get_args(HeadsInit))}, got {heads_init!r}")
        rule = _RULES[combine]
        super().__init__(num_virtual_tokens * rule.tokens)
        self.combine = combine
        shared = SharedPrompt(num_virtual_tokens, embedding_dim, init, init_text, init_std, rule.scale)
        self.rank = positive("rank", rank, embedding_dim)
        self.shared_prompt = shared if rule.shared else None
        width = instance_dim if hidden_dim is None else hidden_dim
        self.row_head = head(instance_dim, width, num_virtual_tokens * rank, dropout)
        self.column_head = head(instance_dim, width, embedding_dim * rank, dropout)
        if heads_init == "normal":
            for part in (self.row_head, self.column_head):
                nn.init.uniform_(cast(nn.Linear, part[1]).bias, -(instance_dim**-0.5), instance_dim**-0.5)
        else:
            # As in LoRA one factor starts at 0 and the other does not: with both near 0 neither would have a gradient.
            nn.init.zeros_(cast(nn.Linear, self.row_head[-1]).weight)
            nn.init.normal_(cast(nn.Linear, self.column_head[-1]).bias)

    def low_rank(self, instance: Tensor) -> Tensor:
        """U Vᵀ.

        Args:
            instance: Instance vectors ``[B, e]``.

        Returns:
            The low-rank matrix of each instance, ``[B, m, d]``.
        """
        u = self.row_head(instance).unflatten(-1, (-1, self.rank))
        v = self.column_head(instance).unflatten(-1, (-1, self.rank))
        product: Tensor = u @ v.mT
        return product

    def gate(self, instance: Tensor) -> Tensor:
        """σ(U Vᵀ), between 0 and 1: what ``combine="gate"`` multiplies Z_S with.

        Args:
            instance: Instance vectors ``[B, e]``.

        Returns:
            The gate of each instance, ``[B, m, d]``.
        """
        return self.low_rank(instance).sigmoid()

    def forward(self, instance: Tensor | None) -> Tensor:
        """Z = Z_S ∘ σ(U Vᵀ), equation 3 of the paper, or another combination of Z_S and U Vᵀ.

        Args:
            instance: Instance vectors ``[B, e]``.

        Returns:
            Soft prompts ``[B, m, d]``; ``[B, 2m, d]`` for ``concat``.
        """
        assert instance is not None, "LoPA makes its prompt from an instance vector"
        return _RULES[self.combine].combine(self.shared_virtual_tokens(), self.low_rank(instance))

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """``shared_prompt`` is Z_S, where there is one; ``low_rank`` the two heads."""
        heads = [*self.row_head.parameters(), *self.column_head.parameters()]
        shared = {} if self.shared_prompt is None else {"shared_prompt": [self.shared_prompt.weight]}
        return {**shared, "low_rank": heads}

    def initialize(self, vocabulary: Vocabulary | None) -> None:
        """Sets the start values of Z_S."""
        if self.shared_prompt is not None:
            self.shared_prompt.initialize(vocabulary)

    def diagnostics(self, instance: Tensor | None) -> dict[str, Tensor]:
        """The gate of each instance; U Vᵀ as ``low_rank`` where it is no gate."""
        assert instance is not None
        return {"gate": self.gate(instance)} if self.combine == "gate" else {"low_rank": self.low_rank(instance)}

    def shared_virtual_tokens(self) -> Tensor | None:
        """Z_S, ``[m, d]``, or None for ``instance_only``."""
        return None if self.shared_prompt is None else self.shared_prompt.weight

"""LoPA, Low-Rank Prompt Adaptation (Jain, Chaudhuri, Reps, Jermaine, NeurIPS 2024, arXiv 2405.15282)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from lopa_lightning.errors import one_of
from lopa_lightning.prompts.base import positive
from lopa_lightning.prompts.mlp import mlp
from lopa_lightning.prompts.prompt_tuning import PromptTuning

Combine = Literal["gate", "add", "concat", "max", "instance_only"]
HeadsInit = Literal["zero_u", "normal"]

# From Z_S [m, d] and U Vᵀ [B, m, d] to the soft prompt.
_COMBINATIONS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "gate": lambda shared, low_rank: shared * low_rank.sigmoid(),
    "add": torch.add,
    "concat": lambda shared, low_rank: torch.cat([shared.expand_as(low_rank), low_rank], dim=-2),
    "max": torch.maximum,
    "instance_only": lambda shared, low_rank: low_rank,
}


class LoPA(PromptTuning):
    """A shared soft prompt behind a low-rank gate of the instance: Z = Z_S ∘ σ(U Vᵀ), the paper's equation 3.

    ``Z_S [m, d]`` is learned and shared by the task. ``U [m, r]`` and ``V [d, r]`` are made from the instance vector by
    an MLP each, ``row_head`` and ``column_head``: dropout → Linear(e, h) → tanh → Linear(h, ·). Trained parameters:
    m·d + 2·(e + 1)·h + (h + 1)·(m + d)·r.

    Initial values: U is 0 and V is N(0, 1), as LoRA has one factor at 0 and one not, and the layers before are
    N(0, 0.02²). So the gate is σ(0) = ½ for every instance, and Z_S is twice the embeddings it is drawn from: the first
    step is prompt tuning's, and the instance has a gradient from then on.

    The paper's ablation combines Z_S and U Vᵀ in other ways, ``combine``:

    - ``gate``: Z_S ∘ σ(U Vᵀ), the method itself.
    - ``add``: Z_S + U Vᵀ.
    - ``concat``: [Z_S; U Vᵀ], which is 2m virtual tokens.
    - ``max``: the larger of Z_S and U Vᵀ, entry by entry. It is max(Z_S, 0) at first.
    - ``instance_only``: U Vᵀ without a Z_S and its m·d parameters. It is 0 at first.

    Where the backbone says that a virtual token has a part of d for each of L layers, Z_S is ``[m, L·d]``, and one
    ``U Vᵀ [B, m, d]`` goes with each part: L·m·d + 2·(e + 1)·h + (h + 1)·(m + d)·r parameters.

    Args:
        embedding_dim: Width d of a virtual token.
        instance_dim: Width e of the instance vector.
        num_virtual_tokens: Number m of rows of Z_S and U.
        rank: Rank r of the gate's logits, up to d; the paper uses 1, 2 and 4.
        hidden_dim: Width h of the two MLPs; None for the instance vector's. The paper's released code has 256 for
            NLU, and the instance vector's for code.
        dropout: Dropout on the instance vector in both MLPs.
        combine: How Z_S and U Vᵀ become the soft prompt.
        heads_init: Initial values of the two MLPs. ``zero_u``: as above. ``normal``, as in the released code: all
            weights N(0, 0.02²), the last biases 0, the first ones as torch's ``Linear`` draws them.
        backbone_layers: Number L of layers that share U Vᵀ. The backbone says it.
        **init: Initial values of Z_S, as of :class:`PromptTuning`. The released code's are ``init="normal"`` with
            ``init_std=1``.

    Raises:
        LoPAError: If a size or ``dropout`` is out of range, or ``combine`` or ``heads_init`` unknown.

    Example:
        The published 1.60 M parameters of r=4 on RoBERTa-large:

        >>> lopa = LoPA(embedding_dim=1024, instance_dim=1024, num_virtual_tokens=10, rank=4, hidden_dim=256)
        >>> sum(p.numel() for p in lopa.parameters())
        1597992
        >>> lopa(torch.randn(2, 1024)).shape
        torch.Size([2, 10, 1024])
    """

    short_name = "lopa"
    uses_instance: ClassVar[bool] = True
    start_arguments = PromptTuning.start_arguments | {"heads_init"}

    def __init__(
        self,
        embedding_dim: int,
        instance_dim: int,
        num_virtual_tokens: int = 10,
        rank: int = 4,
        hidden_dim: int | None = 256,
        dropout: float = 0.1,
        combine: Combine = "gate",
        heads_init: HeadsInit = "zero_u",
        backbone_layers: int = 1,
        **init: Any,
    ) -> None:
        one_of("combine", combine, _COMBINATIONS)
        one_of("heads_init", heads_init, get_args(HeadsInit))
        super().__init__(embedding_dim, instance_dim, num_virtual_tokens, **init)
        self.backbone_layers = positive("backbone_layers", backbone_layers)
        layer_dim = embedding_dim // backbone_layers
        self.combine, self.rank = combine, positive("rank", rank, layer_dim)
        if combine == "gate":
            self.initial_scale = 2.0
        elif combine == "concat":
            self.num_virtual_tokens *= 2
        elif combine == "instance_only":
            self.shared_prompt = None
        width = instance_dim if hidden_dim is None else hidden_dim
        self.row_head = mlp(instance_dim, width, num_virtual_tokens * rank, dropout)
        self.column_head = mlp(instance_dim, width, layer_dim * rank, dropout)
        if heads_init == "normal":
            for part in (self.row_head, self.column_head):
                nn.init.uniform_([*part[1].parameters()][1], -(instance_dim**-0.5), instance_dim**-0.5)
        else:
            # As in LoRA one factor is 0 and the other is not: with both near 0 neither would have a gradient.
            (u_weight, _), (_, v_bias) = self.row_head[-1].parameters(), self.column_head[-1].parameters()
            nn.init.zeros_(u_weight)
            nn.init.normal_(v_bias)

    def low_rank(self, instance: Tensor | None) -> Tensor:
        """Returns U Vᵀ of each instance ``[B, e]``, ``[B, m, d]``."""
        assert instance is not None, "LoPA makes its prompt from an instance vector"
        u, v = (part(instance).unflatten(-1, (-1, self.rank)) for part in (self.row_head, self.column_head))
        product: Tensor = u @ v.mT
        return product

    def gate(self, instance: Tensor | None) -> Tensor:
        """Returns σ(U Vᵀ) of each instance ``[B, e]``, ``[B, m, d]`` between 0 and 1."""
        return self.low_rank(instance).sigmoid()

    def forward(self, instance: Tensor | None) -> Tensor:
        """Makes the soft prompts ``[B, m, L·d]`` of instance vectors ``[B, e]``; ``[B, 2m, L·d]`` for ``concat``."""
        shared, low_rank, layers = self.shared_virtual_tokens(), self.low_rank(instance), self.backbone_layers
        parts = [None] * layers if shared is None else shared.chunk(layers, dim=-1)
        return torch.cat([_COMBINATIONS[self.combine](part, low_rank) for part in parts], dim=-1)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Returns Z_S as ``shared_prompt``, where there is one, and the two MLPs as ``low_rank``."""
        return {**super().parameter_groups(), "low_rank": [*self.row_head.parameters(), *self.column_head.parameters()]}

    def diagnostics(self, instance: Tensor | None) -> dict[str, Tensor]:
        """Returns the gate of each instance; U Vᵀ as ``low_rank`` where it is no gate."""
        return {"gate": self.gate(instance)} if self.combine == "gate" else {"low_rank": self.low_rank(instance)}

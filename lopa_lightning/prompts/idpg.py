"""IDPG, Instance-Dependent Prompt Generation (Wu et al., NAACL 2022, arXiv 2204.04497)."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from lopa_lightning.prompts.mlp import mlp
from lopa_lightning.prompts.prompt_tuning import PromptTuning


class IDPG(PromptTuning):
    """A soft prompt that an MLP makes from the instance vector x: Z = reshape(W₂ tanh(W₁ x + b₁) + b₂).

    ``W₁ [h, e]``, ``W₂ [m·d, h]``; dropout acts on x. b₂ ``[m, d]`` is shared by all instances:
    it is the soft prompt of prompt tuning, with its initial values. Initial weights are N(0, 0.02²), or a PHM layer's
    W of that spread, so that the first soft prompts are close to prompt tuning's. Trained parameters:
    (e + 1)·h + h·m·d + m·d. With ``phm`` = n both W are sums of n Kronecker products, see
    :class:`~lopa_lightning.prompts.mlp.PHMLinear`: 2·n³ + (e + m·d)·h/n + h + m·d.

    Args:
        embedding_dim: Width d of a virtual token.
        instance_dim: Width e of the instance vector.
        num_virtual_tokens: Number m of virtual tokens.
        hidden_dim: Width h of the bottleneck.
        phm: Number n of components of both layers; the paper tries 8, 16 and 32. 0 for dense layers.
        dropout: Dropout on the instance vector.
        **init: Initial values of b₂, as of :class:`PromptTuning`.

    Raises:
        LoPAError: If a size or ``dropout`` is out of range, or ``phm`` does not divide e, h and m·d.

    Example:
        The 2.89 M parameters on RoBERTa-large that LoPA is compared with:

        >>> import torch
        >>> idpg = IDPG(embedding_dim=1024, instance_dim=1024, num_virtual_tokens=10, hidden_dim=256)
        >>> sum(p.numel() for p in idpg.parameters())
        2894080
        >>> idpg(torch.randn(2, 1024)).shape
        torch.Size([2, 10, 1024])
    """

    short_name = "idpg"
    uses_instance: ClassVar[bool] = True

    def __init__(
        self,
        embedding_dim: int,
        instance_dim: int,
        num_virtual_tokens: int = 10,
        hidden_dim: int = 256,
        phm: int = 0,
        dropout: float = 0.1,
        **init: Any,
    ) -> None:
        super().__init__(embedding_dim, instance_dim, num_virtual_tokens, **init)
        self.generator = mlp(instance_dim, hidden_dim, num_virtual_tokens * embedding_dim, dropout, False, phm)

    def instance_part(self, instance: Tensor | None) -> Tensor:
        """Returns W₂ tanh(W₁ x + b₁), the soft prompts ``[B, m, d]`` without what all instances share."""
        assert instance is not None, "IDPG makes its prompt from an instance vector"
        generated: Tensor = self.generator(instance).unflatten(-1, (self.num_virtual_tokens, -1))
        return generated

    def forward(self, instance: Tensor | None) -> Tensor:
        """Makes the soft prompts ``[B, m, d]`` of instance vectors ``[B, e]``."""
        return super().forward(None) + self.instance_part(instance)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Returns b₂ as ``shared_prompt``, all else as ``generator``."""
        return {**super().parameter_groups(), "generator": [*self.generator.parameters()]}

    def diagnostics(self, instance: Tensor | None) -> dict[str, Tensor]:
        """Returns what each instance adds to the shared virtual tokens, ``[B, m, d]``."""
        return {"instance_part": self.instance_part(instance)}

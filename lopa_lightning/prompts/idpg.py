"""IDPG, Instance-Dependent Prompt Generation (Wu et al., NAACL 2022, arXiv 2204.04497)."""

from __future__ import annotations

from torch import Tensor, nn

from lopa_lightning.prompts.base import PromptEncoder, Vocabulary
from lopa_lightning.prompts.heads import head
from lopa_lightning.prompts.shared import PromptInit, SharedPrompt


class IDPG(PromptEncoder):
    """A soft prompt that a bottleneck of two layers makes from the instance: Z = reshape(W₂ tanh(W₁ x + b₁) + b₂).

    ``W₁ [h, e]``, ``W₂ [m·d, h]``; x is the instance vector after dropout. Trained parameters:
    (e + 1)·h + h·m·d + m·d. With ``phm`` = n both W are sums of n Kronecker products, see
    :class:`~lopa_lightning.prompts.heads.PHMLinear`: 2·n³ + (e + m·d)·h/n + h + m·d.

    b₂ ``[m, d]`` is what all instances share, so it starts as prompt tuning's soft prompt does. The
    weights start at N(0, 0.02²), or PHM layers at W of that spread: the first soft prompts are close
    to prompt tuning's.

    Args:
        embedding_dim: Width d of a virtual token.
        instance_dim: Width e of the instance vector.
        num_virtual_tokens: Number m of virtual tokens.
        hidden_dim: Width h of the bottleneck.
        phm: Number n of components of both layers; the paper tries 8, 16 and 32. 0 for dense layers.
        dropout: Dropout on the instance vector.
        init: What b₂ starts from, see :class:`~lopa_lightning.prompts.shared.SharedPrompt`.
        init_text: The text of ``init="text"``.
        init_std: Standard deviation of ``init="normal"``.

    Raises:
        LoPAError: If a size or ``dropout`` is out of range, ``init`` unknown, or ``phm`` does not divide e, h and m·d.

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

    def __init__(
        self,
        embedding_dim: int,
        instance_dim: int,
        num_virtual_tokens: int = 10,
        hidden_dim: int = 256,
        phm: int = 0,
        dropout: float = 0.1,
        init: PromptInit = "vocabulary",
        init_text: str | None = None,
        init_std: float = 1.0,
    ) -> None:
        super().__init__(num_virtual_tokens)
        self.shared_prompt = SharedPrompt(num_virtual_tokens, embedding_dim, init, init_text, init_std)
        self.generator = head(instance_dim, hidden_dim, num_virtual_tokens * embedding_dim, dropout, False, phm)

    def instance_part(self, instance: Tensor) -> Tensor:
        """W₂ tanh(W₁ x + b₁), the soft prompts without what all instances share.

        Args:
            instance: Instance vectors ``[B, e]``.

        Returns:
            ``[B, m, d]``.
        """
        generated: Tensor = self.generator(instance)
        return generated.reshape(-1, *self.shared_prompt.weight.shape)

    def forward(self, instance: Tensor | None) -> Tensor:
        """Makes soft prompts.

        Args:
            instance: Instance vectors ``[B, e]``.

        Returns:
            Soft prompts ``[B, m, d]``.
        """
        assert instance is not None, "IDPG makes its prompt from an instance vector"
        return self.shared_prompt.weight + self.instance_part(instance)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """``shared_prompt`` is the output bias b₂; ``generator`` all else."""
        return {"shared_prompt": [self.shared_prompt.weight], "generator": [*self.generator.parameters()]}

    def initialize(self, vocabulary: Vocabulary | None) -> None:
        """Sets the start values of b₂."""
        self.shared_prompt.initialize(vocabulary)

    def diagnostics(self, instance: Tensor | None) -> dict[str, Tensor]:
        """What each instance adds to the shared virtual tokens."""
        assert instance is not None
        return {"instance_part": self.instance_part(instance)}

    def shared_virtual_tokens(self) -> Tensor:
        """b₂, ``[m, d]``."""
        return self.shared_prompt.weight

"""DePT, Decomposed Prompt Tuning (Shi & Lipani, ICLR 2024, arXiv 2309.05173)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from lopa_lightning.prompts.base import PromptEncoder, Vocabulary, positive
from lopa_lightning.prompts.shared import PromptInit, SharedPrompt


class DePT(PromptEncoder):
    """A short soft prompt, and a low-rank change of the text's embeddings by position: [Z_S; embed(x) + A B].

    ``Z_S [m, d]``, ``A [s, r]``, ``B [r, d]``; row j of A B is added to the embedding of a text's j-th
    token, up to the s-th. Trained parameters: m·d + (s + d)·r. The paper gives up virtual tokens for
    rank at equal cost: with l tokens of prompt tuning, r = (l − m)·d / (s + d) at most.

    Z_S starts as in prompt tuning, A uniformly within ±1/√r and B at 0, as in the authors' code: at
    first the text is unchanged.

    Its point is two learning rates: the paper has 3e-1 for Z_S (``shared_prompt``) and 1e-4 to 5e-3
    for A and B (``low_rank``).

    Args:
        embedding_dim: Width d of the backbone's input embeddings.
        instance_dim: Ignored; every prompt encoder is offered it.
        num_virtual_tokens: Number m of virtual tokens.
        max_length: Number s of text tokens whose embeddings are changed.
        rank: Rank r of the change, up to d.
        init: What Z_S starts from, see :class:`~lopa_lightning.prompts.shared.SharedPrompt`.
        init_text: The text of ``init="text"``.
        init_std: Standard deviation of ``init="normal"``.

    Raises:
        LoPAError: If a size is out of range, or ``init`` unknown.

    Example:
        The published 76,800 parameters on T5-base, those of prompt tuning with 100 tokens:

        >>> dept = DePT(embedding_dim=768, instance_dim=0, num_virtual_tokens=40, max_length=256, rank=45)
        >>> sum(p.numel() for p in dept.parameters()), 100 * 768
        (76800, 76800)
        >>> dept(None).shape, dept.token_offset().shape
        (torch.Size([1, 40, 768]), torch.Size([256, 768]))
    """

    short_name = "dept"
    uses_instance: ClassVar[bool] = False

    def __init__(
        self,
        embedding_dim: int,
        instance_dim: int,
        num_virtual_tokens: int = 40,
        max_length: int = 256,
        rank: int = 45,
        init: PromptInit = "vocabulary",
        init_text: str | None = None,
        init_std: float = 1.0,
    ) -> None:
        super().__init__(num_virtual_tokens)
        self.shared_prompt = SharedPrompt(num_virtual_tokens, embedding_dim, init, init_text, init_std)
        shape = positive("max_length", max_length), positive("rank", rank, embedding_dim)
        self.offset_a = nn.Parameter(torch.empty(shape))
        self.offset_b = nn.Parameter(torch.zeros(rank, embedding_dim))
        nn.init.uniform_(self.offset_a, -(rank**-0.5), rank**-0.5)

    def forward(self, instance: Tensor | None) -> Tensor:
        """Returns Z_S as ``[1, m, d]``, whatever the instance."""
        return self.shared_prompt.weight.unsqueeze(0)

    def token_offset(self) -> Tensor:
        """A B, what is added to the embeddings of a text's first s tokens, ``[s, d]``."""
        return self.offset_a @ self.offset_b

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """``shared_prompt`` is Z_S; ``low_rank`` A and B."""
        return {"shared_prompt": [self.shared_prompt.weight], "low_rank": [self.offset_a, self.offset_b]}

    def initialize(self, vocabulary: Vocabulary | None) -> None:
        """Sets the start values of Z_S."""
        self.shared_prompt.initialize(vocabulary)

    def diagnostics(self, instance: Tensor | None) -> dict[str, Tensor]:
        """How far each place of the text is moved: the norms of A B's rows, ``[s]``."""
        return {"offset_norms": self.token_offset().norm(dim=-1)}

    def shared_virtual_tokens(self) -> Tensor:
        """Z_S, ``[m, d]``."""
        return self.shared_prompt.weight

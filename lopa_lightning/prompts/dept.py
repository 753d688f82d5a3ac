"""DePT, Decomposed Prompt Tuning (Shi & Lipani, ICLR 2024, arXiv 2309.05173)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lopa_lightning.prompts.base import positive
from lopa_lightning.prompts.prompt_tuning import PromptTuning


class DePT(PromptTuning):
    """A short soft prompt, and a low-rank change of the text's embeddings by position: [Z_S; embed(x) + A B].

    ``Z_S [m, d]``, ``A [s, r]``, ``B [r, d]``; row j of A B is added to the embedding of a
    text's j-th token, up to the s-th; of a prompt and its completion to the prompt's alone. Trained parameters:
    m·d + (s + d)·r. At the cost of l tokens of prompt tuning, r = (l − m)·d / (s + d).

    Initial values: Z_S as in prompt tuning, A uniform within ±1/√r and B 0, as in the authors' code, so that the text
    is unchanged at first. The paper has a learning rate of 3e-1 for Z_S (``shared_prompt``), and of 1e-4 to 5e-3 for A
    and B (``low_rank``).

    Args:
        embedding_dim: Width d of the backbone's input embeddings.
        instance_dim: Width e of the instance vector, which DePT does not read.
        num_virtual_tokens: Number m of virtual tokens.
        max_length: Number s of text tokens whose embeddings are changed.
        rank: Rank r of the change, up to d.
        **init: Initial values of Z_S, as of :class:`PromptTuning`.

    Raises:
        LoPAError: If a size is out of range.

    Example:
        The published 76,800 parameters on T5-base, those of prompt tuning with 100 tokens:

        >>> dept = DePT(embedding_dim=768, instance_dim=0, num_virtual_tokens=40, max_length=256, rank=45)
        >>> sum(p.numel() for p in dept.parameters()), 100 * 768
        (76800, 76800)
        >>> dept(None).shape, dept.token_offset().shape
        (torch.Size([1, 40, 768]), torch.Size([256, 768]))
    """

    short_name = "dept"

    def __init__(
        self,
        embedding_dim: int,
        instance_dim: int,
        num_virtual_tokens: int = 40,
        max_length: int = 256,
        rank: int = 45,
        **init: Any,
    ) -> None:
        super().__init__(embedding_dim, instance_dim, num_virtual_tokens, **init)
        shape = positive("max_length", max_length), positive("rank", rank, embedding_dim)
        self.offset_a = nn.Parameter(torch.empty(shape).uniform_(-(rank**-0.5), rank**-0.5))
        self.offset_b = nn.Parameter(torch.zeros(rank, embedding_dim))

    def token_offset(self) -> Tensor:
        """Returns A B, which is added to the embeddings of a text's first s tokens, ``[s, d]``."""
        return self.offset_a @ self.offset_b

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Returns Z_S as ``shared_prompt``, A and B as ``low_rank``."""
        return {**super().parameter_groups(), "low_rank": [self.offset_a, self.offset_b]}

    def diagnostics(self, instance: Tensor | None) -> dict[str, Tensor]:
        """Returns how far each position of the text is moved: the norms of A B's rows, ``[s]``."""
        return {"offset_norms": self.token_offset().norm(dim=-1)}

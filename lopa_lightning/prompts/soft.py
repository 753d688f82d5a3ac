"""Prompt tuning (Lester, Al-Rfou, Constant, EMNLP 2021, arXiv 2104.08691)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from lopa_lightning.prompts.base import PromptEncoder, Vocabulary
from lopa_lightning.prompts.shared import PromptInit, SharedPrompt


class PromptTuning(PromptEncoder):
    """One learned soft prompt for all instances: Z = Z_S.

    Args:
        embedding_dim: Width d of a virtual token.
        instance_dim: Ignored; every prompt encoder is offered it.
        num_virtual_tokens: Number m of virtual tokens.
        init: What Z_S starts from, see :class:`~lopa_lightning.prompts.shared.SharedPrompt`.
        init_text: The text of ``init="text"``.
        init_std: Standard deviation of ``init="normal"``.

    Example:
        >>> prompt = PromptTuning(8, 0, num_virtual_tokens=5)
        >>> prompt(None).shape
        torch.Size([1, 5, 8])
    """

    short_name = "prompt_tuning"
    uses_instance: ClassVar[bool] = False

    def __init__(
        self,
        embedding_dim: int,
        instance_dim: int,
        num_virtual_tokens: int = 10,
        init: PromptInit = "vocabulary",
        init_text: str | None = None,
        init_std: float = 1.0,
    ) -> None:
        super().__init__(num_virtual_tokens)
        self.shared_prompt = SharedPrompt(num_virtual_tokens, embedding_dim, init, init_text, init_std)

    def forward(self, instance: Tensor | None) -> Tensor:
        """Returns Z_S as ``[1, m, d]``, whatever the instance."""
        return self.shared_prompt.weight.unsqueeze(0)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """One group, ``shared_prompt``."""
        return {"shared_prompt": [self.shared_prompt.weight]}

    def initialize(self, vocabulary: Vocabulary | None) -> None:
        """Sets the start values of Z_S."""
        self.shared_prompt.initialize(vocabulary)

    def shared_virtual_tokens(self) -> Tensor:
        """Z_S, ``[m, d]``."""
        return self.shared_prompt.weight

"""No soft prompt: what is trained lies elsewhere."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from lopa_lightning.prompts.base import PromptEncoder, positive


class NoPrompt(PromptEncoder):
    """No virtual tokens and nothing trained, for a head alone, an adapter or full fine-tuning.

    Args:
        embedding_dim: Width d of a virtual token.
        instance_dim: Width e of the instance vector, which is not read.

    Example:
        >>> NoPrompt(8, 0)(None).shape
        torch.Size([1, 0, 8])
    """

    short_name = "none"
    uses_instance: ClassVar[bool] = False
    nothing: Tensor

    def __init__(self, embedding_dim: int, instance_dim: int) -> None:
        super().__init__(0)
        # A buffer follows the module's device and dtype, as no parameter does here.
        self.register_buffer("nothing", torch.empty(1, 0, positive("embedding_dim", embedding_dim)), persistent=False)

    def forward(self, instance: Tensor | None) -> Tensor:
        """Returns the empty prompt ``[1, 0, d]``, whatever the instance."""
        return self.nothing

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Returns no group."""
        return {}

"""Prompt tuning by PEFT's own module: an independent check of ours, under the same contract."""

from __future__ import annotations

from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from lopa_lightning.errors import LoPAError
from lopa_lightning.prompts.base import PromptEncoder, Vocabulary, positive
from lopa_lightning.prompts.shared import starting_tokens

PeftInit = Literal["vocabulary", "normal"]


class PeftPromptTuning(PromptEncoder):
    """Prompt tuning (Lester et al. 2021) with ``peft.tuners.prompt_tuning.PromptEmbedding``, m·d parameters.

    Under the same seed it starts from the same tokens as
    :class:`~lopa_lightning.prompts.soft.PromptTuning`, so that whole runs can be compared.

    Args:
        embedding_dim: Width d of a virtual token.
        instance_dim: Ignored; every prompt encoder is offered it.
        num_virtual_tokens: Number m of virtual tokens.
        init: ``vocabulary`` for embeddings of randomly drawn ordinary tokens, ``normal`` for PEFT's own
            default, N(0, 1).

    Raises:
        LoPAError: If a size is below 1, ``init`` is unknown, or PEFT is not installed.

    Example:
        >>> prompt = PeftPromptTuning(8, 0, num_virtual_tokens=5)
        >>> prompt(None).shape
        torch.Size([1, 5, 8])
    """

    short_name = "peft_prompt_tuning"
    uses_instance: ClassVar[bool] = False

    def __init__(
        self,
        embedding_dim: int,
        instance_dim: int,
        num_virtual_tokens: int = 10,
        init: PeftInit = "vocabulary",
    ) -> None:
        super().__init__(positive("num_virtual_tokens", num_virtual_tokens))
        if init not in get_args(PeftInit):
            raise LoPAError(f"init must be one of {', '.join(get_args(PeftInit))}, got {init!r}")
        try:
            from peft import PromptTuningConfig
            from peft.tuners.prompt_tuning import PromptEmbedding
        except ImportError:
            raise LoPAError('this prompt tuning is PEFT\'s: pip install "lopa-lightning[peft]"') from None
        self.init = init
        config = PromptTuningConfig(
            num_virtual_tokens=num_virtual_tokens,
            token_dim=positive("embedding_dim", embedding_dim),
            num_transformer_submodules=1,
        )
        self.prompt: nn.Module = PromptEmbedding(config, word_embeddings=None)  # type: ignore[no-untyped-call]

    def forward(self, instance: Tensor | None) -> Tensor:
        """Returns PEFT's embeddings of its virtual tokens as ``[1, m, d]``, whatever the instance."""
        places = torch.arange(self.num_virtual_tokens, device=next(self.parameters()).device)
        prompt: Tensor = self.prompt(places.unsqueeze(0))
        return prompt

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """One group, ``shared_prompt``."""
        return {"shared_prompt": list(self.parameters())}

    @torch.no_grad()
    def initialize(self, vocabulary: Vocabulary | None) -> None:
        """Takes the start values from the vocabulary, unless they are PEFT's own."""
        if self.init == "normal":
            return
        if vocabulary is None:
            raise LoPAError("init='vocabulary' needs a backbone with a vocabulary; use init='normal'")
        table = next(self.parameters())
        table.copy_(vocabulary.embed(starting_tokens(vocabulary, self.num_virtual_tokens)).to(table))

    def shared_virtual_tokens(self) -> Tensor:
        """The virtual tokens, ``[m, d]``."""
        return self.forward(None)[0]

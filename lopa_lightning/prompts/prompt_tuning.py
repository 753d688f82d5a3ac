"""Prompt tuning (Lester, Al-Rfou, Constant, EMNLP 2021, arXiv 2104.08691)."""

from __future__ import annotations

from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from lopa_lightning.errors import LoPAError, one_of
from lopa_lightning.prompts.base import PromptEncoder, UniformTokens, Vocabulary, positive

PromptInit = Literal["vocabulary", "text", "normal"]


class PromptTuning(PromptEncoder):
    """One learned soft prompt for all instances: Z = Z_S ``[m, d]``, P_e of the paper's section 2.

    Methods that add something to a shared soft prompt extend this class. Trained parameters: m·d.

    Args:
        embedding_dim: Width d of a virtual token.
        instance_dim: Width e of the instance vector, which prompt tuning does not read.
        num_virtual_tokens: Number m of virtual tokens.
        init: Initial values of the shared soft prompt. ``vocabulary``: embeddings of randomly drawn ordinary tokens,
            as in the paper, or of an image model, which has none, U(-a, a) as in Visual Prompt Tuning; ``text``:
            embeddings of the tokens of ``init_text``, repeated or cut to m; ``normal``: N(0, ``init_std``²).
        init_text: The text of ``init="text"``.
        init_std: Standard deviation of ``init="normal"``.

    Raises:
        LoPAError: If a size or ``init_std`` is out of range, ``init`` is unknown, or ``init_text`` is blank, given
            without ``init="text"`` or missing with it.

    Example:
        >>> prompt = PromptTuning(8, 0, num_virtual_tokens=5)
        >>> prompt(None).shape
        torch.Size([1, 5, 8])
    """

    short_name = "prompt_tuning"
    uses_instance: ClassVar[bool] = False

    initial_scale = 1.0
    """Factor on initial values that are embeddings; 2 keeps the embeddings' scale behind a gate of ½."""

    shared_prompt: nn.Embedding | None
    """Z_S; None in a subclass without."""

    def __init__(
        self,
        embedding_dim: int,
        instance_dim: int,
        num_virtual_tokens: int = 10,
        init: PromptInit = "vocabulary",
        init_text: str | None = None,
        init_std: float = 1.0,
    ) -> None:
        super().__init__(positive("num_virtual_tokens", num_virtual_tokens))
        one_of("init", init, get_args(PromptInit))
        if (init == "text") != (init_text is not None):
            raise LoPAError(f"init_text and init='text' go together, got init={init!r} and init_text={init_text!r}")
        if init_text is not None and not init_text.strip():
            raise LoPAError(f"init_text {init_text!r} has no tokens")
        if not 0 <= init_std < float("inf"):
            raise LoPAError(f"init_std must be a finite number from 0, got {init_std!r}")
        self.init, self.init_text, self.init_std = init, init_text, init_std
        weight = torch.empty(num_virtual_tokens, positive("embedding_dim", embedding_dim, 2**31))
        nn.init.normal_(weight, std=init_std)
        self.shared_prompt = nn.Embedding.from_pretrained(weight, freeze=False)  # type: ignore[no-untyped-call]

    def forward(self, instance: Tensor | None) -> Tensor:
        """Returns Z_S as ``[1, m, d]``, whatever the instance."""
        assert self.shared_prompt is not None
        return self.shared_prompt.weight.unsqueeze(0)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Returns one group, ``shared_prompt``: Z_S."""
        return {} if self.shared_prompt is None else {"shared_prompt": [*self.shared_prompt.parameters()]}

    def initialize(self, vocabulary: Vocabulary | UniformTokens | None) -> None:
        """Sets the initial values of Z_S, unless they are drawn from a normal distribution.

        Raises:
            LoPAError: If ``init`` needs a vocabulary and the backbone has none, or ``init_text`` has no tokens.
        """
        if self.shared_prompt is not None:
            self.set_to_tokens(self.shared_prompt.weight, vocabulary)

    @torch.no_grad()
    def set_to_tokens(self, prompt: Tensor, vocabulary: Vocabulary | UniformTokens | None) -> None:
        """Sets a soft prompt ``[m, d]`` to the embeddings that ``init`` says, in place; to none if it is ``normal``."""
        if self.init == "normal":
            return
        if isinstance(vocabulary, UniformTokens) and self.init == "vocabulary":
            prompt.uniform_(-vocabulary.bound, vocabulary.bound).mul_(self.initial_scale)
            return
        if not isinstance(vocabulary, Vocabulary):
            raise LoPAError(f"init={self.init!r} needs a backbone with a vocabulary; use init='normal'")
        m, text = len(prompt), self.init_text
        words = None if text is None else vocabulary.encode(text)
        if words == []:
            raise LoPAError(f"init_text {text!r} has no tokens")
        ids = torch.tensor((words * m)[:m]) if words else _random_tokens(vocabulary, m)
        prompt.copy_(self.initial_scale * vocabulary.embed(ids).to(prompt))

    def shared_virtual_tokens(self) -> Tensor | None:
        """Returns Z_S, ``[m, d]``, or None if there is none."""
        return None if self.shared_prompt is None else self.shared_prompt.weight


def _random_tokens(vocabulary: Vocabulary, count: int) -> Tensor:
    """Draws ids of ordinary tokens ``[count]``, without repetition as far as there are enough."""
    ordinary = torch.as_tensor(vocabulary.ordinary_ids)
    rounds = [torch.randperm(len(ordinary)) for _ in range(-(-count // len(ordinary)))]
    return ordinary[torch.cat(rounds)[:count]]

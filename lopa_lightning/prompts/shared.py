"""Z_S: the virtual tokens that all instances of a task share, and what they start from."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lopa_lightning.errors import LoPAError
from lopa_lightning.prompts.base import Vocabulary, positive

PromptInit = Literal["vocabulary", "text", "normal"]


class SharedPrompt(nn.Module):
    """A learned matrix of virtual tokens, ``[m, d]``.

    Args:
        num_virtual_tokens: Number m of virtual tokens.
        embedding_dim: Width d of a virtual token.
        init: Start values. ``vocabulary``: embeddings of randomly drawn ordinary tokens (Lester et
            al. 2021); ``text``: embeddings of the tokens of ``init_text``, repeated or cut to m;
            ``normal``: N(0, ``init_std``²).
        init_text: The text of ``init="text"``.
        init_std: Standard deviation of ``init="normal"``.
        scale: Factor on embeddings taken from the vocabulary or a text. A method that halves the
            virtual tokens at the start asks for 2, and the first soft prompt has the embeddings' scale.

    Raises:
        LoPAError: If a size or ``init_std`` is out of range, ``init`` is unknown, or ``init_text`` is blank, given
            without ``init="text"`` or missing with it.

    Example:
        >>> SharedPrompt(5, 8, init="normal").weight.shape
        torch.Size([5, 8])
    """

    def __init__(
        self,
        num_virtual_tokens: int,
        embedding_dim: int,
        init: PromptInit = "vocabulary",
        init_text: str | None = None,
        init_std: float = 1.0,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        if init not in get_args(PromptInit):
            raise LoPAError(f"init must be one of {', '.join(get_args(PromptInit))}, got {init!r}")
        if (init == "text") != (init_text is not None):
            raise LoPAError(f"init_text and init='text' go together, got init={init!r} and init_text={init_text!r}")
        if init_text is not None and not init_text.strip():
            raise LoPAError(f"init_text {init_text!r} has no tokens")
        if not 0 <= init_std < float("inf"):
            raise LoPAError(f"init_std must be a finite number from 0, got {init_std!r}")
        self.init, self.init_text, self.scale = init, init_text, scale
        shape = positive("num_virtual_tokens", num_virtual_tokens), positive("embedding_dim", embedding_dim, 2**31)
        self.weight = nn.Parameter(torch.empty(shape))
        nn.init.normal_(self.weight, std=init_std)

    @torch.no_grad()
    def initialize(self, vocabulary: Vocabulary | None) -> None:
        """Takes the start values from the vocabulary, unless they are drawn from a normal distribution.

        Raises:
            LoPAError: If the backbone has no vocabulary to start from, or ``init_text`` has no tokens.
        """
        if self.init == "normal":
            return
        if vocabulary is None:
            raise LoPAError(f"init={self.init!r} needs a backbone with a vocabulary; use init='normal'")
        self.weight.copy_(self.scale * vocabulary.embed(self._start_ids(vocabulary)).to(self.weight))

    def _start_ids(self, vocabulary: Vocabulary) -> Tensor:
        m = len(self.weight)
        if self.init_text is None:
            return starting_tokens(vocabulary, m)
        ids = vocabulary.encode(self.init_text)
        if not ids:
            raise LoPAError(f"init_text {self.init_text!r} has no tokens")
        return torch.tensor((ids * m)[:m])


def starting_tokens(vocabulary: Vocabulary, count: int) -> Tensor:
    """Draws ordinary tokens, without repetition where the vocabulary allows it: no two start alike.

    Args:
        vocabulary: The backbone's.
        count: How many.

    Returns:
        Token ids ``[count]``.
    """
    ordinary = torch.as_tensor(vocabulary.ordinary_ids)
    rounds = [torch.randperm(len(ordinary)) for _ in range(-(-count // len(ordinary)))]
    return ordinary[torch.cat(rounds)[:count]]

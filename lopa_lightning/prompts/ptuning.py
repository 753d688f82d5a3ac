"""P-tuning (Liu et al. 2021, "GPT Understands, Too", arXiv 2103.10385): a soft prompt behind a network."""

from __future__ import annotations

import functools
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from lopa_lightning.errors import LoPAError
from lopa_lightning.prompts.base import PromptEncoder, Vocabulary, positive
from lopa_lightning.prompts.shared import PromptInit, SharedPrompt

Reparameterization = Literal["mlp", "lstm"]


class PTuning(PromptEncoder):
    """A soft prompt that is learned through a network: Z = f(E), with E ``[m, k]`` and f trained.

    f is Linear(k, h) → ReLU → Linear(h, h) → ReLU → Linear(h, d), or as in the paper a bidirectional
    LSTM, Linear(2h, 2h) → ReLU → Linear(2h, d); both are those of PEFT's ``PromptEncoder``. All
    instances share Z, so serving computes it once. In every layer this is prefix tuning's
    reparameterisation (Li & Liang 2021, arXiv 2101.00190). Trained parameters:

    - ``mlp``: m·k + (k + 1)·h + (h + 1)·h + (h + 1)·d
    - ``lstm``, of l layers: m·k + 8h·(k + h + 2) + (l - 1)·8h·(3h + 2) + (2h + 1)·2h + (2h + 1)·d

    The last layer starts as the smallest weights that turn what it first sees into the soft prompt
    of ``init``, which is prompt tuning's: exactly if m is at most its input width, h or 2h.

    Args:
        embedding_dim: Width d of a virtual token.
        instance_dim: Ignored; every prompt encoder is offered it.
        num_virtual_tokens: Number m of virtual tokens.
        encoder: f, ``mlp`` or ``lstm``.
        input_dim: Width k of the learned inputs E. PEFT has d, which only costs parameters beyond h,
            and too many of them where d is the width of every layer's keys and values.
        hidden_dim: Width h of f's layers, and of the LSTM in each direction.
        num_layers: Layers of the LSTM.
        init: What the soft prompt starts from, see :class:`~lopa_lightning.prompts.shared.SharedPrompt`.
        init_text: The text of ``init="text"``.
        init_std: Standard deviation of ``init="normal"``.

    Raises:
        LoPAError: If a size is out of range, or ``encoder`` or ``init`` is unknown.

    Example:
        >>> sum(p.numel() for p in PTuning(8, 0, num_virtual_tokens=5, input_dim=4, hidden_dim=6).parameters())
        148
    """

    short_name = "p_tuning"
    uses_instance: ClassVar[bool] = False

    def __init__(
        self,
        embedding_dim: int,
        instance_dim: int,
        num_virtual_tokens: int = 10,
        encoder: Reparameterization = "mlp",
        input_dim: int = 256,
        hidden_dim: int = 256,
        num_layers: int = 2,
        init: PromptInit = "vocabulary",
        init_text: str | None = None,
        init_std: float = 1.0,
    ) -> None:
        super().__init__(num_virtual_tokens)
        if encoder not in get_args(Reparameterization):
            raise LoPAError(f"encoder must be one of {', '.join(get_args(Reparameterization))}, got {encoder!r}")
        self._start = functools.partial(SharedPrompt, num_virtual_tokens, embedding_dim, init, init_text, init_std)
        self._start()  # refuses what is wrong with its arguments now
        k, h = positive("input_dim", input_dim), positive("hidden_dim", hidden_dim)
        self.inputs = nn.Parameter(torch.randn(num_virtual_tokens, k))
        self.lstm = None
        if encoder == "lstm":
            self.lstm = nn.LSTM(k, h, positive("num_layers", num_layers, 100), bidirectional=True, batch_first=True)
            self.mlp = nn.Sequential(nn.Linear(2 * h, 2 * h), nn.ReLU())
        else:
            self.mlp = nn.Sequential(nn.Linear(k, h), nn.ReLU(), nn.Linear(h, h), nn.ReLU())
        self.mlp.append(nn.Linear(2 * h if encoder == "lstm" else h, embedding_dim))

    def forward(self, instance: Tensor | None) -> Tensor:
        """Returns f(E) as ``[1, m, d]``, whatever the instance."""
        prompt: Tensor = self.mlp[-1](self._features()).unsqueeze(0)
        return prompt

    def _features(self) -> Tensor:
        """What f's last layer sees, ``[m, h]`` or ``[m, 2h]``."""
        states = self.inputs if self.lstm is None else self.lstm(self.inputs)[0]
        features: Tensor = self.mlp[:-1](states)
        return features

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """``shared_prompt`` is E; ``generator`` the network f."""
        network = [parameter for name, parameter in self.named_parameters() if name != "inputs"]
        return {"shared_prompt": [self.inputs], "generator": network}

    @torch.no_grad()
    def initialize(self, vocabulary: Vocabulary | None) -> None:
        """Solves for a last layer with which the soft prompt starts where ``init`` says."""
        start, last = self._start(), self.mlp[-1]
        start.initialize(vocabulary)
        assert isinstance(last, nn.Linear)
        features = self._features().double()
        target = start.weight.to(features)
        mean = target.mean(dim=0)
        last.weight.copy_((torch.linalg.pinv(features) @ (target - mean)).T)
        last.bias.copy_(mean)

    def shared_virtual_tokens(self) -> Tensor:
        """Z, ``[m, d]``."""
        return self.forward(None)[0]

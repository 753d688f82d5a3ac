"""P-tuning (Liu et al. 2021, "GPT Understands, Too", arXiv 2103.10385): a soft prompt behind a network."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lopa_lightning.errors import one_of
from lopa_lightning.prompts.base import UniformTokens, Vocabulary, positive
from lopa_lightning.prompts.prompt_tuning import PromptTuning

Reparameterization = Literal["mlp", "lstm"]


class PTuning(PromptTuning):
    """A soft prompt that is learned through a network: Z = f(E), with E ``[m, k]`` and f trained.

    f is Linear(k, h) → ReLU → Linear(h, h) → ReLU → Linear(h, d), or as in the paper a bidirectional LSTM,
    Linear(2h, 2h) → ReLU → Linear(2h, d); both are those of PEFT's ``PromptEncoder``. With virtual tokens in every
    layer this is prefix tuning's reparameterisation (Li & Liang 2021, arXiv 2101.00190). Trained parameters:

    - ``mlp``: m·k + (k + 1)·h + (h + 1)·h + (h + 1)·d
    - ``lstm``, of l layers: m·k + 8h·(k + h + 2) + (l - 1)·8h·(3h + 2) + (2h + 1)·2h + (2h + 1)·d

    The last layer's initial weights are the smallest that turn what it first sees into the soft prompt of ``init``,
    which is prompt tuning's: exactly if m is at most its input width, h or 2h.

    Args:
        embedding_dim: Width d of a virtual token.
        instance_dim: Width e of the instance vector, which P-tuning does not read.
        num_virtual_tokens: Number m of virtual tokens.
        encoder: f, ``mlp`` or ``lstm``.
        input_dim: Width k of the learned inputs E. PEFT has d, which only costs parameters beyond h,
            and too many of them where d is the width of every layer's keys and values.
        hidden_dim: Width h of f's layers, and of the LSTM in each direction.
        num_layers: Layers of the LSTM.
        **init: Initial values of the soft prompt, as of :class:`PromptTuning`.

    Raises:
        LoPAError: If a size is out of range, or ``encoder`` is unknown.

    Example:
        >>> sum(p.numel() for p in PTuning(8, 0, num_virtual_tokens=5, input_dim=4, hidden_dim=6).parameters())
        148
    """

    short_name = "p_tuning"

    def __init__(
        self,
        embedding_dim: int,
        instance_dim: int,
        num_virtual_tokens: int = 10,
        encoder: Reparameterization = "mlp",
        input_dim: int = 256,
        hidden_dim: int = 256,
        num_layers: int = 2,
        **init: Any,
    ) -> None:
        one_of("encoder", encoder, get_args(Reparameterization))
        super().__init__(embedding_dim, instance_dim, num_virtual_tokens, **init)
        self.shared_prompt = None  # f(E) is in its place
        k, h = positive("input_dim", input_dim), positive("hidden_dim", hidden_dim)
        self.inputs = nn.Parameter(torch.randn(num_virtual_tokens, k))
        self.lstm = None
        if encoder == "lstm":
            self.lstm = nn.LSTM(k, h, positive("num_layers", num_layers, 100), bidirectional=True, batch_first=True)
            self.mlp = nn.Sequential(nn.Linear(2 * h, 2 * h), nn.ReLU(), nn.Linear(2 * h, embedding_dim))
        else:
            hidden = nn.Linear(k, h), nn.ReLU(), nn.Linear(h, h), nn.ReLU()
            self.mlp = nn.Sequential(*hidden, nn.Linear(h, embedding_dim))

    def forward(self, instance: Tensor | None) -> Tensor:
        """Returns f(E) as ``[1, m, d]``, whatever the instance."""
        prompt: Tensor = self.mlp[-1](self._features()).unsqueeze(0)
        return prompt

    def _features(self) -> Tensor:
        """Returns the inputs of f's last layer, ``[m, h]`` or ``[m, 2h]``."""
        states = self.inputs if self.lstm is None else self.lstm(self.inputs)[0]
        features: Tensor = self.mlp[:-1](states)
        return features

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Returns E as ``shared_prompt``, the network f as ``generator``."""
        network = [parameter for name, parameter in self.named_parameters() if name != "inputs"]
        return {"shared_prompt": [self.inputs], "generator": network}

    @torch.no_grad()
    def initialize(self, vocabulary: Vocabulary | UniformTokens | None) -> None:
        """Solves for a last layer with which the soft prompt has the initial values that ``init`` says."""
        weight, bias = self.mlp[-1].parameters()
        target = torch.empty(self.num_virtual_tokens, len(weight)).normal_(std=self.init_std)
        self.set_to_tokens(target, vocabulary)
        features = self._features().double()
        mean = target.double().mean(dim=0)
        weight.copy_((torch.linalg.pinv(features) @ (target - mean)).T)
        bias.copy_(mean)

    def shared_virtual_tokens(self) -> Tensor:
        """Returns Z, ``[m, d]``."""
        return self.forward(None)[0]

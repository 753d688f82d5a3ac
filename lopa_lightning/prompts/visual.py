"""Visual Prompt Tuning (Jia et al., ECCV 2022, arXiv 2203.12119)."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor, nn

from lopa_lightning.errors import LoPAError
from lopa_lightning.prompts.base import UniformTokens, Vocabulary, positive
from lopa_lightning.prompts.prompt_tuning import PromptTuning


class VisualPromptTuning(PromptTuning):
    """One learned soft prompt for all images, as prompt tuning, with VPT's options: a projection and dropout.

    Placement ``before`` makes it VPT-shallow, ``every_layer`` VPT-deep. Trained parameters, for L layers (1 if
    shallow): L·m·d, or with projection L·m·k + (k + 1)·d.

    Args:
        embedding_dim: Width L·d of a virtual token.
        instance_dim: Width e of the instance vector, which VPT does not read.
        num_virtual_tokens: Number m of virtual tokens.
        project_dim: Width k of what is learned for each virtual token, from which one linear layer, shared by all
            layers of the backbone, makes d; None for d itself.
        dropout: Dropout on virtual tokens, of each image by itself.
        backbone_layers: Number L of layers that have virtual tokens of their own. The backbone says it.
        **init: Initial values, as of :class:`PromptTuning`.

    Raises:
        LoPAError: If a size or ``dropout`` is out of range.

    Example:
        VPT-deep on ViT-B/16 with 100 virtual tokens, without its head:

        >>> vpt = VisualPromptTuning(12 * 768, 0, num_virtual_tokens=100, backbone_layers=12)
        >>> sum(p.numel() for p in vpt.parameters())
        921600
    """

    short_name = "visual_prompt_tuning"

    def __init__(
        self,
        embedding_dim: int,
        instance_dim: int,
        num_virtual_tokens: int = 10,
        project_dim: int | None = None,
        dropout: float = 0.0,
        backbone_layers: int = 1,
        **init: Any,
    ) -> None:
        if not 0 <= dropout < 1:
            raise LoPAError(f"dropout must be from 0 to below 1, got {dropout!r}")
        layer_dim = positive("embedding_dim", embedding_dim, 2**31) // positive("backbone_layers", backbone_layers)
        own_dim = layer_dim if project_dim is None else positive("project_dim", project_dim)
        super().__init__(backbone_layers * own_dim, instance_dim, num_virtual_tokens, **init)
        self.backbone_layers = backbone_layers
        self.projection = None if project_dim is None else nn.Linear(project_dim, layer_dim)
        if self.projection is not None:
            nn.init.kaiming_normal_(self.projection.weight, mode="fan_out")
        self.dropout = nn.Dropout(dropout)

    def forward(self, instance: Tensor | None) -> Tensor:
        """Returns the soft prompt ``[1, m, L·d]``, whatever the instance."""
        prompt = super().forward(None)
        if self.projection is None:
            return prompt
        by_layer = prompt.view(1, self.num_virtual_tokens, self.backbone_layers, -1)
        projected: Tensor = self.projection(by_layer).flatten(-2)
        return projected

    def for_batch(self, prompt: Tensor, size: int) -> Tensor:
        """Drops numbers of the virtual tokens, others for each image: ``[B, m, L·d]`` in training."""
        if not self.training or self.dropout.p == 0:
            return prompt
        dropped: Tensor = self.dropout(prompt.expand(size, -1, -1))
        return dropped

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Returns what is learned for each virtual token as ``shared_prompt``, the layer behind it as ``generator``."""
        rest = {} if self.projection is None else {"generator": [*self.projection.parameters()]}
        return {**super().parameter_groups(), **rest}

    def initialize(self, vocabulary: Vocabulary | UniformTokens | None) -> None:
        """Draws the initial values; with a projection those of its width.

        Raises:
            LoPAError: If tokens of text are to be what a projection makes.
        """
        if self.projection is not None and isinstance(vocabulary, Vocabulary) and self.init != "normal":
            raise LoPAError(f"project_dim goes with images or init='normal', got a text model and init={self.init!r}")
        if self.projection is not None and isinstance(vocabulary, UniformTokens):
            vocabulary = dataclasses.replace(vocabulary, width=self.projection.in_features)
        super().initialize(vocabulary)

    def shared_virtual_tokens(self) -> Tensor:
        """Returns the soft prompt, ``[m, L·d]``."""
        return self.forward(None)[0]

"""The contract of a prompt encoder: an instance vector in, a soft prompt out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from lopa_lightning.errors import LoPAError


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a backbone, from which a soft prompt can be initialised.

    Attributes:
        embed: Maps token ids ``[n]`` to virtual tokens ``[n, d]``: the input embeddings, or with virtual tokens in
            every layer the tokens' keys and values.
        ordinary_ids: Ids of tokens that are text: neither special nor reserved.
        encode: Maps a text to token ids, without special tokens.
        decode: Maps token ids to a text.
        table: The input embeddings ``[V, d]``; None where virtual tokens are keys and values.
    """

    embed: Callable[[Tensor], Tensor]
    ordinary_ids: Sequence[int]
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], Any]
    table: Tensor | None = None


@dataclass(frozen=True)
class UniformTokens:
    """Stands in for a vocabulary where there is none: initial values are those of Visual Prompt Tuning.

    Attributes:
        patch_values: Numbers in a patch of an image, 3·p·p.
        width: Width d of a virtual token in one layer.

    Example:
        >>> UniformTokens(patch_values=3 * 16 * 16, width=768).bound
        0.0625
    """

    patch_values: int
    width: int

    @property
    def bound(self) -> float:
        """Initial values are U(-bound, bound): √(6 / (3·p·p + d)), as if virtual tokens were filters of patches."""
        return float((6 / (self.patch_values + self.width)) ** 0.5)


class PromptEncoder(nn.Module, ABC):
    """Makes a soft prompt for every instance. It is the only part of the model that must be trained.

    A subclass gives ``forward`` and ``parameter_groups``. Its first two arguments are ``embedding_dim`` (d) and
    ``instance_dim`` (e), which the backbone and the instance encoder decide; every other one has a default, so that a
    config can name the class and the options to change. It never sees the backbone, and holds nothing of a batch.

    A class that has an argument ``backbone_layers`` is told how many layers' virtual tokens lie side by side in
    ``embedding_dim``: of an image model with placement ``every_layer``, all; else 1.

    Args:
        num_virtual_tokens: Number m of virtual tokens that ``forward`` returns; 0 where there are none.
    """

    short_name: ClassVar[str | None] = None
    """Name of the class in checkpoints, which stays if the class is moved or renamed; None for its import path.
    It registers the class itself and is not inherited."""

    uses_instance: ClassVar[bool] = True
    """Whether ``forward`` reads the instance vector. If not, no instance encoder is loaded or run."""

    start_arguments: ClassVar[frozenset[str]] = frozenset({"init", "init_text", "init_std", "dropout"})
    """Arguments that matter in training alone: a checkpoint may be loaded where these differ."""

    def __init__(self, num_virtual_tokens: int) -> None:
        super().__init__()
        self.num_virtual_tokens = num_virtual_tokens

    @abstractmethod
    def forward(self, instance: Tensor | None) -> Tensor:
        """Makes soft prompts.

        Args:
            instance: Instance vectors ``[B, e]``, or None if ``uses_instance`` is False.

        Returns:
            Soft prompts ``[B, m, d]``, or ``[1, m, d]`` where all instances share one.
        """

    @abstractmethod
    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Returns the trained parameters by group; every group can have a learning rate of its own.

        Every parameter is in exactly one group.
        """

    def initialize(self, vocabulary: Vocabulary | UniformTokens | None) -> None:
        """Sets the initial values that depend on the backbone. Called once, before training.

        Args:
            vocabulary: The backbone's tokens; of an image model, which has none, what the initial values' size is; None
                for neither.
        """

    def for_batch(self, prompt: Tensor, size: int) -> Tensor:
        """Changes what ``forward`` made as the inputs of a batch read it, such as by dropout for each.

        Args:
            prompt: ``[B, m, d]``, or ``[1, m, d]``.
            size: Number B of inputs.
        """
        return prompt

    def token_offset(self) -> Tensor | None:
        """Returns what is added to the embeddings of a text's first s tokens, ``[s, d]``, or None for nothing."""
        return None

    def diagnostics(self, instance: Tensor | None) -> dict[str, Tensor]:
        """Returns what is worth watching in training, such as a gate's values.

        Args:
            instance: Instance vectors ``[B, e]``, or None if ``uses_instance`` is False.

        Returns:
            Name to values of any shape, which are shown as histograms.
        """
        return {}

    def shared_virtual_tokens(self) -> Tensor | None:
        """Returns the learned virtual tokens that all instances share, ``[m, d]``, or None if there are none."""
        return None


PromptEncoderFactory = Callable[[int, int], PromptEncoder]
"""Builds a prompt encoder from ``(embedding_dim, instance_dim)``: a class, or a ``functools.partial`` of one."""


def positive(name: str, value: int, most: int = 10**6) -> int:
    """Returns a size if it is a whole number from 1 to ``most``; products of three such sizes fit into 64 bits.

    Raises:
        LoPAError: If it is not.
    """
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if not is_whole or not 1 <= value <= most:
        allowed = ("at least 1" if value < 1 else f"at most {most}") if is_whole else "a whole number"
        raise LoPAError(f"{name} must be {allowed}, got {value!r}")
    return value

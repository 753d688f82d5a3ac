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
    """The tokens of a backbone, as far as a soft prompt can start from them.

    Attributes:
        embed: Token ids ``[n]`` to what stands for them where virtual tokens go, ``[n, d]``: input
            embeddings, or with virtual tokens in every layer their keys and values.
        ordinary_ids: Ids of tokens that stand for text: neither special nor reserved.
        encode: Text to token ids, without special tokens.
        decode: Token ids to text.
        table: The input embeddings ``[V, d]``; None where virtual tokens are keys and values.
    """

    embed: Callable[[Tensor], Tensor]
    ordinary_ids: Sequence[int]
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], Any]
    table: Tensor | None = None


class PromptEncoder(nn.Module, ABC):
    """Makes a soft prompt for every instance. The only part of the model that must be trained.

    A subclass gives ``forward`` and ``parameter_groups``. It takes ``embedding_dim`` and
    ``instance_dim`` as its first two arguments, and every other one with a default, so that a
    config can name the class and its options while the module supplies the sizes.

    A prompt encoder never sees the backbone and holds nothing of a batch. It knows neither text nor
    images: all it is given is a vector for each instance.

    Args:
        num_virtual_tokens: Number m of virtual tokens that ``forward`` returns; 0 where there are none.
    """

    short_name: ClassVar[str | None] = None
    """What checkpoints call the class, which may then be moved and renamed; None for the path that it is imported from.
    Of the class itself: a subclass does not inherit it."""

    uses_instance: ClassVar[bool] = True
    """Whether ``forward`` reads the instance vector. If not, no instance encoder is loaded or run."""

    start_arguments: ClassVar[frozenset[str]] = frozenset({"init", "init_text", "init_std", "dropout"})
    """Arguments that shape training alone. A trained prompt encoder computes the same without them,
    so a checkpoint may be loaded into one that differs in these."""

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
        """Names the trained parameters, so that each group can have a learning rate of its own.

        Returns:
            Group name to parameters; every parameter stands in exactly one group.
        """

    def initialize(self, vocabulary: Vocabulary | None) -> None:
        """Sets the initial values that depend on the backbone. Called once, before training.

        Args:
            vocabulary: The backbone's tokens, or None if it has none.
        """

    def token_offset(self) -> Tensor | None:
        """What is added to the embeddings of a text's first s tokens, ``[s, d]``, or None if they stay as they are."""
        return None

    def diagnostics(self, instance: Tensor | None) -> dict[str, Tensor]:
        """What is worth watching during training, such as how open a gate is.

        Args:
            instance: Instance vectors ``[B, e]``, or None if ``uses_instance`` is False.

        Returns:
            Name to values of any shape, shown as histograms.
        """
        return {}

    def shared_virtual_tokens(self) -> Tensor | None:
        """The learned virtual tokens that all instances share, ``[m, d]``, or None if there are none."""
        return None


PromptEncoderFactory = Callable[[int, int], PromptEncoder]
"""A prompt encoder that still wants ``(embedding_dim, instance_dim)``.

A class, or a ``functools.partial`` of one; a config names ``class_path`` and ``init_args``.
"""


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

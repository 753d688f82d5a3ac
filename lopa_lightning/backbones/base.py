"""The contracts of a backbone: what every one offers, what a language model offers beside, and what builds them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor, nn
from transformers import PreTrainedModel

from lopa_lightning.backbones.adapters import TrainedWeights, adapter_layers, trained_weights
from lopa_lightning.backbones.pretrained import Family, PretrainedSpec, hidden_size
from lopa_lightning.backbones.transformer_layers import compile_for_training, recompute, transformer_layers
from lopa_lightning.errors import LoPAError
from lopa_lightning.prompts.base import UniformTokens, Vocabulary
from lopa_lightning.task import Side

if TYPE_CHECKING:
    from lopa_lightning.instances.encoder import InstanceEncoder, InstanceEncoderSpec
    from lopa_lightning.instances.vectors import VectorCache

Batch = Mapping[str, Tensor]

Objective = Literal["masked_lm", "causal_lm", "head"]
"""How an answer is read from a backbone: as words of its language model, or by a trained head."""


@dataclass(frozen=True)
class States:
    """What a backbone computed for ``[Z; embed(x)]``.

    Attributes:
        hidden: Last hidden states ``[B, L, h]``; L is m + T, or T with virtual tokens in every layer.
        content_mask: 1 at the input's own tokens, 0 at virtual tokens and padding, ``[B, L]``. With placement ``after``
            1 at the virtual tokens alone: the others have not seen them.
        positions: Where each of the input's T tokens is among the L hidden states, ``[B, T]``.

    Example:
        >>> import torch
        >>> states = States(torch.tensor([[[9.0], [1.0], [2.0]]]), torch.tensor([[0, 1, 1]]), torch.tensor([[1, 2]]))
        >>> states.aligned().flatten().tolist(), states.spread(torch.tensor([[False, True]])).tolist()
        ([1.0, 2.0], [[0, 0, 1]])
    """

    hidden: Tensor
    content_mask: Tensor
    positions: Tensor

    def aligned(self) -> Tensor:
        """Returns the hidden states of the input's tokens, in the batch's order, ``[B, T, h]``."""
        index = self.positions.unsqueeze(-1).expand(-1, -1, self.hidden.shape[-1])
        return self.hidden.gather(1, index)

    def spread(self, mask: Tensor) -> Tensor:
        """Returns a mask of the input's tokens ``[B, T]`` as one of the hidden states, ``[B, L]``."""
        return self.content_mask.new_zeros(self.content_mask.shape).scatter(1, self.positions, mask.long())


class Backbone(nn.Module, ABC):
    """A pretrained transformer that is never changed, only shown soft prompts.

    As a baseline it may be changed after all: by an adapter in ``model``, or as a whole.

    Args:
        model: The pretrained model.
        dropout: Whether the model's own dropout is active in training. It is off otherwise, always.
        placement: Where virtual tokens go.
        trained: Which of its own weights are trained, see :func:`~lopa_lightning.backbones.adapters.trained_weights`.
        gradient_checkpointing: Whether its layers are computed a second time in the backward pass.
        compiled: Whether torch compiles its layers for training.

    Raises:
        LoPAError: If the model does not have the weights that are to be trained, or layers are to be computed a second
            time or compiled, and it does not say which they are.
    """

    input_keys: ClassVar[tuple[str, ...]]
    """Entries of a batch that ``forward`` reads, the optional ones too."""

    def __init__(
        self,
        model: PreTrainedModel,
        dropout: bool = False,
        placement: str = "before",
        trained: TrainedWeights = False,
        gradient_checkpointing: bool = False,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.placement = model, placement
        self.dropout = dropout or bool(trained)
        for parameter in trained_weights(model, self.body, trained):
            parameter.requires_grad_()
        if compiled:
            compile_for_training(self.layers())
        if gradient_checkpointing:
            recompute(self.layers())
        self.adapted = adapter_layers(model)

    def train(self, mode: bool = True) -> Backbone:
        """Stays in eval mode, unless the model's dropout was asked for; an adapter's dropout is its own."""
        super().train(mode and self.dropout)
        for layer in self.adapted:
            layer.train(mode)
        return self

    @property
    @abstractmethod
    def prompt_dim(self) -> int:
        """Width d of a virtual token."""

    @property
    def prompt_layers(self) -> int:
        """Number of layers that share a prompt encoder's gate, where a virtual token has as much for each of them.

        A soft prompt is then ``[B, m, layers · d]``. It is 1 where virtual tokens are keys and values.
        """
        return 1

    @property
    def takes_offset(self) -> bool:
        """Whether ``forward`` takes an offset of the input's embeddings."""
        return self.placement != "every_layer"

    @property
    def hidden_dim(self) -> int:
        """Width h of the hidden states."""
        return hidden_size(self.model.config)

    @property
    def body(self) -> PreTrainedModel:
        """The model without its head."""
        body: Any = self.model.base_model
        return body  # type: ignore[no-any-return]

    @abstractmethod
    def forward(self, prompt: Tensor, batch: Batch, offset: Tensor | None = None) -> States:
        """Runs the backbone on ``[Z; embed(x)]``.

        Args:
            prompt: Soft prompts Z ``[B, m, d]``, or ``[1, m, d]`` for all.
            batch: With the ``input_keys``.
            offset: Added to the embeddings of the input's first s tokens, ``[s, d]``.
        """

    def layers(self) -> list[nn.Module]:
        """Returns the transformer layers, in their order."""
        return transformer_layers(self.body)

    def count_tokens(self, batch: Batch) -> Tensor | int:
        """Returns how many tokens of their own the inputs of a batch have, without waiting for a device."""
        return batch[self.input_keys[0]].numel()

    def vocabulary(self) -> Vocabulary | UniformTokens | None:
        """Returns what soft prompts can be initialised from: tokens, or how they are drawn; None if there is none."""
        return None

    def check_padding(self, num_virtual_tokens: int, sides: Iterable[Side]) -> None:
        """Checks that an input gets the same states alone and in a batch, if batches are padded.

        Args:
            num_virtual_tokens: Number m of virtual tokens.
            sides: Where padding goes. A side is checked once.

        Raises:
            LoPAError: If virtual tokens and padding do not go together here.
        """


class LanguageModel(ABC):
    """What a backbone offers beside if it was loaded with a language model head."""

    @abstractmethod
    def label_logits(self, hidden: Tensor, token_ids: Tensor) -> Tensor:
        """Returns the logits of a few tokens ``[B, n]``, without those of the rest of the vocabulary.

        Args:
            hidden: Hidden states ``[B, h]``.
            token_ids: The tokens, ``[n]``.

        Raises:
            LoPAError: If the backbone was loaded without a language model head.
        """

    @abstractmethod
    def label_log_probabilities(self, hidden: Tensor, token_ids: Tensor) -> Tensor:
        """Returns the log-probabilities of a few tokens among the whole vocabulary, ``[B, n]`` in float32.

        Args:
            hidden: Hidden states ``[B, h]``.
            token_ids: The tokens, ``[n]``.

        Raises:
            LoPAError: If the backbone was loaded without a language model head.
        """

    @abstractmethod
    def token_losses(self, hidden: Tensor, targets: Tensor, chunk: int | None = None) -> tuple[Tensor, Tensor | None]:
        """Computes tokens' cross entropy over the whole vocabulary, of which a chunk's logits exist at a time.

        Args:
            hidden: Hidden states at the positions that predict a token, ``[N, h]``.
            targets: The tokens, ``[N]``.
            chunk: Positions at a time; by default as many as keep a chunk's logits at 64 MB.

        Returns:
            Losses in float32 and, where no gradients are taken, whether the token was the likeliest, each ``[N]``.

        Raises:
            LoPAError: If the backbone was loaded without a language model head.
        """


@dataclass(frozen=True, kw_only=True)
class InputSpec:
    """What a data module must know to make batches for a module; each kind of input has its own.

    Attributes:
        virtual_tokens: Number of virtual tokens that the backbone reads with each input; 0 where they stand in every
            layer, as keys and values alone.
        instance_vectors: Where the vectors of a frozen instance encoder are kept; None if each batch is encoded again.
    """

    virtual_tokens: int = 0
    instance_vectors: VectorCache | None = None

    def identity(self) -> dict[str, Any]:
        """Returns what a checkpoint says, beside the placement, of where virtual tokens stand."""
        return {}


class ReadsInputs(ABC):
    """A module that says how its inputs must be encoded."""

    @property
    @abstractmethod
    def input_spec(self) -> InputSpec:
        """What a data module needs to make batches for this module."""


@dataclass(frozen=True)
class InputKind(ABC):
    """A kind of input, such as text: builds its backbones, and says what batches must be made of.

    Attributes:
        spec: Where the backbone comes from.
        objective: How an answer is read.
    """

    spec: PretrainedSpec
    objective: Objective

    @property
    def family(self) -> Family:
        """Which head the backbone is loaded with."""
        return "encoder" if self.objective == "head" else self.objective

    def check(self) -> None:  # noqa: B027 - most kinds have nothing to check
        """Refuses what is known to be wrong before a model is built.

        Raises:
            LoPAError: If the objective cannot be served.
        """

    def check_instance(self, backbone: Backbone, encoder: InstanceEncoderSpec) -> None:  # noqa: B027
        """Refuses, before it is trained with, an instance encoder that would read such inputs amiss.

        Args:
            backbone: On the meta device.
            encoder: The instance encoder's.

        Raises:
            LoPAError: If an option of it does not go with them.
        """

    @abstractmethod
    def backbone(self, model: PreTrainedModel, **settings: Any) -> Backbone:
        """Builds the backbone.

        Args:
            model: Loaded, or on the meta device.
            **settings: ``dropout``, ``placement``, ``trained``, ``gradient_checkpointing`` and ``compiled``.
        """

    def input_spec(
        self,
        backbone: Backbone,
        num_virtual_tokens: int,
        encoder: InstanceEncoderSpec | None,
        vectors: VectorCache | None,
    ) -> InputSpec:
        """Returns what a data module must know.

        Args:
            backbone: On the meta device.
            num_virtual_tokens: Number m of virtual tokens.
            encoder: The instance encoder's; None if no instance is read.
            vectors: Where its vectors are kept; None if each batch is encoded again.

        Raises:
            LoPAError: If the input and the frozen models do not go together.
        """
        return InputSpec(virtual_tokens=num_virtual_tokens, instance_vectors=vectors)

    @abstractmethod
    def instance_states(self, model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor]:
        """Runs an instance encoder's model.

        Args:
            model: Without a head.
            batch: With what the encoder reads.

        Returns:
            Hidden states ``[B, S, h]``, and 1 at those that count, ``[B, S]``.
        """

    def blank_batch(self, examples: int, tokens: int) -> dict[str, Tensor]:
        """Returns a batch for the backbone that means nothing, for a look at what a step takes.

        Args:
            examples: Number B of inputs.
            tokens: Of each, where inputs differ in length.

        Raises:
            LoPAError: If there is none.
        """
        raise LoPAError(f"{type(self).__name__} makes no blank batch, so that a step's sizes are not known")

    def blank_instances(self, examples: int, tokens: int) -> dict[str, Tensor]:
        """Returns what the instance encoder reads beside it."""
        return {}

    def check_instances(self, encoder: InstanceEncoder) -> None:  # noqa: B027 - most kinds have nothing to check
        """Warns if an instance's vector depends on those that it is computed with.

        Args:
            encoder: With weights.
        """

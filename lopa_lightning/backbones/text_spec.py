"""Text as a kind of input: its backbones, and what a data module must know to turn text into batches for them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lopa_lightning.backbones.base import Backbone, Batch, InputKind, InputSpec, Objective
from lopa_lightning.backbones.chat import Chat, ChatFormat
from lopa_lightning.backbones.injection import position_ids
from lopa_lightning.backbones.padding_check import change_by_padding, tolerance, warn_of_mixing
from lopa_lightning.backbones.pretrained import (
    accepted_inputs,
    checked_shapes,
    first_position,
    has_token_types,
    load_tokenizer,
    max_positions,
)
from lopa_lightning.backbones.text import TextBackbone
from lopa_lightning.backbones.tokens import check_token_ids, end_of, padded, running_ids
from lopa_lightning.errors import LoPAError

if TYPE_CHECKING:
    from lopa_lightning.instances.encoder import InstanceEncoder, InstanceEncoderSpec
    from lopa_lightning.instances.vectors import VectorCache


@dataclass(frozen=True)
class TextSpec(InputSpec):
    """Tokenizers and lengths of the frozen models.

    Attributes:
        tokenizer: The backbone's.
        max_tokens: Tokens of text that fit into the backbone beside the virtual tokens; None if not limited.
        objective: How an answer is read, which decides what a template looks like.
        instance_tokenizer: The instance encoder's; None if no instance vector is needed.
        instance_max_tokens: Tokens that the instance encoder reads at most; None if not limited.
        start_token: Whether a text to be continued starts with a start token also where the tokenizer puts none.
        placement: Where virtual tokens go.
    """

    tokenizer: PreTrainedTokenizerBase
    max_tokens: int | None
    objective: Objective
    instance_tokenizer: PreTrainedTokenizerBase | None = None
    instance_max_tokens: int | None = None
    start_token: bool = False
    placement: str = "before"

    @functools.cached_property
    def chat(self) -> ChatFormat:
        """What renders chats, with the soft prompt in them where it stands there."""
        return ChatFormat(self.tokenizer, self.placement)

    def identity(self) -> dict[str, Any]:
        """Returns the hash of the chat template, where the soft prompt stands in a chat."""
        return {"chat_template": self.chat.template_hash} if self.chat.holds_prompt else {}

    def prompt_ids(self, prompts: Sequence[str | Chat]) -> tuple[list[list[int]], list[int]]:
        """Tokenises texts and chats that are to be continued.

        Args:
            prompts: Where the soft prompt stands in a chat, a text is one message of the user.

        Returns:
            The tokens of each, and how many of them stand before a soft prompt in a chat, or after the text.
        """
        found = [self._prompt_ids(prompt) for prompt in prompts]
        is_last = self.placement == "after"
        return [ids for ids, _ in found], [len(ids) if is_last else position for ids, position in found]

    def _prompt_ids(self, prompt: str | Chat) -> tuple[list[int], int]:
        if isinstance(prompt, str) and not self.chat.holds_prompt:
            return [*self.start_ids, *running_ids(self.tokenizer, [prompt])[0]], 0
        chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        (ids,), (position,) = self.chat.ids([self.chat.prompt(chat)])
        return ids, position

    @property
    def start_ids(self) -> list[int]:
        """What stands before a text that is to be continued: a start token, or nothing.

        Raises:
            LoPAError: If there is to be one always, and the tokenizer has none.
        """
        if self.start_token and self.tokenizer.bos_token_id is None:
            raise LoPAError("start_token: true needs a backbone whose tokenizer has a start token")
        bare: list[int] = self.tokenizer("")["input_ids"]
        starts = self.start_token or (bool(bare) and bare[0] == self.tokenizer.bos_token_id)
        return [self.tokenizer.bos_token_id] if starts else []

    def instance_batch(self, texts: Sequence[str], device: Any) -> dict[str, Tensor]:
        """Returns what the instance encoder reads of texts, as entries of a batch; of a text too long, its end."""
        tokenizer = self.instance_tokenizer
        if tokenizer is None:
            return {}
        return instance_batch(tokenizer, end_of(tokenizer, texts, self.instance_max_tokens), device)


@dataclass(frozen=True)
class TextKind(InputKind):
    """Texts, read as token ids."""

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The backbone's tokenizer."""
        return load_tokenizer(self.spec)

    def check(self) -> None:
        """Raises a LoPAError if a masked LM's tokenizer has no mask."""
        if self.objective == "masked_lm" and self.tokenizer.mask_token is None:
            raise LoPAError(f"{self.spec.name!r} has no mask token; use objective: causal_lm or head")

    def backbone(self, model: PreTrainedModel, **settings: Any) -> TextBackbone:
        """Builds the backbone, see :class:`~lopa_lightning.backbones.text.TextBackbone`."""
        return TextBackbone(model, tokenizer=self.tokenizer, **settings)

    def input_spec(
        self,
        backbone: Backbone,
        num_virtual_tokens: int,
        encoder: InstanceEncoderSpec | None,
        vectors: VectorCache | None,
    ) -> TextSpec:
        """Returns tokenizers and lengths.

        Raises:
            LoPAError: If the virtual tokens leave no room for text, a tokenizer has ids that its model has no embedding
                for, or the soft prompt is to stand in a chat, and the backbone or its template has no place for it.
        """
        assert isinstance(backbone, TextBackbone)
        m, limit = num_virtual_tokens, backbone.max_positions
        check_token_ids(self.tokenizer, len(backbone.embedding_weight), self.spec.name)
        if limit is not None and m >= limit:
            raise LoPAError(f"{m} virtual tokens leave no room for text in the {limit} positions of the backbone")
        room, read = None if limit is None else limit - m, 0 if backbone.placement == "every_layer" else m
        chat = ChatFormat(self.tokenizer, backbone.placement)
        if chat.holds_prompt and self.objective != "causal_lm":
            needs = "needs a causal language model that answers (objective: causal_lm)"
            raise LoPAError(f"placement {chat.placement!r} {needs}, got objective {self.objective!r}")
        if backbone.placement == "after" and self.objective == "masked_lm":
            raise LoPAError(
                "placement 'after' needs objective: causal_lm or head; a mask has not seen what comes later"
            )
        chat.check()
        spec = TextSpec(self.tokenizer, room, self.objective, virtual_tokens=read, placement=chat.placement)
        if encoder is None:
            return spec
        if encoder.is_backbone:
            tokenizer, longest = self.tokenizer, least(limit, encoder.max_length)
        else:
            tokenizer, longest = instance_reading(encoder)
        return dataclasses.replace(
            spec, instance_tokenizer=tokenizer, instance_max_tokens=longest, instance_vectors=vectors
        )

    def instance_states(self, model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor]:
        """Runs an instance encoder's model on ``instance_input_ids`` and what goes with them, each ``[B, S]``."""
        mask, types = batch["instance_attention_mask"], batch.get("instance_token_type_ids")
        extra = {}
        if "position_ids" in accepted_inputs(model):
            extra["position_ids"] = position_ids(mask, first_position(model))
        if types is not None and has_token_types(model):
            extra["token_type_ids"] = types
        hidden = model(input_ids=batch["instance_input_ids"], attention_mask=mask, **extra).last_hidden_state
        return hidden, mask

    def blank_batch(self, examples: int, tokens: int) -> dict[str, Tensor]:
        """Returns ids and mask with a token of padding, as most have: without any, some attentions take no mask."""
        ids = torch.zeros(examples, tokens, dtype=torch.long)
        mask = torch.ones_like(ids)
        mask[0, 1:][-1:] = 0
        return {"input_ids": ids, "attention_mask": mask, "prompt_position": ids.new_zeros(examples)}

    def blank_instances(self, examples: int, tokens: int) -> dict[str, Tensor]:
        """Returns ids and mask, without padding."""
        ids = torch.zeros(examples, tokens, dtype=torch.long)
        return instance_inputs(ids, torch.ones_like(ids))

    def check_instances(self, encoder: InstanceEncoder) -> None:
        """Warns if a text's vector depends on the texts that it is padded with."""
        model = encoder.loaded()
        weight = cast(Tensor, model.get_input_embeddings().weight)
        room = least(max_positions(model), encoder.spec.max_length)

        def vector(ids: Tensor, mask: Tensor) -> Tensor:
            return encoder.vectors({"instance_input_ids": ids, "instance_attention_mask": mask})[0]

        change = change_by_padding(vector, len(weight), "right", 0, room, 0, weight.device)
        if not change <= tolerance(model):
            warn_of_mixing(f"instance encoder {type(model).__name__}", "right", change)


def instance_reading(encoder: InstanceEncoderSpec) -> tuple[PreTrainedTokenizerBase, int | None]:
    """Returns the tokenizer of an instance encoder with a model of its own, and how many tokens it reads at most.

    Raises:
        LoPAError: If its tokenizer has ids that the model has no embedding for.
    """
    model = TextBackbone(checked_shapes(encoder.pretrained(), "encoder"))
    tokenizer = load_tokenizer(encoder.pretrained())
    check_token_ids(tokenizer, len(model.embedding_weight), encoder.name)
    return tokenizer, least(model.max_positions, encoder.max_length)


def least(*limits: int | None) -> int | None:
    """Returns the lowest of the limits that there are; None where there is none."""
    return min((limit for limit in limits if limit is not None), default=None)


def instance_batch(
    tokenizer: PreTrainedTokenizerBase, encoded: Mapping[str, Sequence[list[int]]], device: Any = None
) -> dict[str, Tensor]:
    """Returns encoded texts as what the instance encoder reads, each ``[B, S]``.

    Args:
        tokenizer: The instance encoder's.
        encoded: ``input_ids``, and ``token_type_ids`` where it has them.
        device: Of the batch.
    """
    ids, mask = padded(encoded["input_ids"], tokenizer.pad_token_id or 0, "right", device)
    types = encoded.get("token_type_ids")
    return instance_inputs(ids, mask, None if types is None else padded(types, 0, "right", device)[0])


def instance_inputs(ids: Tensor, mask: Tensor, types: Tensor | None = None) -> dict[str, Tensor]:
    """Returns what the instance encoder reads as entries of a batch, each ``[B, S]``."""
    inputs = {"instance_input_ids": ids, "instance_attention_mask": mask}
    return inputs if types is None else {**inputs, "instance_token_type_ids": types}

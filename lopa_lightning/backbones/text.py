"""The frozen backbone: embeddings in, hidden states out, and the language model head where one is asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache, DynamicCache

from lopa_lightning.backbones.base import Backbone, Batch, LanguageModel, States
from lopa_lightning.backbones.injection import (
    CHAT_PLACEMENTS,
    Layout,
    Placement,
    insert,
    position_ids,
    prompt_layout,
    with_offset,
)
from lopa_lightning.backbones.lm_head import VocabularyHead, chunked_cross_entropy
from lopa_lightning.backbones.padding_check import check_causal, check_embeddings, check_padding
from lopa_lightning.backbones.prefix import cache_input, layer_prompts
from lopa_lightning.backbones.pretrained import (
    accepted_inputs,
    first_position,
    has_token_types,
    is_causal,
    max_positions,
)
from lopa_lightning.backbones.text_first import TwoParts, reads_in_parts
from lopa_lightning.backbones.tokens import vocabulary
from lopa_lightning.errors import LoPAError, one_of
from lopa_lightning.prompts.base import Vocabulary
from lopa_lightning.task import Side

_REFUSED_IN_EVERY_LAYER = {
    "compiled": "compile makes one program of all layers, and placement 'every_layer' one of each; "
    "use placement 'before' or 'after_first', or compile: false",
    "gradient_checkpointing": "gradient_checkpointing computes a layer twice, and placement 'every_layer' fills its "
    "cache once; use placement 'before' or 'after_first', or gradient_checkpointing: false",
}


class TextBackbone(Backbone, LanguageModel):
    """A language model from transformers, which reads token ids.

    Args:
        model: Encoder, masked LM or causal LM from transformers.
        tokenizer: The model's, to initialise soft prompts from words; None if there is none.
        placement: Where virtual tokens go, see :mod:`~lopa_lightning.backbones.injection`.
        **settings: As of :class:`~lopa_lightning.backbones.base.Backbone`.

    Raises:
        LoPAError: If ``placement`` is unknown, or the architecture cannot be fed embeddings, takes no
            attention mask, or cannot have virtual tokens in every layer, or after the text, where that is
            asked for; or if every layer's are to be computed a second time or compiled.
    """

    input_keys = ("input_ids", "attention_mask", "token_type_ids", "prompt_position")

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        placement: str = "before",
        **settings: Any,
    ) -> None:
        one_of("placement", placement, get_args(Placement))
        for setting, reason in _REFUSED_IN_EVERY_LAYER.items():
            if placement == "every_layer" and settings.get(setting):
                raise LoPAError(reason)
        super().__init__(model, placement=placement, **settings)
        self._is_causal = is_causal(self.body)
        if placement == "after" and not self._is_causal:
            raise LoPAError(
                f"placement 'after' is for causal language models, and {type(self.body).__name__} does not say that it "
                "is one; use 'before' or 'after_first'"
            )
        self._accepts = accepted_inputs(self.body)
        if missing := {"inputs_embeds", "attention_mask"} - self._accepts:
            names = " and no ".join(sorted(missing))
            raise LoPAError(f"{type(model).__name__} takes no {names}, so it cannot be given soft prompts")
        self._has_token_types = has_token_types(self.body)
        self.tokenizer = tokenizer
        self._checked_sides: set[Side] = set()
        self._layers = layer_prompts(self.body) if placement == "every_layer" else None
        as_one = settings.get("compiled") or settings.get("gradient_checkpointing") or self._has_token_types
        self.reads_in_parts = placement == "after" and not as_one and reads_in_parts(self.body)
        # In a list, so that torch does not register the head's weights a second time.
        self._heads = [] if self.body is model else [VocabularyHead(model)]

    @property
    def prompt_dim(self) -> int:
        """Width d of a virtual token: the input embeddings', or that of all layers' keys and values."""
        return int(self.embedding_weight.shape[1]) if self._layers is None else self._layers.width

    @property
    def embedding_weight(self) -> Tensor:
        """The weight of the model's embedding layer, ``[V, d]``."""
        return cast(Tensor, self.model.get_input_embeddings().weight).detach()

    @property
    def max_positions(self) -> int | None:
        """How many tokens, virtual ones included, the model has positions for; None if that is not limited."""
        return max_positions(self.body)

    def embedding_table(self) -> Tensor:
        """Returns the vectors that token ids stand for at the model's input, ``[V, d]``.

        No copy, unless the model's embedding layer does more than look up (Gemma's scales).
        """
        layer, weight = self.model.get_input_embeddings(), self.embedding_weight
        if type(layer) is nn.Embedding:
            return weight
        with torch.no_grad():
            return cast(Tensor, layer(torch.arange(len(weight), device=weight.device)))

    def virtual_tokens(self, token_ids: Tensor) -> Tensor:
        """Returns what real tokens are where virtual tokens go, ``[n, d]``.

        Args:
            token_ids: ``[n]``.
        """
        token_ids = token_ids.to(self.embedding_weight.device)
        if self._layers is not None:
            return self._layers.embed(self.body, token_ids)
        return self.embedding_table()[token_ids]

    def vocabulary(self) -> Vocabulary | None:
        """Returns the tokenizer's tokens that stand for text."""
        if self.tokenizer is None:
            return None
        found = vocabulary(self.tokenizer, len(self.embedding_weight), self.virtual_tokens)
        return found if self._layers is not None else dataclasses.replace(found, table=self.embedding_weight)

    def count_tokens(self, batch: Batch) -> Tensor:
        """Returns how many tokens the texts of a batch have, without waiting for a device."""
        return batch["attention_mask"].sum()

    def check_padding(self, num_virtual_tokens: int, sides: Iterable[Side]) -> None:
        """Checks that a text gets the same states alone and padded, see :func:`~.padding_check.check_padding`."""
        if not self._checked_sides:
            check_embeddings(self)
        pad_id = 0 if self.tokenizer is None else self.tokenizer.pad_token_id or 0
        for side in sorted({*sides} - self._checked_sides):
            self._checked_sides.add(side)
            check_padding(self, num_virtual_tokens, side, pad_id)

    def check_causal(self) -> None:
        """Checks that no token sees a later one, see :func:`~.padding_check.check_causal`."""
        check_causal(self)

    def forward(self, prompt: Tensor, batch: Batch, offset: Tensor | None = None) -> States:
        """Runs the backbone on ``[Z; embed(x)]``.

        Args:
            prompt: Soft prompts Z ``[B, m, d]``, or ``[1, m, d]`` for all.
            batch: Token ids ``input_ids`` ``[B, T]``, padded on either side; ``attention_mask`` ``[B, T]``, 1 at the
                text's tokens; perhaps ``token_type_ids`` ``[B, T]``: virtual tokens belong to the first segment;
                ``prompt_position`` ``[B]``, the number of tokens before the virtual ones, for a placement in a chat,
                and for ``after`` where a text goes on after them.
            offset: Added to the embeddings of the text's first s tokens, ``[s, d]``.

        Returns:
            Hidden states of virtual tokens and text; with virtual tokens in every layer the text's alone.

        Raises:
            LoPAError: If m + T is more than the backbone has positions for.
        """
        input_ids, attention_mask = batch["input_ids"], batch["attention_mask"]
        token_type_ids, m = batch.get("token_type_ids"), prompt.shape[1]
        if self.max_positions is not None and m + input_ids.shape[1] > self.max_positions:
            raise LoPAError(
                f"{m} virtual tokens and {input_ids.shape[1]} tokens of text are more than the "
                f"{self.max_positions} positions of the backbone; truncate the text"
            )
        virtual, embedded = self._embedded(prompt, batch, offset)
        if self._layers is not None:
            positions = position_ids(attention_mask, first_position(self.body) + m)
            mask, cache = F.pad(attention_mask, (m, 0), value=1), self._layers.cache(virtual)
            hidden = self._run(
                embedded, positions, token_type_ids, attention_mask=mask, **{str(cache_input(self.body)): cache}
            )
            here = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
            return States(hidden, attention_mask, here)
        layout, is_after = self._layout(batch, m), m > 0 and self.placement == "after"
        prompted = insert(layout, virtual, embedded)
        types = None if token_type_ids is None else insert(layout, 0, token_type_ids)
        if is_after and self.reads_in_parts:
            # Where all of each text comes first, the sizes of both parts are known.
            sizes = None if "prompt_position" in batch else (input_ids.shape[1], m)
            start = (layout.index == 0).int().argmax(dim=1)
            parts = TwoParts.of(insert(layout, 1, attention_mask), start, sizes)
            hidden = self._read_in_parts(embedded, prompted, parts)
        elif self._is_causal and layout.start is not None:
            # All padding comes after the tokens that are read, which see nothing of it: attention without a mask.
            hidden = self._run(prompted, None, types, attention_mask=None)
        else:
            mask = insert(layout, 1, attention_mask)
            hidden = self._run(prompted, position_ids(mask, first_position(self.body)), types, attention_mask=mask)
        if is_after:  # the text's own tokens have not seen the soft prompt
            return States(hidden, insert(layout, 1, torch.zeros_like(attention_mask)), layout.positions)
        return States(hidden, insert(layout, 0, attention_mask), layout.positions)

    def _read_in_parts(self, embedded: Tensor, prompted: Tensor, parts: TwoParts) -> Tensor:
        """Reads what stands before virtual tokens, then these and the rest; returns the hidden states of all.

        Args:
            embedded: The text, ``[B, T, d]``: no gradient goes to it from the soft prompt.
            prompted: With virtual tokens in it, ``[B, L, d]``.
            parts: How to split it.
        """

        def at(values: Tensor, columns: Tensor) -> Tensor:
            return values.gather(1, columns.unsqueeze(-1).expand(-1, -1, values.shape[-1]))

        cache = {str(cache_input(self.body)): DynamicCache(), "use_cache": True}
        seen = torch.cat([parts.mask, parts.rest_mask], dim=1)
        places = position_ids(seen, first_position(self.body))
        before = embedded[:, : parts.first]
        text = self._run(before, places[:, : parts.first], None, attention_mask=parts.mask, **cache)
        after = self._run(at(prompted, parts.rest), places[:, parts.first :], None, attention_mask=seen, **cache)
        return at(torch.cat([text, after], dim=1), parts.columns)

    def _layout(self, batch: Batch, num_virtual_tokens: int) -> Layout:
        position: Tensor | int = int(self.placement == "after_first")
        if self.placement in CHAT_PLACEMENTS:
            position = batch["prompt_position"]
        elif self.placement == "after":
            position = batch["prompt_position"] if "prompt_position" in batch else batch["attention_mask"].sum(dim=1)
        return prompt_layout(batch["attention_mask"], num_virtual_tokens, position)

    def _embedded(self, prompt: Tensor, batch: Batch, offset: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns virtual tokens in the backbone's dtype ``[B, m, ...]``, and the text's embeddings ``[B, T, d]``."""
        embedded = self.model.get_input_embeddings()(batch["input_ids"])
        if offset is not None:
            embedded = with_offset(embedded, offset, batch.get("given_mask", batch["attention_mask"]))
        return prompt.to(embedded.dtype).expand(len(embedded), -1, -1), embedded

    def to_continue(
        self, prompt: Tensor, texts: Batch, offset: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Cache | None]:
        """Returns what a model's ``generate`` is given to continue ``[Z; x]``.

        Args:
            prompt: Soft prompts Z ``[B, m, d]``, or ``[1, m, d]`` for all.
            texts: As in :meth:`forward`, padded on the left.
            offset: See :meth:`forward`.

        Returns:
            Embeddings ``[B, m + T, d]`` and their mask ``[B, m + T]``. With virtual tokens in every layer,
            the filled cache as well: of the embeddings, the virtual tokens' are then never read.
        """
        attention_mask, m = texts["attention_mask"], prompt.shape[1]
        virtual, embedded = self._embedded(prompt, texts, offset)
        if self._layers is not None:
            cache = self._layers.cache(virtual) if m else None
            return F.pad(embedded, (0, 0, m, 0)), F.pad(attention_mask, (m, 0), value=1), cache
        layout = self._layout(texts, m)
        return insert(layout, virtual, embedded), insert(layout, 1, attention_mask), None

    def _run(self, embedded: Tensor, places: Tensor | None, token_type_ids: Tensor | None, **options: Any) -> Tensor:
        """Runs the model, and returns its last hidden states; what it does not take is left out."""
        if places is not None and "position_ids" in self._accepts:
            options["position_ids"] = places
        if token_type_ids is not None and self._has_token_types:
            options["token_type_ids"] = token_type_ids
        if "use_cache" in self._accepts:
            # Unless it is read again, a cache that is returned holds every layer's keys and values for nothing.
            options.setdefault("use_cache", False)
        hidden: Tensor = self.body(inputs_embeds=embedded, **options).last_hidden_state
        return hidden

    def label_logits(self, hidden: Tensor, token_ids: Tensor) -> Tensor:
        """See :class:`~lopa_lightning.backbones.base.LanguageModel`."""
        return self._head(hidden, token_ids)

    def label_log_probabilities(self, hidden: Tensor, token_ids: Tensor) -> Tensor:
        """See :class:`~lopa_lightning.backbones.base.LanguageModel`."""
        return self._head(hidden).float().log_softmax(-1)[:, token_ids]

    def token_losses(self, hidden: Tensor, targets: Tensor, chunk: int | None = None) -> tuple[Tensor, Tensor | None]:
        """See :class:`~lopa_lightning.backbones.base.LanguageModel`."""
        return chunked_cross_entropy(self._head, hidden, targets, chunk)

    @property
    def _head(self) -> VocabularyHead:
        if not self._heads:
            raise LoPAError(f"{type(self.model).__name__} has no language model head")
        return self._heads[0]

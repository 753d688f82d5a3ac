"""Makes virtual tokens of every layer: keys and values that a text attends to, handed over as a filled cache."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from lopa_lightning.backbones.pretrained import accepted_inputs, freeze
from lopa_lightning.errors import LoPAError

Shape = tuple[int, int]
"""Heads of the keys or values (fewer than of the queries where they are grouped), and the width of each."""


@dataclass(frozen=True)
class LayerPrompts:
    """Shapes the virtual tokens that stand in every layer of a model.

    A virtual token is one vector: the first layer's key of all heads, its value, then the second's,
    and so on. Prefix tuning (Li & Liang 2021, arXiv 2101.00190) and P-tuning v2 (Liu et al. 2022,
    arXiv 2110.07602) train such vectors.

    Attributes:
        shapes: Shapes of key and value, alternating, layer by layer.
    """

    shapes: tuple[Shape, ...]

    @property
    def width(self) -> int:
        """Numbers that one virtual token has."""
        return sum(heads * dim for heads, dim in self.shapes)

    def cache(self, prompt: Tensor) -> Cache:
        """Makes the cache that a model would have after reading the virtual tokens ``[B, m, width]``."""
        parts = torch.split(prompt, [heads * dim for heads, dim in self.shapes], dim=-1)
        states = [torch.unflatten(part, -1, shape).transpose(1, 2) for part, shape in zip(parts, self.shapes)]
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(zip(states[::2], states[1::2])):
            cache.update(keys, values, layer)
        return cache

    @torch.no_grad()
    def embed(self, model: PreTrainedModel, token_ids: Tensor) -> Tensor:
        """Returns the keys and values of real tokens, read one after the other.

        Args:
            model: Without a head.
            token_ids: ``[n]``.

        Returns:
            ``[n, width]``.
        """
        cache = DynamicCache()
        model(input_ids=token_ids[None], use_cache=True, **{str(cache_input(model)): cache})
        return torch.cat([part[0].transpose(0, 1).flatten(1) for part in _states(cache)], dim=-1)


def cache_input(model: PreTrainedModel) -> str | None:
    """Returns what a model's ``forward`` calls its cache; None if it takes none.

    Args:
        model: Without a head.
    """
    # transformers 5.24 renamed it.
    return next((name for name in ("cache", "past_key_values") if name in accepted_inputs(model)), None)


def layer_prompts(model: PreTrainedModel) -> LayerPrompts:
    """Finds the shapes of keys and values in a model's layers, from a model without weights.

    Args:
        model: Without a head.

    Raises:
        LoPAError: If the model takes no cache, does not fill it in every layer, or forgets what lies
            outside of a window: a virtual token would not be seen by every token.
    """
    name = type(model).__name__
    cache_name = cache_input(model)
    if cache_name is None or "use_cache" not in accepted_inputs(model):
        raise _unfit(name, "takes no cache of keys and values")
    if any(type(layer) is not DynamicLayer for layer in DynamicCache(config=model.config).layers):
        raise _unfit(name, "has layers that do not attend to all tokens before")
    if model.is_gradient_checkpointing:
        raise _unfit(name, "drops the cache under gradient checkpointing")
    with torch.device("meta"):
        twin = freeze(type(model)(model.config))
        embedded = torch.empty(1, 1, cast(Tensor, model.get_input_embeddings().weight).shape[1])
        run = functools.partial(twin, inputs_embeds=embedded, use_cache=True)
        try:
            cache = DynamicCache()
            run(**{cache_name: cache})
            found = LayerPrompts(tuple((int(part.shape[1]), int(part.shape[3])) for part in _states(cache)))
            filled = found.cache(torch.empty(1, 2, found.width))
            run(**{cache_name: filled})
            lengths = {int(part.shape[2]) for part in _states(filled)}
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
            raise _unfit(name, f"does not run with a filled cache ({str(error).splitlines()[0]})") from error
    if lengths != {3} or len(found.shapes) != 2 * model.config.num_hidden_layers:
        raise _unfit(name, "does not keep the keys and values of every layer in a cache")
    return found


def _states(cache: Cache) -> list[Tensor]:
    """Returns keys and values, alternating, layer by layer."""
    layers: list[Any] = cache.layers
    return [state for layer in layers for state in (layer.keys, layer.values)]


def _unfit(name: str, reason: str) -> LoPAError:
    """Returns the error for a model that cannot have virtual tokens in every layer."""
    return LoPAError(f"placement 'every_layer' cannot be right here: {name} {reason}; use 'before' or 'after_first'")

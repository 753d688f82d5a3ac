"""Completes prompts that are token ids, by a module's prompted model."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lopa_lightning.backbones.generation import generate, generation_config
from lopa_lightning.backbones.sharding import is_sharded
from lopa_lightning.backbones.text import TextBackbone
from lopa_lightning.backbones.text_spec import TextSpec
from lopa_lightning.backbones.tokens import cut_left, padded
from lopa_lightning.errors import LoPAError
from lopa_lightning.modules.prompted_model import PromptedModel


def completed(
    net: PromptedModel,
    spec: TextSpec,
    prompts: tuple[list[list[int]], list[int]],
    encoder: Mapping[str, Tensor],
    generation: Mapping[str, Any],
    num_samples: int,
    seeds: Sequence[Any],
    stop: Sequence[str],
    device: torch.device,
) -> list[list[str]]:
    """Completes prompts; one too long is cut from the left.

    Args:
        net: In eval mode.
        spec: Of the module.
        prompts: Token ids of each, and how many of them stand before the virtual tokens.
        encoder: What the instance encoder reads, by its names in a batch.
        generation: Fields of ``GenerationConfig``.
        num_samples: Completions of each.
        seeds: One for each prompt.
        stop: Strings that end a completion.
        device: Of the module.

    Raises:
        LoPAError: If a setting is wrong, or a chat is too long.
    """
    backbone, tokenizer = net.backbone, spec.tokenizer
    assert isinstance(backbone, TextBackbone)
    config = generation_config(generation, tokenizer, backbone.model)
    ids, positions = prompts
    room = room_for_prompts(spec, int(config.max_new_tokens))
    spec.chat.check_fits(max(map(len, ids)), room)
    ids = cut_left(ids, room, len(spec.start_ids))
    if backbone.placement == "after":
        positions = list(map(len, ids))
    read, mask = padded(ids, int(config.pad_token_id), "left", device)
    texts = {"input_ids": read, "attention_mask": mask, "prompt_position": torch.tensor(positions).to(device)}

    def generated() -> list[list[str]]:
        with torch.no_grad():
            prompt, _ = net.soft_prompt(encoder)
        offset, shared = net.prompt_encoder.token_offset(), is_sharded(net)
        return generate(backbone, prompt, texts, config, tokenizer, num_samples, seeds, stop, offset, shared)

    return net.run(generated)


def room_for_prompts(spec: TextSpec, max_new_tokens: int) -> int:
    """Returns how many tokens a prompt may have beside virtual ones and those that are generated.

    Args:
        spec: Of the module.
        max_new_tokens: That are generated.

    Raises:
        LoPAError: If there is no room for any.
    """
    positions = spec.max_tokens
    room = sys.maxsize if positions is None else positions - max_new_tokens
    if room <= len(spec.start_ids):
        raise LoPAError(
            f"max_new_tokens {max_new_tokens} leaves no room for a prompt in the {positions} positions that the "
            "backbone has beside the virtual tokens; give a smaller one in generation"
        )
    return room

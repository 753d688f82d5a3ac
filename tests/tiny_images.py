"""Tiny image models with random weights, saved as folders that ``from_pretrained`` loads with their image processor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    BeitConfig,
    BeitModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    DeiTConfig,
    DeiTModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    PreTrainedModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

WIDTH, LAYERS, PATCH, SIDE = 16, 3, 4, 12
PATCHES = (SIDE // PATCH) ** 2
SIZES: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": SIDE,
    "patch_size": PATCH,
}
_BARE = {"add_pooling_layer": False}
MODELS: dict[str, tuple[int, Callable[[], PreTrainedModel]]] = {
    "vit": (1, lambda: ViTModel(ViTConfig(**SIZES), **_BARE)),
    "deit": (2, lambda: DeiTModel(DeiTConfig(**SIZES), **_BARE)),
    "dinov2": (1, lambda: Dinov2Model(Dinov2Config(**SIZES, drop_path_rate=0.3))),
    "dinov2_registers": (
        4,
        lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SIZES, num_register_tokens=3)),
    ),
    "dinov3": (3, lambda: DINOv3ViTModel(DINOv3ViTConfig(**SIZES, num_register_tokens=2, pos_embed_rescale=2.0))),
    "clip": (1, lambda: CLIPVisionModel(CLIPVisionConfig(**SIZES))),
    "siglip": (0, lambda: SiglipVisionModel(SiglipVisionConfig(**SIZES, vision_use_head=False))),
    "beit": (1, lambda: BeitModel(BeitConfig(**SIZES, use_absolute_position_embeddings=True), **_BARE)),
    "beit_relative": (
        1,
        lambda: BeitModel(BeitConfig(**SIZES, use_relative_position_bias=True, drop_path_rate=0.3), **_BARE),
    ),
    "beit_shared": (1, lambda: BeitModel(BeitConfig(**SIZES, use_shared_relative_position_bias=True), **_BARE)),
}
"""Number of tokens before the patches, and what builds the model."""
TOWERS: dict[str, Callable[[], PreTrainedModel]] = {
    "clip": lambda: CLIPModel(CLIPConfig(vision_config=SIZES, text_config=_TEXT)),
    "siglip": lambda: SiglipModel(SiglipConfig(vision_config=SIZES, text_config=_TEXT)),
}
_TEXT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 20}
PROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "size": {"height": SIDE, "width": SIDE},
    "resample": 2,
    "image_mean": [0.4, 0.5, 0.6],
    "image_std": [0.3, 0.2, 0.25],
}


def vision_model(kind: str) -> PreTrainedModel:
    """Builds a model in eval mode whose every number matters."""
    torch.manual_seed(sum(map(ord, kind)))
    model = MODELS[kind][1]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.requires_grad_(False).eval()


def save_vision(model: PreTrainedModel, folder: Path, **processor: Any) -> str:
    """Saves a model with an image processor, and returns the folder."""
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({**PROCESSOR, **processor}))
    return str(folder)

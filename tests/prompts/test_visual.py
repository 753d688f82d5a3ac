"""Visual Prompt Tuning's initial values, options and counts, and LoPA's one gate for the prompts of all layers."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from transformers import ViTConfig, ViTModel

from lopa_lightning.backbones.image_processing import ImageProcessing
from lopa_lightning.backbones.vision import VisionBackbone
from lopa_lightning.errors import LoPAError
from lopa_lightning.prompts import IDPG, LoPA, PromptTuning, PTuning, UniformTokens, VisualPromptTuning, Vocabulary

B16 = UniformTokens(patch_values=3 * 16 * 16, width=768)
LAYERS, D, E, M = 3, 8, 6, 40
DEEP: dict[str, Any] = {"num_virtual_tokens": M, "backbone_layers": LAYERS}


@pytest.mark.parametrize(
    ("patch", "bound"), [(16, 0.0625), (14, 0.0665), (32, 0.0395), (8, 0.0791)], ids=lambda value: str(value)
)
def test_the_bound_is_that_of_the_published_code(patch: int, bound: float) -> None:
    assert UniformTokens(3 * patch**2, 768).bound == pytest.approx(bound, abs=5e-5)


@pytest.mark.parametrize("init", ["vocabulary", "normal"])
def test_initial_values_are_uniform_unless_they_are_normal(init: Any) -> None:
    prompt = VisualPromptTuning(LAYERS * 768, 0, **DEEP, init=init)
    prompt.initialize(B16)
    values = prompt.shared_virtual_tokens()
    if init == "normal":
        assert values.abs().max() > 3
        return
    assert 0.0624 < values.abs().max() <= 0.0625
    assert values.std().item() == pytest.approx(0.0625 / 3**0.5, rel=0.01)


def test_other_methods_start_where_vpt_does() -> None:
    lopa, instance = LoPA(768 * LAYERS, E, **DEEP).eval(), torch.randn(2, E)
    lopa.initialize(B16)
    assert lopa.shared_virtual_tokens() is not None
    torch.testing.assert_close(lopa(instance)[0], lopa.shared_virtual_tokens() / 2)  # type: ignore[operator]
    idpg, p_tuning = IDPG(768, E, num_virtual_tokens=M), PTuning(768, 0, num_virtual_tokens=M)
    for made in (lopa, idpg, p_tuning):
        made.initialize(B16)
    for values in (lopa(instance), idpg.shared_prompt.weight, p_tuning(None)):  # type: ignore[union-attr]
        assert 0.0622 < values.abs().max() < 0.0626


def test_with_a_projection_what_is_learned_has_the_initial_values_of_its_width() -> None:
    prompt = VisualPromptTuning(LAYERS * D, 0, **DEEP, project_dim=50)
    prompt.initialize(UniformTokens(patch_values=10, width=D))
    assert prompt.shared_prompt is not None
    learned, layer = prompt.shared_prompt.weight, prompt.projection
    assert learned.shape == (M, LAYERS * 50)
    assert 0.31 < learned.abs().max() <= (6 / 60) ** 0.5
    assert layer is not None
    assert layer.weight.std().item() == pytest.approx((2 / D) ** 0.5, rel=0.15)  # kaiming's, of its outputs
    for number, made in enumerate(prompt(None)[0].chunk(LAYERS, dim=-1)):
        own = learned[:, number * 50 : (number + 1) * 50]
        torch.testing.assert_close(made, own @ layer.weight.T + layer.bias)
    assert sum(p.numel() for p in prompt.parameters()) == LAYERS * M * 50 + 51 * D


def test_dropout_is_drawn_for_each_image() -> None:
    prompt = VisualPromptTuning(LAYERS * D, 0, **DEEP, dropout=0.25)
    made = prompt(None)
    dropped = prompt.for_batch(made, 50)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], (made / 0.75).expand(50, -1, -1)[kept])
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.01)
    assert not torch.equal(kept[0], kept[1])
    assert prompt.eval().for_batch(made, 50) is made
    plain = VisualPromptTuning(D, 0)
    assert plain.for_batch(plain(None), 5).shape == (1, 10, D)


def test_parameters_are_as_many_as_published() -> None:
    processing = ImageProcessing((224, 224), (224, 224), False, 2, 1 / 255, (0.5,) * 3, (0.5,) * 3)
    for m, classes, placement, expected in ((100, 6, "every_layer", 926_214), (5, 397, "every_layer", 351_373)):
        with torch.device("meta"):
            backbone = VisionBackbone(ViTModel(ViTConfig(), add_pooling_layer=False), processing, placement=placement)
            options = {"num_virtual_tokens": m, "backbone_layers": backbone.prompt_layers}
            prompt, head = VisualPromptTuning(backbone.prompt_dim, 768, **options), torch.nn.Linear(768, classes)
        assert sum(p.numel() for part in (prompt, head) for p in part.parameters()) == expected
    assert backbone.vocabulary().bound == 0.0625
    with torch.device("meta"):
        lopa = LoPA(12 * 768, 768, num_virtual_tokens=10, rank=4, hidden_dim=64, backbone_layers=12)
    assert sum(p.numel() for p in lopa.parameters()) == 12 * 10 * 768 + 300_712


@pytest.mark.parametrize("combine", ["gate", "add", "concat", "max", "instance_only"])
def test_all_layers_share_one_low_rank_matrix(combine: Any) -> None:
    lopa = LoPA(LAYERS * D, E, num_virtual_tokens=4, rank=2, hidden_dim=5, combine=combine, backbone_layers=LAYERS)
    torch.nn.init.normal_(lopa.row_head[-1].weight)
    instance, lopa = torch.randn(2, E), lopa.eval()
    low_rank, made = lopa.low_rank(instance), lopa(instance).chunk(LAYERS, dim=-1)
    assert low_rank.shape == (2, 4, D)
    shared = torch.zeros(4, LAYERS * D) if lopa.shared_prompt is None else lopa.shared_prompt.weight
    for own, found in zip(shared.chunk(LAYERS, dim=-1), made):
        expected = {
            "gate": own / (1 + (-low_rank).exp()),
            "add": own + low_rank,
            "concat": torch.cat([own.expand(2, -1, -1), low_rank], dim=1),
            "max": torch.where(own > low_rank, own, low_rank),
            "instance_only": low_rank,
        }[combine]
        torch.testing.assert_close(found, expected)


def refuse(made: Any, vocabulary: Any) -> None:
    made.initialize(vocabulary)


def test_what_cannot_be_right_is_refused() -> None:
    words = Vocabulary(lambda ids: torch.zeros(len(ids), D), range(9), lambda text: [1], str)
    text = PromptTuning(D, 0, init="text", init_text="a word")
    for make, message in (
        (partial(VisualPromptTuning, D, 0, dropout=1.0), r"^dropout must be from 0 to below 1, got 1.0$"),
        (partial(VisualPromptTuning, D, 0, project_dim=0), r"^project_dim must be at least 1, got 0$"),
        (partial(LoPA, 3 * D, E, rank=D + 1, backbone_layers=3), r"^rank must be at most 8, got 9$"),
        (partial(refuse, text, B16), r"^init='text' needs a backbone with a vocabulary; use init='normal'$"),
        (partial(refuse, VisualPromptTuning(D, 0, project_dim=4), words), r"^project_dim goes with images or"),
    ):
        with pytest.raises(LoPAError, match=message):
            make()

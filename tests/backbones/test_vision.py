"""Virtual tokens among the patches of an image, in every architecture that is allowed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BeitConfig, BeitModel, ConvNextConfig, ConvNextModel, SwinConfig, SwinModel

from lopa_lightning import InstanceEncoderSpec, PretrainedSpec
from lopa_lightning.backbones.base import Backbone
from lopa_lightning.backbones.image_spec import ARCHITECTURES, ImageKind, ImageProcessing, load_processing
from lopa_lightning.backbones.pretrained import checked_shapes, load_model
from lopa_lightning.backbones.vision import ImageStates, VisionBackbone, normalised
from lopa_lightning.errors import LoPAError
from tests.tiny_images import LAYERS, MODELS, PATCH, PATCHES, SIDE, SIZES, TOWERS, WIDTH, save_vision, vision_model

PROCESSING = ImageProcessing((SIDE, SIDE), (SIDE, SIDE), False, 2, 1 / 255, (0.4, 0.5, 0.6), (0.3, 0.2, 0.25))
M = 3
PLACEMENTS = ("before", "every_layer")


def images(count: int = 2, side: tuple[int, int] = (SIDE, SIDE)) -> Tensor:
    return torch.randint(256, (count, 3, *side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def prompts(backbone: Backbone, count: int = 2) -> Tensor:
    return torch.randn(count, M, backbone.prompt_dim, generator=torch.Generator().manual_seed(1), requires_grad=True)


def own_states(kind: str, model: Any, pixels: Tensor) -> Tensor:
    """What transformers itself computes."""
    hidden: Tensor = model(pixel_values=pixels).last_hidden_state
    return model.post_layernorm(hidden) if kind == "clip" else hidden


def recorded(backbone: VisionBackbone, prompt: Tensor) -> tuple[list[Tensor], list[Tensor], ImageStates]:
    """What each layer reads and returns."""
    read, returned, hooks = [], [], []
    inner = [layer.forward for layer in backbone.layers()]

    def spy(layer: nn.Module, forward: Any) -> None:
        def run(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            read.append(hidden)
            out = forward(hidden, *args, **kwargs)
            returned.append(out[0] if isinstance(out, tuple) else out)
            return out

        layer.forward = run
        hooks.append(lambda: setattr(layer, "forward", forward))

    for layer, forward in zip(backbone.layers(), inner):
        spy(layer, forward)
    states = backbone(prompt, {"pixels": images(len(prompt))})
    for undo in hooks:
        undo()
    return read, returned, states


@pytest.mark.parametrize("kind", MODELS)
def test_without_virtual_tokens_it_is_transformers_own_to_the_bit(kind: str) -> None:
    model = vision_model(kind)
    pixels = images()
    mean, std = torch.tensor(PROCESSING.mean).view(3, 1, 1), torch.tensor(PROCESSING.std).view(3, 1, 1)
    expected = own_states(kind, model, (pixels.float() * (1 / 255) - mean) / std)
    for placement in PLACEMENTS:
        backbone = VisionBackbone(model, PROCESSING, placement=placement)
        prompt = prompts(backbone)
        backbone(prompt, {"pixels": pixels})  # leaves nothing behind
        with pytest.raises((RuntimeError, IndexError)):
            backbone(prompt[:, :, :-1], {"pixels": pixels})
        states = backbone(prompt[:, :0], {"pixels": pixels})
        assert torch.equal(states.hidden, expected)
    if kind == "clip":
        assert torch.equal(states.hidden[:, 0], model(normalised(pixels, PROCESSING, torch.float32)).pooler_output)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("kind", MODELS)
def test_each_slot_has_its_virtual_token_and_the_rest_is_untouched(kind: str, placement: str) -> None:
    first = MODELS[kind][0]
    backbone = VisionBackbone(vision_model(kind), PROCESSING, placement=placement).train()
    prompt = prompts(backbone)
    read, returned, states = recorded(backbone, prompt)
    alone, _, _ = recorded(backbone, prompt[:, :0])
    own = prompt.view(2, M, -1, WIDTH)
    assert len(read) == LAYERS
    for number, hidden in enumerate(read):
        before, slots, after = hidden.split([first, M, PATCHES], dim=1)
        if number == 0 or placement == "every_layer":
            assert torch.equal(slots, own[:, :, number])
        elsewhere = (
            alone[0].split([first, PATCHES], 1) if number == 0 else returned[number - 1].split([first, M, PATCHES], 1)
        )
        assert torch.equal(before, elsewhere[0])
        assert torch.equal(after, elsewhere[-1])
        if number and placement == "before":
            assert torch.equal(hidden, returned[number - 1])
    is_cls = [1] * min(first, 1) + [0] * max(first - 1, 0)
    assert states.content_mask.tolist() == [[*is_cls, *[0] * M, *[1] * PATCHES]] * 2
    assert states.virtual_mask.tolist() == [[0] * first + [1] * M + [0] * PATCHES] * 2
    assert states.patch_mask.tolist() == [[0] * (first + M) + [1] * PATCHES] * 2


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("kind", MODELS)
def test_an_image_is_read_alike_alone_in_a_batch_and_twice_in_training(kind: str, placement: str) -> None:
    backbone = VisionBackbone(vision_model(kind), PROCESSING, placement=placement).train()
    prompt, pixels = prompts(backbone, 4), images(4)
    together = backbone(prompt, {"pixels": pixels}).hidden
    assert torch.equal(backbone(prompt, {"pixels": pixels}).hidden, together)
    for row in range(4):
        alone = backbone(prompt[row : row + 1], {"pixels": pixels[row : row + 1]}).hidden
        torch.testing.assert_close(alone[0], together[row], rtol=1e-4, atol=1e-4)
    shared = backbone(prompt[:1], {"pixels": pixels}).hidden
    torch.testing.assert_close(shared, backbone(prompt[:1].expand(4, -1, -1), {"pixels": pixels}).hidden)
    # Attention goes both ways: virtual tokens to the patches, and patches to the virtual tokens.
    assert (shared[1:] - together[1:])[:, -PATCHES:].abs().max() > 1e-4
    first = MODELS[kind][0]
    assert shared[:, first : first + M].std(dim=0).max() > 1e-4


@pytest.mark.sampled(7)
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("kind", MODELS)
def test_gradients_are_equal_with_gradient_checkpointing(kind: str, placement: str) -> None:
    found = []
    for again in (False, True):
        backbone = VisionBackbone(vision_model(kind), PROCESSING, placement=placement, gradient_checkpointing=again)
        prompt = prompts(backbone)
        states = backbone.train()(prompt, {"pixels": images()})
        backbone(prompt[:, :0], {"pixels": images()})  # another pass before the backward one, as an instance encoder's
        states.hidden.square().sum().backward()
        assert prompt.grad is not None
        assert all(p.grad is None for p in backbone.parameters())
        assert prompt.grad.view(2, M, -1, WIDTH).abs().sum((0, 1, 3)).min() > 1e-3  # every layer's
        found.append(prompt.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


def plain_vit(weights: dict[str, Tensor], pixels: Tensor, layers: list[Tensor]) -> Tensor:
    """ViT with virtual tokens, by the formula: ``layers`` are those of the first layer, or of each."""

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-12).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    filters, size = weights["embeddings.patch_embeddings.projection.weight"], len(pixels)
    cut = pixels.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).permute(0, 2, 3, 1, 4, 5).reshape(size, PATCHES, -1)
    patches = cut @ filters.flatten(1).T + weights["embeddings.patch_embeddings.projection.bias"]
    x = torch.cat([weights["embeddings.cls_token"].expand(size, -1, -1), patches], 1)
    x = x + weights["embeddings.position_embeddings"]
    for number in range(LAYERS):
        if number < len(layers):
            x = torch.cat([x[:, :1], layers[number].expand(size, -1, -1), x[:, -PATCHES:]], 1)
        at, y = f"layers.{number}", norm(x, f"layers.{number}.layernorm_before")
        q, k, v = (linear(y, f"{at}.attention.{p}_proj").unflatten(-1, (2, -1)).transpose(1, 2) for p in "qkv")
        weight = (q @ k.mT / (WIDTH / 2) ** 0.5).softmax(-1)
        x = x + linear((weight @ v).transpose(1, 2).flatten(2), f"{at}.attention.o_proj")
        y = linear(norm(x, f"{at}.layernorm_after"), f"{at}.mlp.fc1")
        x = x + linear(y * (1 + torch.erf(y / 2**0.5)) / 2, f"{at}.mlp.fc2")
    return norm(x, "layernorm")


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_vpt_is_its_formula_to_ten_digits(placement: str) -> None:
    model = vision_model("vit").double()
    backbone = VisionBackbone(model, PROCESSING, placement=placement).train()
    prompt = prompts(backbone, 1).detach().double().requires_grad_()
    weight = torch.randn(2, 1 + M + PATCHES, WIDTH, dtype=torch.float64)
    states = backbone(prompt, {"pixels": images()})
    (gradient,) = torch.autograd.grad((states.hidden * weight).sum(), prompt)

    again = prompt.detach().requires_grad_()
    pixels = normalised(images(), PROCESSING, torch.float64)
    expected = plain_vit(dict(model.state_dict()), pixels, list(again.view(1, M, -1, WIDTH).unbind(2)))
    (expected_gradient,) = torch.autograd.grad((expected * weight).sum(), again)
    torch.testing.assert_close(states.hidden, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["beit_relative", "beit_shared"])
def test_virtual_tokens_have_no_relative_position(kind: str) -> None:
    model: Any = vision_model(kind)
    backbone = VisionBackbone(model, PROCESSING, placement="every_layer")
    prompt = prompts(backbone)
    states = backbone(prompt, {"pixels": images()})

    plain: Any = BeitModel(BeitConfig(**SIZES), add_pooling_layer=False)  # the same without biases
    tables: Any = vision_model(kind)
    plain.load_state_dict(model.state_dict(), strict=False)
    plain.eval()
    x, window = plain.embeddings(normalised(images(), PROCESSING, torch.float32)), (SIDE // PATCH, SIDE // PATCH)
    for number, own in enumerate(prompt.view(2, M, LAYERS, WIDTH).unbind(2)):
        source = tables.shared_position_bias or tables.layers[number].relative_position_bias
        table, padded = source(window)[0], torch.zeros(1, 2, 1 + M + PATCHES, 1 + M + PATCHES)
        padded[0, :, :1, :1], padded[0, :, :1, 1 + M :] = table[:, :1, :1], table[:, :1, 1:]
        padded[0, :, 1 + M :, :1], padded[0, :, 1 + M :, 1 + M :] = table[:, 1:, :1], table[:, 1:, 1:]
        x = plain.layers[number](torch.cat([x[:, :1], own, x[:, -PATCHES:]], 1), attention_mask=padded)
    assert table.abs().min() > 0
    torch.testing.assert_close(states.hidden, plain.layernorm(x), rtol=1e-5, atol=1e-5)


def test_dinov3_reads_images_that_are_no_squares() -> None:
    model: Any = vision_model("dinov3")
    wide = ImageProcessing((12, 20), (12, 20), False, 2, 1 / 255, PROCESSING.mean, PROCESSING.std)
    backbone = VisionBackbone(model, wide).train()
    states = backbone(prompts(backbone), {"pixels": images(2, (12, 20))})
    assert states.positions.tolist() == [list(range(3 + M, 3 + M + 15))] * 2
    # Rotated by its place are the patches alone: a virtual token is read alike wherever the patches are.
    read, _, _ = recorded(VisionBackbone(model, PROCESSING), prompts(backbone))
    positions = model.rope_embeddings(torch.zeros(1, 3, SIDE, SIDE))
    assert read[0].shape[1] - positions[0].shape[-2] == 3 + M


@pytest.mark.parametrize("name", TOWERS)
def test_of_a_model_of_texts_and_images_the_image_part_is_read(name: str, tmp_path: Path) -> None:
    whole: Any = TOWERS[name]().eval()
    spec = PretrainedSpec(save_vision(whole, tmp_path))
    ImageKind(spec, "head").check()
    loaded, pixels = load_model(spec, "encoder"), torch.randn(2, 3, SIDE, SIDE)
    assert type(checked_shapes(spec, "encoder")) is type(loaded)
    expected = whole.vision_model(pixel_values=pixels).last_hidden_state
    assert torch.equal(loaded(pixel_values=pixels).last_hidden_state, expected)


def test_an_instance_is_cls_and_patches_without_virtual_tokens(tmp_path: Path) -> None:
    here = PretrainedSpec(save_vision(vision_model("dinov2_registers"), tmp_path / "a"))
    there = save_vision(vision_model("clip"), tmp_path / "b", image_mean=[0.1, 0.2, 0.3])
    model = load_model(here, "encoder")
    hidden, mask = ImageKind(here, "head").instance_states(model, {"pixels": images()})
    assert torch.equal(hidden, model(normalised(images(), load_processing(here), torch.float32)).last_hidden_state)
    assert mask.tolist() == [[1, 0, 0, 0, *[1] * PATCHES]] * 2

    kind = ImageKind(here, "head", InstanceEncoderSpec(there))
    backbone = kind.backbone(checked_shapes(here, "encoder"))
    spec = kind.input_spec(backbone, M, kind.instance, None)
    assert (spec.processing.mean, spec.virtual_tokens) == (PROCESSING.mean, M)
    assert spec.instance_processing == load_processing(PretrainedSpec(there))
    other: Any = load_model(PretrainedSpec(there), "encoder")
    batch = {"pixels": images(), "instance_pixels": images(3)}
    hidden, mask = kind.instance_states(other, batch)
    assert torch.equal(
        hidden[:, 0], other(normalised(images(3), spec.instance_processing, torch.float32)).pooler_output
    )
    assert mask.tolist() == [[1] * (1 + PATCHES)] * 3
    alike = ImageKind(here, "head", InstanceEncoderSpec(str(tmp_path / "a")))
    assert alike.input_spec(backbone, M, alike.instance, None).instance_processing is None


NUMBERS: dict[str, Any] = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "rescale_factor": 0.5}


DINOV3 = {"image_processor_type": "DINOv3ViTImageProcessorFast", "size": {"height": 32, "width": 48}}
CLIP = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 32, "crop_size": 28, "do_center_crop": True}


@pytest.mark.parametrize(
    ("settings", "size", "resize", "crop"),
    [
        ({"image_processor_type": "ViTFeatureExtractor", "size": 32}, (32, 32), (32, 32), False),
        (DINOV3, (32, 48), (32, 48), False),
        (CLIP, (28, 28), 32, True),
        ({"image_processor_type": "DeiTImageProcessor", "size": 32, "crop_size": 28}, (28, 28), (32, 32), True),
    ],
)
def test_an_image_processor_is_read(
    settings: dict[str, Any], size: Any, resize: Any, crop: bool, tmp_path: Path
) -> None:
    given = {"image_processor_type": None, **NUMBERS, **settings}
    spec = PretrainedSpec(save_vision(vision_model("vit"), tmp_path, **given))
    assert load_processing(spec) == ImageProcessing(size, resize, crop, 2, 0.5, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    mean, std = (torch.tensor(NUMBERS[name]).view(3, 1, 1) for name in ("image_mean", "image_std"))
    expected = ((images().double() * 0.5 - mean) / std).float()
    torch.testing.assert_close(normalised(images(), load_processing(spec), torch.float32), expected)


def vit() -> Any:
    return vision_model("vit")


def swin() -> Any:
    return SwinModel(SwinConfig(embed_dim=8, depths=[1], num_heads=[1]))


def convnext() -> Any:
    return ConvNextModel(ConvNextConfig(depths=[1], hidden_sizes=[8], num_stages=1))


SHORTEST = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 12}, "do_center_crop": False}


@pytest.mark.parametrize(
    ("model", "processor", "message"),
    [
        (swin, {}, r"is of kind 'swin', .*allowed are beit, clip_vision_model, "),
        (convnext, {}, r"is of kind 'convnext'"),
        (vit, {"size": {"height": 16, "width": 16}}, r"does not read the images of 16 x 16 pixels"),
        (vit, {"image_processor_type": "ConvNextImageProcessor"}, r"processed by ConvNextImageProcessor; allowed are"),
        (vit, SHORTEST, r"makes images of no fixed size: \{'shortest_edge': 12\}"),
        (vit, {"image_mean": [0.5]}, r"has 1 channels; images have 3"),
        (vit, {"do_resize": False}, r"must resize and not leave sizes"),
    ],
)
def test_what_cannot_be_right_is_refused(
    model: Callable[[], Any], processor: dict[str, Any], message: str, tmp_path: Path
) -> None:
    kind = ImageKind(PretrainedSpec(save_vision(model(), tmp_path, **processor)), "head")

    def check() -> None:
        kind.check()
        kind.input_spec(kind.backbone(checked_shapes(kind.spec, "encoder")), M, None, None)

    with pytest.raises(LoPAError, match=message) as error:
        check()
    assert "\n" not in str(error.value)


def test_settings_that_images_do_not_have_are_refused(tmp_path: Path) -> None:
    spec = PretrainedSpec(save_vision(vision_model("vit"), tmp_path))
    with pytest.raises(LoPAError, match=r"^images need objective: head, got 'causal_lm'$"):
        ImageKind(spec, "causal_lm").check()
    with pytest.raises(LoPAError, match=r"placement of images must be one of before, every_layer, got 'after_first'"):
        VisionBackbone(vision_model("vit"), PROCESSING, placement="after_first")
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(LoPAError, match=r"no image processor found for .*preprocessor_config\.json is missing"):
        load_processing(spec)


def test_every_architecture_is_tested_here() -> None:
    assert {vision_model(kind).config.model_type for kind in MODELS} == set(ARCHITECTURES)


def test_initial_values_are_bound_by_the_patches() -> None:
    backbone = VisionBackbone(vision_model("vit"), PROCESSING, placement="every_layer")
    assert backbone.vocabulary().bound == pytest.approx((6 / (3 * PATCH**2 + WIDTH)) ** 0.5)
    assert (backbone.prompt_dim, backbone.prompt_layers) == (LAYERS * WIDTH, LAYERS)
    assert backbone.count_tokens({"pixels": images(4)}) == 4 * PATCHES


@pytest.mark.parametrize("resize", [-1, 0, (1, 2, 3), True, 10**9, "x", None, [13, 0]])
def test_a_processing_of_a_strangers_file_has_pixels(resize: Any) -> None:
    numbers: dict[str, Any] = {"crop": True, "resample": 3, "scale": 1.0, "mean": (0, 0, 0), "std": (1, 1, 1)}
    ImageProcessing(size=(12, 12), resize=(12, 13), **numbers)
    with pytest.raises(LoPAError, match="resize must be pixels from 1 to 10000, got"):
        ImageProcessing(size=(12, 12), resize=resize, **numbers)


@pytest.mark.parametrize("kind", MODELS)
def test_partial_tuning_is_of_the_last_layer_and_the_norm_after_it(kind: str) -> None:
    norm = {"beit": None, "clip": "post_layernorm", "siglip": "post_layernorm", "dinov3": "norm"}
    model = VisionBackbone(vision_model(kind), PROCESSING, trained=1).model
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    last = {name for name, _ in model.named_parameters() if f".{LAYERS - 1}." in name}
    own = norm.get(kind.partition("_")[0], "layernorm")  # of BEiT it is in the pooler, which nothing reads
    assert trained == last | ({f"{own}.weight", f"{own}.bias"} if own else set())

"""Images of every kind become the pixels that they should, and the ones that an image processor makes of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from PIL import Image

from lopa_lightning.backbones.image_spec import ImageProcessing
from lopa_lightning.data.pixels import ImageError, image_files, processed, random_view, read_image
from tests.data.image_files import colours, saved

MEAN, STD = (0.48, 0.45, 0.4), (0.26, 0.27, 0.28)
CLIP = ImageProcessing((8, 8), 8, True, 3, 1 / 255, MEAN, STD)
VIT = ImageProcessing((8, 6), (8, 6), False, 2, 1 / 255, MEAN, STD)
PADDED = replace(CLIP, size=(11, 10), resize=7)
SIZES = [(1, 1), (1, 60), (60, 1), (7, 9), (9, 7), (8, 8), (100, 33), (33, 101)]  # width, height


def read(content: bytes) -> np.ndarray:
    image = read_image(content)
    assert image.mode == "RGB"
    return np.asarray(image)


def processor(processing: ImageProcessing, **options: Any) -> Any:
    """Transformers' own image processor, without torchvision."""
    settings: dict[str, Any] = {"image_mean": MEAN, "image_std": STD, "resample": processing.resample, **options}
    name = "CLIPImageProcessor" if processing.crop else "ViTImageProcessor"
    of_pil = getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)
    if not isinstance(processing.resize, int):
        return of_pil(size=dict(zip(("height", "width"), processing.size)), **settings)
    crop = dict(zip(("height", "width"), processing.size))
    return of_pil(size={"shortest_edge": processing.resize}, crop_size=crop, **settings)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("processing", [CLIP, VIT, PADDED], ids=["crop", "resize", "padded crop"])
def test_pixels_are_those_of_transformers(processing: ImageProcessing, size: tuple[int, int]) -> None:
    image = Image.fromarray(colours(*size))
    pixels = processed(read_image(saved(image)), processing)
    wanted = processor(processing, do_rescale=False, do_normalize=False)(image, return_tensors="np")["pixel_values"][0]
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, wanted)
    mean, std = (np.array(numbers)[:, None, None] for numbers in (MEAN, STD))
    normalised = processor(processing)(image, return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose((pixels * processing.scale - mean) / std, normalised, rtol=0, atol=1e-6)


def palette(transparent: int | None = None) -> bytes:
    image = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8), "L").convert("P")
    image.putdata([0, 1, 2, 1])
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    return saved(image, **({} if transparent is None else {"transparency": transparent}))


def flat(mode: str, colour: Any, format: str = "PNG", **options: Any) -> bytes:
    return saved(Image.new(mode, (1, 1), colour), format, **options)


MODES: dict[str, tuple[bytes, Any]] = {
    "grey": (flat("L", 7), [[[7, 7, 7]]]),
    "black and white": (flat("1", 1), [[[255, 255, 255]]]),
    "palette": (palette(), [[[10, 20, 30], [40, 50, 60]], [[70, 80, 90], [40, 50, 60]]]),
    "transparent palette": (palette(1), [[[10, 20, 30], [255] * 3], [[70, 80, 90], [255] * 3]]),
    "alpha": (flat("RGBA", (0, 100, 255, 51)), [[[204, 224, 255]]]),  # 255 - 51 + 0.2 of the colour
    "fully transparent": (flat("RGBA", (9, 9, 9, 0)), [[[255, 255, 255]]]),
    "grey with alpha": (flat("LA", (0, 51)), [[[204, 204, 204]]]),
    "transparent colour": (flat("RGB", (1, 2, 3), transparency=(1, 2, 3)), [[[255, 255, 255]]]),
    "CMYK": (flat("CMYK", (255, 0, 0, 0), "TIFF"), [[[0, 255, 255]]]),
    "16 bits": (
        saved(Image.fromarray(np.array([[0, 255, 256, 65535]], np.uint16))),
        [[[0] * 3, [0] * 3, [1] * 3, [255] * 3]],
    ),
    "16 bits, big-endian": (saved(Image.frombytes("I;16B", (1, 1), b"\x12\x34"), "TIFF"), [[[0x12] * 3]]),
    "bitmap": (flat("RGB", (1, 2, 3), "BMP"), [[[1, 2, 3]]]),
}


@pytest.mark.parametrize("mode", MODES)
def test_modes(mode: str) -> None:
    content, wanted = MODES[mode]
    np.testing.assert_array_equal(read(content), wanted)


TURNS = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: np.swapaxes(a, 0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.swapaxes(np.rot90(a, 2), 0, 1),
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("is_grey", [False, True])
def test_a_camera_that_was_turned(orientation: int, is_grey: bool) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    values = colours(3, 2)
    image = Image.fromarray(values[..., 0] if is_grey else values)
    wanted = np.repeat(values[..., :1], 3, 2) if is_grey else values
    np.testing.assert_array_equal(read(saved(image, exif=exif)), TURNS[orientation](wanted))


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_several_frames_the_first(format: str) -> None:
    frames = [Image.new("RGB", (2, 2), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if format == "WEBP" else {}
    content = saved(frames[0], format, save_all=True, append_images=frames[1:], **options)
    np.testing.assert_array_equal(read(content), np.full((2, 2, 3), [255, 0, 0]))


def test_what_is_read_in_memory(tmp_path: Any) -> None:
    values = colours(4, 3)
    Image.fromarray(values).save(tmp_path / "a.png")
    sources: list[Any] = [values, Image.fromarray(values), tmp_path / "a.png", str(tmp_path / "a.png")]
    for source in sources:
        np.testing.assert_array_equal(np.asarray(read_image(source)), values)
    np.testing.assert_array_equal(np.asarray(read_image(values[..., 0])), np.repeat(values[..., :1], 3, 2))
    for wrong in (values / 255, values[..., :2], values[None]):
        with pytest.raises(ImageError, match=r"must be uint8 \[H, W\] or \[H, W, 3\], got"):
            read_image(wrong)


@pytest.mark.parametrize("maximum", [255, 4095, 65535])
def test_grey_of_more_than_8_bits_is_read_by_its_upper_8(maximum: int) -> None:
    values = np.array([[0, maximum // 2, maximum]])
    content = f"P5 3 1 {maximum}\n".encode() + values.astype(">u2" if maximum > 255 else "u1").tobytes()
    np.testing.assert_array_equal(read(content)[0, :, 0], [0, 127, 255])


BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is no image of the formats AVIF, BMP"),
    "a text": (b"<svg/>", "is no image of the formats"),
    "a program for Ghostscript": (saved(Image.new("RGB", (2, 2)), "EPS"), "is no image of the formats"),
    "a truncated JPEG": (saved(Image.fromarray(colours(64, 64)), "JPEG")[:-500], "cannot be read: .*truncated"),
    "a truncated PNG": (saved(Image.fromarray(colours(64, 64)))[:-500], "cannot be read: .*"),
    "a broken PNG": (saved(Image.fromarray(colours(64, 64)))[:60] + bytes(99), "cannot be read: .*"),
    "32 bits": (saved(Image.new("F", (1, 1)), "TIFF"), "has values of 32 bits"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_cannot_be_read(kind: str) -> None:
    content, fault = BROKEN[kind]
    with pytest.raises(ImageError, match=f"^{fault}") as raised:
        read_image(content)
    assert "\n" not in str(raised.value)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    content = saved(Image.new("L", (50, 40)))
    narrow = read_image(saved(Image.new("L", (1, 500))))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1999)
    with pytest.raises(ImageError, match=r"^is too large: it is 50 x 40 pixels, of at most 1,999$"):
        read_image(content)
    with pytest.raises(ImageError, match=r"^is too large: resized, it is 8 x 4000 pixels, of at most 1,999$"):
        processed(narrow, CLIP)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 900)  # Pillow itself refuses twice as many
    with pytest.raises(ImageError, match="exceeds limit"):
        read_image(content)


def test_a_random_view_is_any_part_either_way() -> None:
    pixels = np.arange(3 * 4 * 5, dtype=np.uint8).reshape(3, 4, 5)
    parts = [pixels[:, top : top + 3, left : left + 3] for top in range(2) for left in range(3)]
    wanted = sorted(part[:, :, ::step].tolist() for part in parts for step in (1, -1))
    random = np.random.default_rng(0)
    drawn = [random_view(pixels, (3, 3), random).tolist() for _ in range(1200)]
    counts = [drawn.count(view) for view in wanted]
    assert sum(counts) == 1200
    assert min(counts) > 60  # 100 on average, with a standard deviation of 10


def test_what_is_hidden_below_a_folder_is_passed_over(tmp_path: Path) -> None:
    shown = [tmp_path / ".cache" / "photos" / name for name in ("a.png", "below/b.jpg")]
    for path in (*shown, shown[0].with_name(".c.png"), shown[0].parent / ".ipynb_checkpoints" / "a-checkpoint.png"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert image_files([str(shown[0].parent)]) == list(map(str, shown))

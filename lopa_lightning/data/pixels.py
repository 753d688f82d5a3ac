"""Images as arrays of pixels: files of many formats read, and processed as a model's image processor does."""

from __future__ import annotations

import os
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from lopa_lightning.errors import LoPAError, one_line

if TYPE_CHECKING:  # imports transformers
    from lopa_lightning.backbones.image_spec import ImageProcessing

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
"""File formats that are read: no EPS, for which Pillow would run a program on what the file says."""

Pixels = NDArray[np.uint8]


class ImageError(Exception):
    """An image cannot be used; the message says what is wrong with it, after its name."""


def read_image(source: str | os.PathLike[str] | bytes | Image.Image | NDArray[Any]) -> Image.Image:
    """Reads an image: in RGB, upright as its EXIF data says, of several frames or pages the first.

    What is transparent is put on white. Values of 16 bits are cut to their upper 8.

    Args:
        source: A file or its content, an image, or an array in uint8, ``[H, W]`` or ``[H, W, 3]``.

    Raises:
        ImageError: If it is broken, too large, or of another kind.
    """
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.shape[2:] not in ((), (3,)) or source.ndim < 2:
            raise ImageError(f"must be uint8 [H, W] or [H, W, 3], got {source.dtype} {list(source.shape)}")
        source = Image.fromarray(source)
    try:
        if isinstance(source, Image.Image):
            return _as_rgb(source)
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source, formats=_formats()) as image:
            _check_pixels(image.width, image.height, "it is")
            image.load()
            return _as_rgb(image)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"is no image of the formats {', '.join(FORMATS)}") from error
    except Exception as error:  # of a broken file, each of Pillow's decoders raises errors of its own kinds
        raise ImageError(f"cannot be read: {one_line(error)}") from error


def image_files(paths: Iterable[str]) -> list[str]:
    """Returns the files among paths, and those in the folders among them that have an image's ending, sorted.

    Args:
        paths: Of files and folders; of the latter all folders below are looked into. What is hidden is passed over.

    Raises:
        LoPAError: If there is no image in a folder.
    """
    endings = {ending for ending, name in Image.registered_extensions().items() if name in FORMATS}
    found: list[str] = []
    for path in paths:
        if not os.path.isdir(path):
            found.append(path)
            continue
        below = [each for each in Path(path).rglob("*") if each.suffix.lower() in endings and each.is_file()]
        if not (names := sorted(str(each) for each in below if not _is_hidden(each.relative_to(path)))):
            raise LoPAError(f"folder {path!r} has no image of the formats {', '.join(FORMATS)}")
        found += names
    return found


def _is_hidden(file: Path) -> bool:
    return any(part.startswith(".") for part in file.parts)


def _formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    is_deep_grey = image.mode == "I" and image.format == "PPM"  # up to 65535, whatever the file's own maximum
    if image.mode.startswith("I;16") or is_deep_grey:  # Pillow would clip it: nearly all white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ImageError("has values of 32 bits, of which nobody says what is white; save it with 8 or 16")
    elif image.has_transparency_data:
        shown = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", shown.size, "white"), shown)
    return image.convert("RGB")


def _check_pixels(width: int, height: int, what: str) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise ImageError(f"is too large: {what} {width} x {height} pixels, of at most {limit:,}")


def processed(image: Image.Image, processing: ImageProcessing) -> Pixels:
    """Resizes and crops an image as an image processor does, to the bit.

    Args:
        image: In RGB.
        processing: The image processor's.

    Returns:
        ``[3, H, W]``; ``H`` and ``W`` are of ``processing.size`` if it crops or resizes to a height and a width.

    Raises:
        ImageError: If it is so long and narrow that it would be too large.
    """
    if isinstance(processing.resize, int):
        short, long = sorted(image.size)
        edges = processing.resize, int(processing.resize * long / short)
        width, height = edges if image.width <= image.height else edges[::-1]
    else:
        height, width = processing.resize
    _check_pixels(width, height, "resized, it is")
    image = image.resize((width, height), processing.resample)
    if processing.crop:
        tall, wide = processing.size
        top, left = (height - tall) // 2, (width - wide) // 2
        image = image.crop((left, top, left + wide, top + tall))  # black where it has nothing
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def random_view(pixels: Pixels, size: tuple[int, int], random: np.random.Generator) -> Pixels:
    """Cuts out a part at random, and mirrors every second one.

    Args:
        pixels: ``[3, H, W]``, nowhere smaller than the part.
        size: Height and width of the part.
        random: Draws three times.

    Returns:
        A view on ``pixels``, ``[3, height, width]``.
    """
    top, left = (int(random.integers(have - want + 1)) for have, want in zip(pixels.shape[1:], size))
    view = pixels[:, top : top + size[0], left : left + size[1]]
    return view[:, :, ::-1] if random.random() < 0.5 else view

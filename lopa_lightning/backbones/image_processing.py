"""Reads what a model's image processor does to an image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import transformers
from transformers import BaseImageProcessor

from lopa_lightning.backbones.pretrained import PretrainedSpec
from lopa_lightning.errors import LoPAError, one_line, shown

_PROCESSORS = ("Beit", "Bit", "CLIP", "DINOv3ViT", "DeiT", "Siglip", "ViT")
"""Whose image processors resize, crop, scale and normalise, in this order, and do nothing else."""

_MOST_PIXELS = 10_000


@dataclass(frozen=True)
class ImageProcessing:
    """What a model's image processor does to an image, as plain numbers.

    Attributes:
        size: Height and width of what the model reads, in pixels.
        resize: Height and width to resize to, or the length of the shortest edge.
        crop: Whether a centre crop to ``size`` follows.
        resample: PIL's filter for resizing.
        scale: Pixel values are multiplied by it.
        mean: Then subtracted, by channel.
        std: Then divided by, by channel.

    Raises:
        LoPAError: If a length is no whole number of pixels up to 10,000.
    """

    size: tuple[int, int]
    resize: tuple[int, int] | int
    crop: bool
    resample: int
    scale: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        lengths: Any
        for name, lengths in (("size", self.size), ("resize", self.resize)):
            both = [lengths, lengths] if name == "resize" and isinstance(lengths, int) else lengths
            is_right = isinstance(both, (list, tuple)) and len(both) == 2
            if not is_right or any(type(n) is not int or not 1 <= n <= _MOST_PIXELS for n in both):
                raise LoPAError(f"{name} must be pixels from 1 to {_MOST_PIXELS}, got {shown(lengths)}")


def load_processing(spec: PretrainedSpec) -> ImageProcessing:
    """Reads what a model's image processor does.

    Args:
        spec: The model, with a ``preprocessor_config.json``.

    Raises:
        LoPAError: If there is none, or it does something else than to resize, crop, scale and normalise.
    """
    try:
        found, _ = BaseImageProcessor.get_image_processor_dict(spec.location(), revision=spec.revision)
    except Exception as error:
        raise LoPAError(
            f"no image processor found for {spec.name!r}: preprocessor_config.json is missing ({one_line(error)})"
        ) from error
    return _plain(spec.name, found)


def _plain(name: str, settings: dict[str, Any]) -> ImageProcessing:
    """Returns an image processor's settings as plain numbers, with its class's defaults."""
    kind = str(settings.get("image_processor_type") or settings.get("feature_extractor_type"))
    family = kind.partition("ImageProcessor")[0].partition("FeatureExtractor")[0]
    if family not in _PROCESSORS:
        raise LoPAError(
            f"the images of {name!r} are processed by {kind}; allowed are the processors of {', '.join(_PROCESSORS)}"
        )
    # DINOv3's needs torchvision, and has the settings of ViT's. The others have a version without it in new releases.
    class_name = f"{family.replace('DINOv3ViT', 'ViT')}ImageProcessor"
    processor_class: Any = getattr(transformers, f"{class_name}Pil", None) or getattr(transformers, class_name)
    try:
        processor = processor_class(**{key: value for key, value in settings.items() if not key.endswith("_type")})
    except Exception as error:
        raise LoPAError(f"the image processor of {name!r} is not usable: {one_line(error)}") from error
    asked = [key for key in ("do_pad", "do_splits", "do_flip_channel_order") if getattr(processor, key, False)]
    if asked or not processor.do_resize:
        raise LoPAError(f"the image processor of {name!r} must resize and not {', '.join(asked) or 'leave sizes'}")
    size, crop = dict(processor.size), bool(getattr(processor, "do_center_crop", False))
    resize: Any = (size.get("height"), size.get("width")) if size.get("height") else size.get("shortest_edge")
    final: Any = tuple(dict(processor.crop_size)[edge] for edge in ("height", "width")) if crop else resize
    if not isinstance(final, tuple) or not isinstance(resize, int | tuple) or size.get("longest_edge"):
        raise LoPAError(f"the image processor of {name!r} makes images of no fixed size: {size}")
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else ((0, 0, 0), (1, 1, 1))
    return ImageProcessing(
        size=final,
        resize=resize,
        crop=crop,
        resample=int(processor.resample),
        scale=float(processor.rescale_factor) if processor.do_rescale else 1.0,
        mean=_channels(name, mean),
        std=_channels(name, std),
    )


def _channels(name: str, values: Any) -> tuple[float, float, float]:
    """Returns one number for each of the three channels."""
    if len(values) != 3:
        raise LoPAError(f"the image processor of {name!r} has {len(values)} channels; images have 3")
    red, green, blue = (float(value) for value in values)
    return red, green, blue

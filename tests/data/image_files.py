"""Writes images, and folders of them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

LABELS = ("cat", "dog", "eel")


def colours(width: int, height: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng([width, height]).integers(0, 256, (height, width, channels), np.uint8)


def saved(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def write_images(folder: str, labels: tuple[str, ...] = LABELS, each: int = 4) -> str:
    """Writes an image folder with three splits: of unlike sizes, and of a colour for each label."""
    for number, split in enumerate(("train", "validation", "test")):
        for label, name in enumerate(labels):
            path = Path(folder, split, name)
            path.mkdir(parents=True)
            for i in range(each):
                values = colours(9 + i, 12 + number) // 4
                values[..., label % 3] += 190
                Image.fromarray(values).save(path / f"{i}.png")
    return folder

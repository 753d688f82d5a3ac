"""Draws pictures of images with text, of where attention goes, and of a confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Pixels = NDArray[np.uint8]
Colour = tuple[int, int, int]

BLACK: Colour = (0, 0, 0)
GREEN: Colour = (0, 120, 60)
RED: Colour = (200, 30, 30)
_BLUE = np.array([20, 70, 160])
_STRONGEST = 0.75  # share of red where attention is greatest
# In pixels.
_SIDE = 128  # of a tile; larger pictures are shrunk to it
_GAP = 8
_LINE = 15
_TEXT = 12
_MATRIX = 800  # of a confusion matrix, unless it has more classes
_CELL = 40  # of it, at most
_WRITTEN = 28  # of a cell that has its number in it


class Tile(NamedTuple):
    """A picture with text.

    Attributes:
        picture: In uint8, ``[H, W, 3]``.
        lines: Of text below it, which are cut to its width.
        colour: Of the last line and of a frame; in black there is no frame.
    """

    picture: Pixels
    lines: Sequence[str] = ()
    colour: Colour = BLACK


def sheet(rows: Sequence[Sequence[Tile]]) -> Pixels:
    """Lays tiles out in rows. No text and no frame is drawn over a picture.

    Args:
        rows: All with as many lines of text.

    Returns:
        ``[H, W, 3]``.
    """
    pictures = [[_scaled(tile.picture) for tile in row] for row in rows]
    height = max(each.shape[0] for row in pictures for each in row)
    height += _GAP + _LINE * max(len(tile.lines) for row in rows for tile in row)
    columns = max(len(row) for row in rows)
    canvas = Image.new("RGB", (_GAP + columns * (_SIDE + _GAP), _GAP + len(rows) * height), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(_TEXT)
    for down, (row, drawn) in enumerate(zip(rows, pictures)):
        for right, (tile, picture) in enumerate(zip(row, drawn)):
            left, top = _GAP + right * (_SIDE + _GAP), _GAP + down * height
            bottom = top + picture.shape[0]
            if tile.colour != BLACK:
                draw.rectangle(
                    (left - 3, top - 3, left + picture.shape[1] + 2, bottom + 2), outline=tile.colour, width=3
                )
            canvas.paste(Image.fromarray(picture), (left, top))
            for number, line in enumerate(tile.lines):
                colour = tile.colour if number == len(tile.lines) - 1 else BLACK
                draw.text((left, bottom + 3 + number * _LINE), _cut(line, font, _SIDE), fill=colour, font=font)
    return np.asarray(canvas)


def highlighted(picture: Pixels, weights: NDArray[np.float32], patch: tuple[int, int]) -> Pixels:
    """Colours an image in grey the redder, the greater the weight of a patch is beside the greatest.

    Args:
        picture: ``[H, W, 3]``.
        weights: At least 0, of the patches, ``[rows, columns]``.
        patch: Height and width of a patch, in pixels.

    Returns:
        ``[H, W, 3]``.

    Example:
        >>> highlighted(np.full((1, 2, 3), 100, np.uint8), np.array([[0.0, 0.5]], np.float32), (1, 1)).tolist()
        [[[100, 100, 100], [175, 48, 48]]]
    """
    of_patches = (weights / max(float(weights.max()), 1e-12)).repeat(patch[0], 0).repeat(patch[1], 1)
    share = np.zeros((*picture.shape[:2], 1))
    share[: of_patches.shape[0], : of_patches.shape[1], 0] = _STRONGEST * of_patches
    grey = picture.mean(-1, keepdims=True)
    drawn: Pixels = np.rint((1 - share) * grey + share * np.array(RED)).astype(np.uint8)
    return drawn


def confusion_picture(counts: NDArray[np.int64], labels: Sequence[str]) -> Pixels:
    """Draws a confusion matrix: the bluer a cell, the greater is its share of its row.

    Labels and counts are written where there is room.

    Args:
        counts: Examples of a label (rows) for which a label (columns) was predicted, ``[C, C]``.
        labels: C names.

    Returns:
        ``[H, W, 3]``.
    """
    size = len(labels)
    cell = max(1, min(_CELL, _MATRIX // size))
    shares = counts / counts.sum(1, keepdims=True).clip(1)
    colours = np.rint(255 - shares[..., None] * (255 - _BLUE)).astype(np.uint8)
    font = ImageFont.load_default(_TEXT)
    has_names, has_counts = cell >= _LINE, cell >= _WRITTEN
    names = [f"{_cut(label, font, _SIDE)} {number}" for number, label in enumerate(labels)] if has_names else []
    left = _GAP + int(max(map(font.getlength, names)) + _GAP if has_names else 0)
    top = _GAP + _LINE * (2 if has_names else 1)
    canvas = Image.new("RGB", (max(left + size * cell + _GAP, 2 * _SIDE), top + size * cell + _GAP), "white")
    canvas.paste(Image.fromarray(colours.repeat(cell, 0).repeat(cell, 1)), (left, top))
    draw = ImageDraw.Draw(canvas)
    draw.text((_GAP, 2), "rows: labels, columns: predicted labels", fill=BLACK, font=font)
    for row in range(size if has_names else 0):
        middle = top + row * cell + cell // 2
        draw.text((left - 4, middle), names[row], fill=BLACK, font=font, anchor="rm")
        draw.text((left + row * cell + cell // 2, top - 2), str(row), fill=BLACK, font=font, anchor="mb")
        for column in range(size if has_counts else 0):
            colour = "white" if shares[row, column] > 0.5 else BLACK
            position = (left + column * cell + cell // 2, middle)
            draw.text(position, str(counts[row, column]), fill=colour, font=font, anchor="mm")
    return np.asarray(canvas)


def _scaled(picture: Pixels) -> Pixels:
    """Returns a picture that fits a tile: shrunk, or each pixel as often as there is room for it."""
    longest = max(picture.shape[:2])
    if longest > _SIDE:
        height, width = (max(1, edge * _SIDE // longest) for edge in picture.shape[:2])
        return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BOX))
    return picture.repeat(_SIDE // longest, 0).repeat(_SIDE // longest, 1)


def _cut(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Returns as much of a text as has room, on one line."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."

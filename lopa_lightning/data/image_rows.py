"""Encodes files of images into stored pixels, and makes batches of these."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from lopa_lightning.backbones.image_spec import ImageProcessing
from lopa_lightning.data.columns import RowError
from lopa_lightning.data.labels import LabelLookup, encoded_labels
from lopa_lightning.data.pixels import ImageError, Pixels, processed, random_view, read_image


@dataclass
class EncodeImages:
    """Decodes, resizes and crops images, once for all epochs.

    Args:
        column: With images, not decoded.
        processing: What is done to them for the backbone. Without a crop, images are as wide and high as they come.
        instance_processing: And for the instance encoder, where that is something else.
        labels: What the labels mean; None if there are none.
        versions: Size and time of each file that a row names.
        several: Number of labels where a row has a list of them, which becomes 0s and 1s; 0 where it has one.
    """

    column: str
    processing: ImageProcessing
    instance_processing: ImageProcessing | None
    labels: LabelLookup | None
    versions: Sequence[tuple[int, int]] = ()
    several: int = 0

    @property
    def columns(self) -> Sequence[str]:
        """The column of images."""
        return [self.column]

    def key(self) -> list[Any]:
        """Returns all that the pixels depend on beside the rows."""
        how = [None if each is None else _spatial(each) for each in (self.processing, self.instance_processing)]
        return [how, self.labels, self.several, list(self.versions)]

    def __call__(self, rows: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        """Encodes rows, on all cores.

        Returns:
            ``pixels``, bytes of ``[3, H, W]``, and their ``digest``; ``width`` where they are of unlike sizes; perhaps
            ``instance_pixels`` and ``instance_digest``; ``labels``; ``index``.

        Raises:
            RowError: If an image cannot be used.
        """
        with ThreadPoolExecutor() as threads:  # Pillow decodes and resizes without the interpreter's lock
            encoded = list(threads.map(self._encode, rows[self.column]))
        columns = {name: [row[name] for row in encoded] for name in encoded[0]}
        if self.labels is not None:
            column, lookup = self.labels
            columns["labels"] = encoded_labels(rows[column], lookup, self.several)
        return {**columns, "index": indices}

    def _encode(self, stored: dict[str, Any] | None) -> dict[str, Any]:
        try:
            if stored is None or (stored["bytes"] is None and stored["path"] is None):
                raise ImageError("is missing")
            image = read_image(stored["path"] if stored["bytes"] is None else stored["bytes"])
            pixels = processed(image, self.processing)
            row = _stored(pixels)
            if not self.processing.crop and isinstance(self.processing.resize, int):
                row["width"] = pixels.shape[2]
            if self.instance_processing is not None:
                other = _stored(processed(image, self.instance_processing))
                row |= {f"instance_{name}": value for name, value in other.items()}
        except ImageError as error:
            raise RowError({self.column: stored}, str(error)) from error
        return row


def _spatial(processing: ImageProcessing) -> tuple[Any, ...]:
    """Returns what decides on pixels before they are scaled and normalised."""
    return astuple(replace(processing, scale=1.0, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)))


def _stored(pixels: Pixels) -> dict[str, Any]:
    content = pixels.tobytes()
    digest = hashlib.blake2b(content, digest_size=16, salt=str(pixels.shape[2]).encode()).digest()
    return {"pixels": content, "digest": digest}


def contents(column: pa.ChunkedArray) -> list[NDArray[np.uint8]]:
    """Returns the bytes of each row of a column, without copying them."""
    flat, ends = _flat(column)
    return np.split(flat, ends[:-1])


def stacked(column: pa.ChunkedArray, size: tuple[int, int]) -> Tensor:
    """Returns stored pixels that are all of one size as ``[B, 3, H, W]``."""
    return torch.from_numpy(_flat(column)[0].reshape(-1, 3, *size).copy())


def _flat(column: pa.ChunkedArray) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Returns the bytes of all rows of a column of Arrow's ``binary``, and where each row's end."""
    values = column.combine_chunks()
    _, offsets, data = values.buffers()
    ends = np.frombuffer(offsets, np.int32)[values.offset : values.offset + len(values) + 1].astype(np.int64)
    return np.frombuffer(data, np.uint8)[ends[0] : ends[-1]], ends[1:] - ends[0]


@dataclass(frozen=True)
class ImageCollate:
    """Makes batches of stored pixels.

    Args:
        size: Height and width of what the backbone reads.
        instance_size: And of what the instance encoder reads, where that is something else.
        seed: Of the views, where images are stored larger than ``size``.
    """

    size: tuple[int, int]
    instance_size: tuple[int, int] | None = None
    seed: int = 0

    def __call__(self, table: pa.Table) -> dict[str, Tensor]:
        """Makes a batch.

        Args:
            table: Of :class:`EncodeImages`, perhaps with an ``epoch`` and vectors, ``instance``.

        Returns:
            ``pixels [B, 3, H, W]`` and perhaps ``instance_pixels`` in uint8; ``index`` and ``labels [B]``, or
            ``labels [B, labels]``; perhaps ``instance [B, e]``.
        """
        batch = {}
        if "pixels" in table.column_names:
            is_larger = "width" in table.column_names
            batch["pixels"] = self._views(table) if is_larger else stacked(table["pixels"], self.size)
        if "instance_pixels" in table.column_names:
            batch["instance_pixels"] = stacked(table["instance_pixels"], self.instance_size or self.size)
        if "instance" in table.column_names:
            vectors = table["instance"].combine_chunks()
            batch["instance"] = torch.tensor(vectors.flatten().to_numpy().reshape(len(vectors), -1))
        for name in ("labels", "index"):
            if name in table.column_names:
                batch[name] = torch.tensor(table[name].to_pylist())
        return batch

    def _views(self, table: pa.Table) -> Tensor:
        """Returns views that depend on seed, epoch and index alone: a run that is resumed sees the same ones."""
        views = np.empty((len(table), 3, *self.size), np.uint8)
        epoch = table["epoch"][0].as_py() if "epoch" in table.column_names else 0
        numbers = (table[name].to_numpy() for name in ("width", "index"))
        for view, content, width, index in zip(views, contents(table["pixels"]), *numbers):
            random = np.random.default_rng([self.seed, epoch, index])
            view[:] = random_view(content.reshape(3, -1, width), self.size, random)
        return torch.from_numpy(views)

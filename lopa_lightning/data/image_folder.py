"""Checks that the folder of an image alone decides which split it is in, and that none is passed over."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn

from lopa_lightning.data.pixels import image_files
from lopa_lightning.data.types import DatasetDict
from lopa_lightning.errors import LoPAError


def check_image_folder(folder: str, rows: DatasetDict, column: str) -> None:
    """Checks what ``datasets`` has read from a folder of images; it looks for names of splits anywhere in a path.

    Args:
        folder: The folder.
        rows: Its splits.
        column: Of images.

    Raises:
        LoPAError: If an image is in a data set twice, or a split has images of several folders beside another split.
    """
    found: dict[Path, str] = {}
    tops: dict[str, set[str]] = {}
    for split, path in _files(rows, column):
        if not path.is_relative_to(folder):
            return  # of metadata, or of Parquet, which say themselves what is in a split
        if path in found:
            raise LoPAError(
                f"image {str(path)!r} is read twice, for {found[path]} and for {split}: a folder of images below "
                f"{folder!r} has the name of a split; rename it"
            )
        found[path] = split
        tops.setdefault(split, set()).add(path.relative_to(folder).parts[0])
    for split, names in tops.items():
        if len(names) > 1 and len(tops) > 1 and not _has_configs(folder):
            raise LoPAError(
                f"split {split} would have the images of {', '.join(sorted(names))} in {folder!r}; move all but one "
                "elsewhere, or say in its README.md what is in each split"
            )
    if found and (unread := sorted({*map(Path, image_files([folder]))} - found.keys())):
        rank_zero_warn(f"{len(unread)} images in {folder!r} are in no split that is read, such as {str(unread[0])!r}")


def _files(rows: DatasetDict, column: str) -> Iterator[tuple[str, Path]]:
    """Yields the split and the file of each image that is not stored in the data itself."""
    from datasets import Image

    for split, data in rows.items():
        if not isinstance(data.features.get(column), Image):
            continue
        stored = data.select_columns([column]).cast_column(column, Image(decode=False))
        for image in stored[column]:
            if image is not None and image["bytes"] is None:
                yield str(split), Path(image["path"])


def _has_configs(folder: str) -> bool:
    """Returns whether a README says what is in each split."""
    readme = os.path.join(folder, "README.md")
    return os.path.exists(readme) and "data_files" in Path(readme).read_text(encoding="utf-8", errors="replace")

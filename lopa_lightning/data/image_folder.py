"""Checks that the folder of an image alone decides which split it is in, and that none is passed over."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow.compute as pc
from lightning.pytorch.utilities import rank_zero_warn

from lopa_lightning.data.pixels import image_files
from lopa_lightning.data.types import Dataset, DatasetDict
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
    readme = Path(folder, "README.md")
    if readme.exists() and "data_files" in readme.read_text(encoding="utf-8", errors="replace"):
        return  # it says what is in each split
    found: dict[Path, str] = {}
    tops: dict[str, set[str]] = {}
    for split, path in _files(rows, column):
        if not path.is_relative_to(folder):
            return  # of Parquet
        if found.setdefault(path, split) != split:
            raise LoPAError(
                f"image {str(path)!r} would be in the splits {found[path]} and {split}: a folder of images below "
                f"{folder!r} has the name of a split; rename it"
            )
        if len(parts := path.relative_to(folder).parts) > 1:
            tops.setdefault(split, set()).add(parts[0])
    for split, names in tops.items():
        if len(names) > 1 and len(tops) > 1:
            raise LoPAError(
                f"split {split} would have the images of {', '.join(sorted(names))} in {folder!r}; move all but one "
                "elsewhere, or say in a README.md what is in each split"
            )
    if found and (unread := sorted({*map(Path, image_files([folder]))} - found.keys())):
        rank_zero_warn(f"{len(unread)} images in {folder!r} are in no split that is read, such as {str(unread[0])!r}")


def _files(rows: DatasetDict, column: str) -> Iterator[tuple[str, Path]]:
    """Yields the split and the file of each image that is not stored in the data itself."""
    from datasets import Image

    for split, data in rows.items():
        if isinstance(data.features.get(column), Image):
            for path, has_content in image_paths(data.cast_column(column, Image(decode=False)), column):
                if path is not None and not has_content:
                    yield str(split), Path(path)


def image_paths(files: Dataset, column: str) -> Iterator[tuple[str | None, bool]]:
    """Yields the path of each row's image, and whether its content is there; it is not read.

    Args:
        files: With images as files or their content.
        column: Of the images.
    """
    for table in files.select_columns([column]).with_format("arrow").iter(10_000):
        for chunk in table[column].chunks:
            has_content = pc.is_valid(pc.struct_field(chunk, "bytes")).to_pylist()
            yield from zip(pc.struct_field(chunk, "path").to_pylist(), has_content)

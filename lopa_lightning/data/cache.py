"""The data sets' cache: a damaged file, and a full disk, are named as such and not blamed on the data."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lopa_lightning.errors import LoPAError
from lopa_lightning.files import causes_of, is_full_disk

if TYPE_CHECKING:
    from datasets import Dataset


@contextmanager
def cache_faults_named() -> Iterator[None]:
    """Names the cache where it is what made the block fail.

    Raises:
        LoPAError: If a file of the cache is damaged, or its disk is full.
    """
    try:
        yield
    except Exception as error:
        if is_full_disk(error) or "Not enough disk space" in str(error):  # datasets' own words
            from datasets import config

            raise LoPAError(
                f"no space left for the data sets' cache in {str(config.HF_DATASETS_CACHE)!r}; set HF_DATASETS_CACHE "
                "to a folder on another disk"
            ) from error
        if (path := _file_being_read(error)) is not None:
            raise _damaged(path) from error
        raise


def check_cached(data: Dataset, rows: int | None = None) -> None:
    """Checks what is known of cached rows without reading them all: sizes, offsets, and that text is UTF-8.

    Args:
        data: Opened from the cache.
        rows: How many there must be: a file that is cut off between two blocks of rows can be read.

    Raises:
        LoPAError: If they are damaged.
    """
    try:
        data.data.validate(full=True)
        is_whole = rows is None or len(data) == rows
    except ValueError:  # Arrow's own are
        is_whole = False
    if not is_whole and data.cache_files:
        raise _damaged(Path(data.cache_files[0]["filename"]))


def _damaged(path: Path) -> LoPAError:
    # Of what was tokenised a file is enough; the data set itself is complete where its folder is there.
    again = path if path.name.startswith("cache-") else path.parent
    return LoPAError(f"cache file {str(path)!r} is damaged; delete {str(again)!r}, and it is rebuilt")


def _file_being_read(error: BaseException) -> Path | None:
    """Returns the Arrow file in whose reading an error, or what caused it, was raised: no message names it."""
    for cause in causes_of(error):
        for frame, _ in traceback.walk_tb(cause.__traceback__):
            path = frame.f_locals.get("filename")
            if isinstance(path, str) and path.endswith(".arrow") and Path(path).is_file():
                return Path(path)
    return None

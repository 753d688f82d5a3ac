"""The data sets' cache: rows are encoded once, and a damaged file or a full disk is not blamed on the data."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from lopa_lightning.data.columns import check_columns
from lopa_lightning.data.types import Dataset
from lopa_lightning.errors import LoPAError
from lopa_lightning.files import causes_of, is_full_disk

_FORMAT = 4  # of encoded rows; a new number makes cached ones stale


class Encoder(Protocol):
    """Encodes a batch of rows, for ``datasets.map``."""

    @property
    def columns(self) -> Sequence[str]:
        """The columns that it reads."""

    def key(self) -> list[Any]:
        """Returns all that its result depends on beside the rows."""

    def __call__(self, rows: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        """Encodes rows: columns of numbers, ``index`` among them."""


def encoded_rows(
    data: Dataset, encoder: Encoder, what: str, doing: str, kept: Sequence[int] | None = None, **options: Any
) -> Dataset:
    """Encodes the rows of a split, from the cache where that was done before.

    Args:
        data: The rows.
        encoder: Encodes them.
        what: The split's name, for messages.
        doing: What is shown meanwhile, such as ``Tokenising``.
        kept: The rows to encode; None for all.
        **options: Of ``datasets.map``.

    Raises:
        LoPAError: If a column is missing, or what was cached is damaged.
    """
    from datasets.fingerprint import Hasher

    check_columns(data, encoder.columns, what)
    if kept is not None:
        data = data.select(kept)

    def encode(rows: dict[str, list[Any]], positions: list[int]) -> dict[str, list[Any]]:
        return encoder(rows, positions if kept is None else [kept[position] for position in positions])

    # Named by what it depends on: datasets' own hash of a tokenizer changes when the tokenizer is used.
    key = Hasher.hash([_FORMAT, data._fingerprint, *encoder.key()])
    encoded = data.map(
        encode,
        batched=True,
        with_indices=True,
        remove_columns=data.column_names,
        new_fingerprint=key,
        desc=f"{doing} {what}",
        **options,
    )
    check_cached(encoded, len(data))
    return encoded


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

"""Predicts for texts and images that come from no data module."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from lopa_lightning.backbones.image_spec import ImageProcessing
from lopa_lightning.backbones.text_spec import TextSpec
from lopa_lightning.data.collate import Collate
from lopa_lightning.data.pixels import ImageError, Pixels, processed, read_image
from lopa_lightning.data.rows import RowEncoder, fault_of
from lopa_lightning.data.task_rows import rows_of, task_encoder, task_template
from lopa_lightning.data.word_rows import fault_of_words, word_rows
from lopa_lightning.errors import LoPAError, shown
from lopa_lightning.task import Task

if TYPE_CHECKING:
    from lopa_lightning.modules.classification import ClassificationModule

_AT_ONCE = 4096  # rows whose tokens are in memory
_LONG = 8  # batches that a progress bar is shown for, on a terminal


def row_encoder(module: ClassificationModule, texts: Any) -> tuple[RowEncoder, dict[str, list[Any]]]:
    """Checks texts, and builds the encoder that training used; no weights are needed.

    Args:
        module: With a task.
        texts: See :func:`~lopa_lightning.data.task_rows.rows_of`.

    Returns:
        The encoder, and the texts by column.

    Raises:
        LoPAError: If a row has not the task's texts.
    """
    spec, task = module.input_spec, module.required_task()
    if not isinstance(spec, TextSpec):
        raise LoPAError("predict reads texts, and this module another kind of input; use a Trainer and its data module")
    rows = given_rows(task, texts)
    return task_encoder(task, spec), rows


def given_rows(task: Task, texts: Any) -> dict[str, list[Any]]:
    """Returns the rows that a user gives for a task, by column.

    Args:
        task: With a template.
        texts: See :func:`~lopa_lightning.data.task_rows.rows_of`; where each word has a label also lists of words.

    Raises:
        LoPAError: If a row has not the task's texts.
    """
    columns = task_template(task).columns
    rows = rows_of(word_rows(texts, columns[0]) if task.per_word else texts, columns)
    check_rows(rows, fault_of_words if task.per_word else fault_of)
    return rows


def check_rows(rows: dict[str, list[Any]], fault_in: Callable[[Any], str | None] = fault_of) -> None:
    """Raises a LoPAError that names the first row without a text."""
    for column, texts in rows.items():
        for row, text in enumerate(texts):
            if (fault := fault_in(text)) is not None:
                raise LoPAError(f"column {column!r} {fault} in row {row} (counted from 0)")


def row_batches(
    module: ClassificationModule, encoder: RowEncoder, rows: dict[str, list[Any]], batch_size: int
) -> Iterator[dict[str, Tensor]]:
    """Yields the batches of any number of rows; only some of their tokens are in memory at a time.

    Args:
        module: The one that is to read them.
        encoder: Of rows.
        rows: Texts by column.
        batch_size: Rows in a batch, of similar lengths.
    """
    for first in range(0, len(next(iter(rows.values()))), _AT_ONCE):
        part = {name: texts[first : first + _AT_ONCE] for name, texts in rows.items()}
        yield from batches(module, encoder, part, first, batch_size)


def records(
    module: ClassificationModule, made: Iterable[dict[str, Tensor]], count: int, batch_size: int
) -> list[dict[str, Any]]:
    """Returns a module's record for each row of batches, by their ``index``.

    Args:
        module: With weights, in eval mode.
        made: Batches, on the module's device.
        count: Number of rows.
        batch_size: Rows at a time.
    """
    found: list[dict[str, Any]] = [{}] * count
    # None: only on a terminal.
    with tqdm(total=count, unit=" rows", disable=None if count > _LONG * batch_size else True) as bar:
        for batch in made:
            with torch.inference_mode():
                predicted = module.predict_step(batch, 0)
            for record in module.prediction_rows(predicted):
                found[record.pop("index")] = record
            bar.update(len(batch["index"]))
    return found


def batches(
    module: ClassificationModule, encoder: RowEncoder, rows: dict[str, list[Any]], first: int, batch_size: int
) -> Iterator[dict[str, Tensor]]:
    """Yields the batches of rows, the longest first, on the module's device.

    Args:
        module: Which is to read them.
        encoder: Of rows.
        rows: Texts by column.
        first: Number of the first row.
        batch_size: Rows at a time.
    """
    spec = module.input_spec
    assert isinstance(spec, TextSpec)
    count = len(next(iter(rows.values())))
    encoded = encoder(rows, list(range(first, first + count)))
    lengths = encoded.pop("length")
    messages = {
        "truncated": f"were cut to {encoder.max_tokens} tokens",
        "instance_truncated": f"were cut to {spec.instance_max_tokens} tokens",
        "untokenised": "have words that are no token: those have no label",
    }
    for name, message in messages.items():
        if found := sum(encoded.pop(name, [])):
            rank_zero_warn(f"{found} of {count} texts {message}")
    collate, order = Collate.of(spec), sorted(range(count), key=lambda row: -lengths[row])
    parts = [order[start : start + batch_size] for start in range(0, count, batch_size)]
    for part in parts:
        batch = collate([{name: values[row] for name, values in encoded.items()} for row in part])
        yield {name: values.to(module.device) for name, values in batch.items()}


def image_sources(images: Any) -> list[Any]:
    """Returns images that a user gives, as a list.

    Args:
        images: A file's name or content, a PIL image or an array; or a list of them.

    Raises:
        LoPAError: If one is something else, or a file cannot be opened.
    """
    kinds = (str, os.PathLike, bytes, np.ndarray, Image.Image)
    if not isinstance(images, (*kinds, Iterable)):
        raise LoPAError(f"images must be paths, PIL images or arrays, or a list of them; got {shown(images)}")
    sources = [images] if isinstance(images, kinds) else list(images)
    for position, source in enumerate(sources):
        if not isinstance(source, kinds):
            raise LoPAError(f"{_named(source, position)} must be a path, a PIL image or an array, got {shown(source)}")
        if isinstance(source, str | os.PathLike):
            try:
                with open(source, "rb"):
                    pass
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or error
                raise LoPAError(f"{_named(source, position)} cannot be read: {reason}") from error
    return sources


def image_batches(
    sources: list[Any], processing: dict[str, ImageProcessing], batch_size: int, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """Yields the batches of images, in their order.

    Args:
        sources: Of :func:`image_sources`.
        processing: What is done to an image, by its name in a batch.
        batch_size: Images at a time.
        device: Where batches go.

    Raises:
        LoPAError: If an image is broken; the message names it.
    """

    def read(position: int) -> list[Pixels]:
        try:
            image = read_image(sources[position])
            return [processed(image, each) for each in processing.values()]
        except ImageError as error:
            raise LoPAError(f"{_named(sources[position], position)} {error}") from error

    with ThreadPoolExecutor() as threads:  # Pillow decodes and resizes without the interpreter's lock
        for start in range(0, len(sources), batch_size):
            positions = range(start, min(start + batch_size, len(sources)))
            # A PIL image loads when it is first read, and must not do so in two threads if it stands in a list twice.
            alone = any(isinstance(sources[position], Image.Image) for position in positions)
            views = zip(*(map(read, positions) if alone else threads.map(read, positions)))
            batch = {name: torch.from_numpy(np.stack(pixels)) for name, pixels in zip(processing, views)}
            yield {name: values.to(device) for name, values in {**batch, "index": torch.tensor(positions)}.items()}


def _named(source: Any, position: int) -> str:
    is_file = isinstance(source, str | os.PathLike)
    return f"image {os.fspath(source)!r}" if is_file else f"image {position} (counted from 0)"

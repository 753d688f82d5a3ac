"""A user's own images and labels: a folder of images, Parquet, or a data set on the hub."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

from lopa_lightning.backbones.image_spec import ImageProcessing, ImageSpec
from lopa_lightning.data.cache import encoded_rows
from lopa_lightning.data.columns import RowError, check_columns, row_names
from lopa_lightning.data.image_folder import check_image_folder, image_paths
from lopa_lightning.data.image_rows import EncodeImages, ImageCollate
from lopa_lightning.data.labels import (
    LabelLookup,
    check_shots,
    class_lookup,
    label_names,
    names_in_data,
    values_of_labels,
)
from lopa_lightning.data.splits import Role, SplitsDataModule
from lopa_lightning.data.types import Dataset, DatasetDict
from lopa_lightning.errors import LoPAError, at_least, listed, one_of
from lopa_lightning.task import Task

View = Literal["model", "resize", "crop_flip"]

_STORED = {"bytes", "path"}
_AT_ONCE = 64  # images that are decoded, and written, together


class ImageClassificationDataModule(SplitsDataModule):
    """Images with a class each.

    Each image is decoded, resized and cropped once, and kept in the data sets' cache.

    Args:
        image_column: Column of images, or in ``data_files`` of their files' names, which start from the folder that the
            file with the names is in.
        label_column: Column with the label.
        labels: Names of the classes, in the order of their indices, or a number of classes that are named 0, 1 and so
            on; by default those that the data itself names, such as the folders of an image folder.
        label_values: What stands in the label column for each label, where that is not its name.
        view: What of an image a model reads: ``model``: what its own image processor makes; ``resize``: all of it,
            resized to the model's height and width; ``crop_flip``: its shorter edge is resized to 256/224 of the
            model's, and then the middle is cut out, in training any part, mirrored every second time.
        metrics: Official metrics, whose mean is the score.
        shots_per_label: Train on that many examples of each label, drawn at random.
        multi_label: Whether the label column has a list of labels, of any number.
        **kwargs: See :class:`~lopa_lightning.data.splits.SplitsDataModule`.

    Raises:
        LoPAError: If arguments contradict each other.
    """

    def __init__(
        self,
        image_column: str = "image",
        label_column: str = "label",
        labels: Sequence[str | int | bool] | int | None = None,
        label_values: Sequence[str | int | bool] | None = None,
        view: View = "model",
        metrics: Sequence[str] | None = None,
        shots_per_label: int | None = None,
        multi_label: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        one_of("view", view, get_args(View))
        check_shots(shots_per_label, self.max_train_examples, one_each=not multi_label)
        self.multi_label, self.class_column = multi_label, None if multi_label else label_column
        self.image_column, self.label_column, self.view = image_column, label_column, view
        self.shots_per_label = shots_per_label
        if isinstance(labels, int):
            at_least(2, labels=labels)
            labels = range(labels)
        self.labels = None if labels is None else label_names("labels", labels)
        if self.labels == []:
            raise LoPAError("labels must name the classes, got none")
        self.metrics = None if metrics is None else listed("metrics", metrics)
        self.label_values = values_of_labels(self.labels, label_values)
        if labels is not None:
            _ = self.task  # refuses what labels cannot be

    @property
    def task(self) -> Task | None:  # type: ignore[override]
        """Labels and metrics; None to predict where nothing names the labels, and the model knows them."""
        labels = self.labels or names_in_data(self, self.label_column, self.multi_label)
        return None if labels is None else Task(labels, metrics=self.metrics, multi_label=self.multi_label)

    @functools.cached_property
    def _raw(self) -> DatasetDict:
        rows = super()._raw
        reads_folder = type(self).load is SplitsDataModule.load and self.path is not None
        if reads_folder and os.path.isdir(folder := os.path.expanduser(str(self.path))):
            check_image_folder(os.path.realpath(folder), rows, self.image_column)
        return rows

    @property
    def varies(self) -> bool:  # type: ignore[override]
        """Whether training examples look different in each epoch."""
        return self.view == "crop_flip"

    @property
    def image_spec(self) -> ImageSpec:
        """The image processing of the module that is connected."""
        if not isinstance(self.input_spec, ImageSpec):
            raise LoPAError(f"{type(self).__name__} gives images, and the module reads another kind of input")
        return self.input_spec

    @property
    def processing(self) -> ImageProcessing:
        """What is done to an image to validate, test and predict."""
        return viewed(self.image_spec.processing, self.view)

    def collate(self) -> ImageCollate:
        """Returns the function that makes a batch."""
        spec = self.image_spec
        other = spec.instance_processing
        return ImageCollate(spec.processing.size, None if other is None else other.size, self.seed)

    def encode(self, data: Dataset, split: str, role: Role) -> Dataset:
        """Decodes the images of a split, from the cache where that was done before."""
        what, spec, shown = f"{role} ({split})", self.image_spec, self.processing
        files, drawn = self._files(data, split, what), role == "train" and self.varies
        instance = spec.instance_processing
        if drawn and instance is None and spec.instance_vectors is not None:
            instance = shown  # a vector that is kept must be that of one view
        encoder = EncodeImages(
            self.image_column,
            replace(shown, crop=False) if drawn else shown,
            instance,
            None if role == "predict" else self.label_lookup(data, what),
            _versions(files, self.image_column, what),
            len(self.task.labels) if self.multi_label and self.task is not None else 0,
        )
        try:
            return encoded_rows(files, encoder, what, "Decoding", batch_size=_AT_ONCE, writer_batch_size=_AT_ONCE)
        except RowError as error:
            raise self._refused(what, split, error) from None

    def label_lookup(self, data: Dataset, what: str) -> LabelLookup:
        """Returns the label column, and the index of each value in it."""
        assert self.task is not None
        names = self.label_values or self.task.labels
        return class_lookup(data, self.label_column, names, what, self.multi_label)

    def named(self, set_index: int, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Adds the ``file`` of each image that has one."""
        split = self.splits_of("predict")[set_index]
        files = self._files(self.load_split(split, "predict"), split, split)
        paths = [path for path, _ in image_paths(files, self.image_column)]
        return [
            row if paths[row["index"]] is None else {"index": row["index"], "file": paths[row["index"]], **row}
            for row in rows
        ]

    def _files(self, data: Dataset, split: str, what: str) -> Dataset:
        """Returns the columns that are read, images as files or their content."""
        from datasets import Image, Value

        column = self.image_column
        check_columns(data, [column], what, " with images")
        feature = data.features[column]
        is_content = isinstance(feature, Value) and feature.dtype in ("binary", "large_binary")
        columns = dict.fromkeys([column, self.label_column])
        data = data.select_columns([name for name in columns if name in data.column_names])
        is_name = isinstance(feature, Value) and feature.dtype in ("string", "large_string")
        if is_name and self.data_files is not None:
            arguments = {"column": column, "folder": _folder_of(self.data_files[split], what)}
            data = data.map(_placed, batched=True, fn_kwargs=arguments, desc=f"Finding files {what}")
        elif not (isinstance(feature, Image) or is_content or (isinstance(feature, dict) and {*feature} == _STORED)):
            raise LoPAError(
                f"{what}: column {column!r} must hold images, got {feature}; names of files go into the metadata.csv "
                "of an image folder, or into a file of data_files"
            )
        files: Dataset = data.cast_column(column, Image(decode=False))
        return files

    def _refused(self, what: str, split: str, error: RowError) -> LoPAError:
        """Names the file, or the row as it is counted in the whole split."""
        stored = error.row[self.image_column] or {}
        if stored.get("path") is not None and stored.get("bytes") is None:
            return LoPAError(f"{what}: image {stored['path']!r} {error.fault}")
        row = error.position(self._files(self.raw()[split], split, what))
        return LoPAError(f"{what}: the image in {row_names([row])} {error.fault}")


def viewed(processing: ImageProcessing, view: View) -> ImageProcessing:
    """Returns what is done to an image in a view of it that is not drawn at random."""
    if view == "resize":
        return replace(processing, resize=processing.size, crop=False)
    if view == "crop_flip":
        return replace(processing, resize=256 * max(processing.size) // 224, crop=True)
    return processing


def _folder_of(named: str | list[str], what: str) -> str:
    """Returns the folder that files with names of images are in.

    Raises:
        LoPAError: If they are in several.
    """
    files = [named] if isinstance(named, str) else named
    folders = {os.path.dirname(os.path.abspath(os.path.expanduser(file))) for file in files}
    if len(folders) > 1:
        raise LoPAError(f"{what}: files that name images must be in one folder, got {', '.join(files)}")
    return folders.pop()


def _placed(rows: Mapping[str, list[Any]], column: str, folder: str) -> dict[str, list[Any]]:
    """Returns names of files from a folder on as their paths."""
    return {column: [None if name is None else os.path.join(folder, name) for name in rows[column]]}


def _versions(files: Dataset, column: str, what: str) -> list[tuple[int, int]]:
    """Returns the size and time of each file that rows name.

    Raises:
        LoPAError: If one is not there.
    """
    found = []
    for path, has_content in image_paths(files, column):
        if path is not None and not has_content:
            try:
                stat = os.stat(path)
            except OSError as error:
                raise LoPAError(f"{what}: image {path!r} cannot be read: {error.strerror}") from error
            found.append((stat.st_size, stat.st_mtime_ns))
    return found

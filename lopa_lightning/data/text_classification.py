"""A user's own texts and labels: CSV, JSON lines, Parquet, or a data set on the hub."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lopa_lightning.data.labels import (
    LabelLookup,
    class_lookup,
    column_of,
    drawn_per_label,
    label_names,
    label_of,
    number_lookup,
    values_of_labels,
)
from lopa_lightning.data.rows import RowEncoder
from lopa_lightning.data.splits import Role, with_inputs
from lopa_lightning.data.task_rows import task_encoder
from lopa_lightning.data.template import Template, plain_template
from lopa_lightning.data.text import TextDataModule
from lopa_lightning.data.types import Dataset
from lopa_lightning.errors import LoPAError, at_least, listed
from lopa_lightning.task import InstanceReads, Task, Verbalizer


class TextClassificationDataModule(TextDataModule):
    """Texts with a class or a number each.

    Args:
        text_columns: Columns with the text; two are read as a pair.
        label_column: Column with the label.
        labels: Names of the classes, in the order of their indices; ``[]`` for regression.
        label_values: What stands in the label column for each label, where that is not its name.
        words: The verbalizer, one word for each label, for the objectives that answer with words.
        template: Text with ``{column}`` fields and ``{mask}``, one piece or two; by default the columns alone.
        causal_template: Its wording for causal LMs.
        metrics: Official metrics, whose mean is the score.
        instance_reads: What the instance encoder reads: the text ``columns`` alone, or the ``template`` with the mask.
        multi_label: Whether the label column has a list of labels, of any number.
        shots_per_label: Train on that many examples of each label, drawn at random.
        **kwargs: See :class:`~lopa_lightning.data.text.TextDataModule`.

    Raises:
        LoPAError: If arguments contradict each other.
    """

    task: Task

    allow_empty_text = False
    """Whether rows may have an empty text."""

    def __init__(
        self,
        text_columns: Sequence[str] = ("text",),
        label_column: str = "label",
        labels: Sequence[str | int | bool] | None = None,
        label_values: Sequence[str | int | bool] | None = None,
        words: Sequence[str] | None = None,
        template: Sequence[str] | None = None,
        causal_template: str | None = None,
        metrics: Sequence[str] | None = None,
        shots_per_label: int | None = None,
        instance_reads: InstanceReads = "columns",
        multi_label: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if labels is None:
            raise LoPAError("labels must name the classes, as they stand in the label column; [] for regression")
        names = label_names("labels", labels)
        if shots_per_label is not None and self.max_train_examples is not None:
            raise LoPAError("give max_train_examples or shots_per_label, not both")
        at_least(1, shots_per_label=shots_per_label)
        if shots_per_label is not None and (not names or multi_label):
            raise LoPAError("shots_per_label needs rows with one label each")
        self.label_values = values_of_labels(names, label_values)
        self.label_column = label_column
        pieces = None if template is None else tuple(listed("template", template))
        self.template = plain_template(listed("text_columns", text_columns)) if pieces is None else Template(pieces)
        if label_column in self.template.columns:
            raise LoPAError(f"label_column {label_column!r} must not be among the columns of text, which a model reads")
        self.causal_template = Template((causal_template,)) if causal_template is not None else None
        columns = self.template.columns
        if self.causal_template is not None and not set(self.causal_template.columns) <= set(columns):
            raise LoPAError(f"causal_template must have no columns but {', '.join(columns)}, got {causal_template!r}")
        self.verbalizer = Verbalizer(
            words=None if words is None else listed("words", words),
            template=list(self.template.pieces),
            causal_template=causal_template,
            instance_reads=instance_reads,
            max_length=self.max_length,
            truncation_side=self.truncation_side,
        )
        metrics = None if metrics is None else listed("metrics", metrics)
        self.task = Task(labels=names, metrics=metrics, verbalizer=self.verbalizer, multi_label=multi_label)
        self.shots_per_label = shots_per_label

    @property
    def input_columns(self) -> Sequence[str]:
        """The columns that a model reads."""
        return self.template.columns

    def row_encoder(self, data: Dataset, what: str, role: Role) -> RowEncoder:
        """Builds the encoder that tokenises texts by the template."""
        labels = None if role == "predict" else self.label_lookup(data, what)
        return task_encoder(self.task, self.text_spec, labels, self.allow_empty_text)

    def label_lookup(self, data: Dataset, what: str) -> LabelLookup:
        """Returns the label column, and the index or number of each value in it.

        Args:
            data: The split.
            what: Its name, for messages.

        Raises:
            LoPAError: If there is no such column.
            ColumnError: If there is a label that must not be there.
        """
        column, may_miss = self.label_column, self.drop_empty
        if not self.task.is_regression:
            return class_lookup(data, column, self.label_values, what, self.task.multi_label, may_miss)
        return number_lookup(data, column, what, may_miss)

    def classes(self, data: Dataset) -> Sequence[Any] | None:
        """Returns the values of the label column, where there is one class in each row."""
        return None if self.task.is_regression or self.task.multi_label else column_of(data, self.label_column)

    def named(self, set_index: int, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Adds the ``input`` of each row, with its ``id`` or ``idx``, and its ``gold`` label where it has one."""
        data = self.load_split(self.splits_of("predict")[set_index], "predict")
        inputs = [name for name in ("id", "idx", *self.input_columns) if name in data.column_names]
        gold = self.label_column in data.column_names
        stored = data.select_columns([*inputs, *([self.label_column] if gold else [])])
        said = [stored[row["index"]] for row in rows]
        labels = [label_of(stored.features[self.label_column], each.pop(self.label_column)) for each in said if gold]
        return with_inputs(rows, said, list(map(self._named_label, labels)))

    def _named_label(self, label: Any) -> Any:
        """Returns the name of a label, whatever stands for it in the column."""
        names = dict(zip(self.label_values, self.task.labels))
        return [names.get(each, each) for each in label] if isinstance(label, list) else names.get(label, label)

    def training_subset(self, data: Dataset) -> Dataset:
        """Draws the examples to train on, so many of each label or in all."""
        if self.shots_per_label is None:
            return super().training_subset(data)
        found = self.label_lookup(data, "train")
        return drawn_per_label(data, found, self.task.labels, self.shots_per_label, self.subset_seed)

"""A user's own texts and labels: CSV, JSON lines, Parquet, or a data set on the hub."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from lopa_lightning.data.labels import (
    LabelLookup,
    check_shots,
    class_lookup,
    label_names,
    label_of,
    names_in_data,
    number_lookup,
    values_of_labels,
)
from lopa_lightning.data.rows import RowEncoder
from lopa_lightning.data.splits import Role
from lopa_lightning.data.task_rows import task_encoder
from lopa_lightning.data.template import Template, plain_template
from lopa_lightning.data.text import TextDataModule, with_inputs
from lopa_lightning.data.types import Dataset
from lopa_lightning.errors import LoPAError, listed
from lopa_lightning.task import InstanceReads, Task, Verbalizer


class TextClassificationDataModule(TextDataModule):
    """Texts with a class or a number each, or with a class for each word.

    Args:
        text_columns: Columns with the text; two are read as a pair.
        label_column: Column with the label.
        labels: Names of the classes, in the order of their indices; ``[]`` for regression. By default those that a data
            set on the hub names itself.
        label_values: What stands in the label column for each label, where that is not its name.
        words: The verbalizer, one word for each label, for the objectives that answer with words.
        template: Text with ``{column}`` fields and ``{mask}``, one piece or two; by default the columns alone. With
            ``objective: head`` its columns alone are read, without its wording.
        causal_template: Its wording for causal LMs.
        metrics: Official metrics, whose mean is the score.
        instance_reads: What the instance encoder reads: the text ``columns`` alone, or the ``template`` with the mask,
            which ends before the mask where its tokenizer has none.
        multi_label: Whether the label column has a list of labels, of any number.
        per_word: Whether the text column has lists of words (or texts, split at whitespace), and the label column
            lists with a label for each word. A word is read at its first token.
        shots_per_label: Train on that many examples of each label, drawn at random.
        **kwargs: See :class:`~lopa_lightning.data.text.TextDataModule`.

    Raises:
        LoPAError: If arguments contradict each other.
    """

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
        per_word: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if per_word and (template or causal_template or len(text_columns) != 1 or instance_reads != "columns"):
            raise LoPAError("per_word reads the words of one text column, without template or instance_reads")
        names = None if labels is None else label_names("labels", labels)
        has_classes = names != [] and not multi_label and not per_word
        check_shots(shots_per_label, self.max_train_examples, has_classes)
        self.label_column, self.class_column = label_column, label_column if has_classes else None
        self.list_column = label_column if multi_label else None
        self.labels, self.multi_label, self.per_word = names, multi_label, per_word
        self._label_values = values_of_labels(names, label_values)
        pieces = None if template is None else tuple(listed("template", template))
        self.template = plain_template(listed("text_columns", text_columns)) if pieces is None else Template(pieces)
        unread = sorted({*text_columns} - {*self.template.columns} - {"text"})  # which is there by default
        if pieces is not None and unread:
            rank_zero_warn(f"template {list(pieces)} does not read {', '.join(unread)} of text_columns")
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
        self.metrics = None if metrics is None else listed("metrics", metrics)
        self.shots_per_label = shots_per_label
        if names is not None:
            _ = self.task  # refuses what labels cannot be

    @functools.cached_property
    def task(self) -> Task | None:  # type: ignore[override]
        """Labels, metrics and words; None to predict where nothing names the labels, and the model knows them."""
        several = self.multi_label or self.per_word
        names = names_in_data(self, self.label_column, several) if self.labels is None else self.labels
        if names is None:
            return None
        return Task(names, self.metrics, None, self.verbalizer, self.multi_label, self.per_word)

    @property
    def label_values(self) -> list[str]:
        """What stands in the label column for each label."""
        return self._label_values or ([] if self.task is None else self.task.labels)

    @property
    def input_columns(self) -> Sequence[str]:
        """The columns that a model reads."""
        return self.template.columns

    def row_encoder(self, data: Dataset, what: str, role: Role) -> RowEncoder:
        """Builds the encoder that tokenises texts by the template."""
        labels = None if role == "predict" else self.label_lookup(data, what)
        task = self.task
        if task is None:  # to predict
            assert self.trainer is not None
            module: Any = self.trainer.lightning_module
            task = replace(module.required_task(), verbalizer=self.verbalizer)
        return task_encoder(task, self.text_spec, labels, self.allow_empty_text)

    def warnings_of(self, encoder: RowEncoder) -> dict[str, str]:
        """Returns the warnings on rows that were cut, or have words that cannot be read."""
        unread = {"untokenised": "texts have words that are no token: those have no label"}
        if self.per_word:
            unread["truncated"] = f"texts were cut to {encoder.max_tokens} tokens: words beyond have no label"
        return {**super().warnings_of(encoder), **unread}

    def label_lookup(self, data: Dataset, what: str) -> LabelLookup:
        """Returns the label column, and the index or number of each value in it."""
        column, may_miss = self.label_column, self.drop_empty
        if self.labels == []:
            return number_lookup(data, column, what, may_miss)
        return class_lookup(data, column, self.label_values, what, self.multi_label or self.per_word, may_miss)

    def named(self, set_index: int, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Adds the ``input`` of each row, with its ``id`` or ``idx``, and its ``gold`` label where it has one."""
        data = self.load_split(self.splits_of("predict")[set_index], "predict")
        inputs = [name for name in dict.fromkeys(["id", "idx", *self.input_columns]) if name in data.column_names]
        gold = self.label_column in data.column_names
        stored = data.select_columns([*inputs, *([self.label_column] if gold else [])])
        said = [stored[row["index"]] for row in rows]
        labels = [each.pop(self.label_column) for each in said if gold]
        if self.labels != []:  # else they are numbers
            labels = [self._named_label(label_of(stored.features[self.label_column], each)) for each in labels]
        return with_inputs(rows, said, labels)

    def _named_label(self, label: Any) -> Any:
        """Returns the name of a label, whatever stands for it in the column."""
        names = dict(zip(self.label_values, self.labels or self.label_values))
        return [names.get(each, each) for each in label] if isinstance(label, list) else names.get(label, label)

"""The rows of a task: what a user gives in Python, and the encoders that training and prediction share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from lopa_lightning.backbones.text_spec import TextSpec, least
from lopa_lightning.data.labels import LabelLookup
from lopa_lightning.data.rows import EncodeRows
from lopa_lightning.data.template import Template, Tokenize, backbone_template, plain_template
from lopa_lightning.data.word_rows import EncodeWords
from lopa_lightning.errors import LoPAError, shown
from lopa_lightning.task import Task, Verbalizer


def task_template(task: Task) -> Template:
    """Returns a task's template.

    Raises:
        LoPAError: If the task has none, and so does not say which columns it reads.
    """
    if (template := _says(task).template) is None:
        raise LoPAError("the task has no template, which says what columns of text are read")
    return Template(tuple(template))


def _says(task: Task) -> Verbalizer:
    return task.verbalizer or Verbalizer()


def _causal_template(task: Task) -> Template | None:
    """Returns the template's wording for causal LMs, where that is another."""
    return None if (causal := _says(task).causal_template) is None else Template((causal,))


def task_encoder(
    task: Task, spec: TextSpec, labels: LabelLookup | None = None, allow_empty: bool = False
) -> EncodeRows | EncodeWords:
    """Builds the encoder of a task's rows into token ids.

    Args:
        task: The task.
        spec: The module's tokenizers and lengths.
        labels: What the labels mean; None if there are none.
        allow_empty: Whether a text may be empty.

    Raises:
        LoPAError: If the template and the tokenizers do not go together.
    """
    template, says = task_template(task), _says(task)
    max_tokens = least(spec.max_tokens, says.max_length)
    to_instance = None
    if spec.instance_tokenizer is not None:
        to_instance = instance_encoding(task, spec.instance_tokenizer, spec.instance_max_tokens)
    if task.per_word:
        (column,) = template.columns
        return EncodeWords(spec.tokenizer, to_instance, column, labels, max_tokens, says.truncation_side)
    read = backbone_template(template, _causal_template(task), spec)
    chat = spec.chat if spec.chat.holds_prompt else None
    to_backbone = Tokenize(spec.tokenizer, read, max_tokens, says.truncation_side, chat)
    several = len(task.labels) if task.multi_label else 0
    return EncodeRows(to_backbone, to_instance, template.columns, labels, allow_empty, several)


def instance_encoding(task: Task, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None) -> Tokenize:
    """Builds what tokenises a task's rows for the instance encoder.

    An encoder whose tokenizer has no mask reads a template as a causal LM does, up to the place of the answer.

    Args:
        task: The task.
        tokenizer: The instance encoder's.
        max_tokens: Tokens that it reads at most; None for no limit.
    """
    template, says = task_template(task), _says(task)
    read = template if says.instance_reads == "template" else plain_template(template.columns)
    if read.has_mask and tokenizer.mask_token is None:
        read = (_causal_template(task) or template).until_mask()
    return Tokenize(tokenizer, read, max_tokens, says.truncation_side)


def rows_of(texts: Any, columns: list[str]) -> dict[str, list[Any]]:
    """Returns the rows that a user gives as texts by column.

    Args:
        texts: One row or a list of them. A row is a text, a tuple with a text for each column, or a mapping of columns,
            whose other entries are not read. A mapping of columns to lists is all rows at once.
        columns: What is read.

    Raises:
        LoPAError: If a row has not what is read.

    Example:
        >>> rows_of("good", ["text"])
        {'text': ['good']}
        >>> rows_of([("a", "b"), {"premise": "c", "hypothesis": "d", "id": 7}], ["premise", "hypothesis"])
        {'premise': ['a', 'c'], 'hypothesis': ['b', 'd']}
    """
    if isinstance(texts, Mapping) and all(isinstance(texts.get(name), list) for name in columns):
        if len({len(texts[name]) for name in columns}) > 1:
            raise LoPAError(f"columns {', '.join(columns)} must be of one length")
        return {name: list(texts[name]) for name in columns}
    is_one = isinstance(texts, (str, tuple, Mapping))
    if not is_one and not isinstance(texts, Iterable):
        raise LoPAError(f"texts must be a text, a tuple, a mapping, or a list of them; got {shown(texts)}")
    rows = [_row(row, columns, place) for place, row in enumerate([texts] if is_one else texts)]
    return {name: [row[at] for row in rows] for at, name in enumerate(columns)}


def _row(row: Any, columns: list[str], place: int) -> list[Any]:
    """Returns the texts of a row in the order of the columns."""
    if isinstance(row, Mapping):
        if missing := [name for name in columns if name not in row]:
            raise LoPAError(f"row {place} (counted from 0) has no {', '.join(missing)}, which the task reads")
        return [row[name] for name in columns]
    values = list(row) if isinstance(row, (tuple, list)) else [row]
    if len(values) != len(columns):
        raise LoPAError(
            f"the task reads {', '.join(columns)}: a row must be "
            f"{'a text' if len(columns) == 1 else f'a tuple of {len(columns)} texts'} or a mapping of columns, "
            f"got {shown(row)} in row {place} (counted from 0); several rows are a list"
        )
    return values

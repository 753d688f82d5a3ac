"""Texts to be continued: a prompt and its completion, from columns or from chats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lopa_lightning.backbones.text_spec import least
from lopa_lightning.data.completion_rows import (
    CHATS,
    Columns,
    EncodeCompletions,
    Example,
    Layout,
    Messages,
    unanswered,
)
from lopa_lightning.data.rows import RowEncoder
from lopa_lightning.data.splits import Role
from lopa_lightning.data.text import TextDataModule, with_inputs
from lopa_lightning.data.types import Dataset
from lopa_lightning.errors import LoPAError


class CompletionDataModule(TextDataModule):
    """Prompts with the completions that a causal language model is to learn.

    Every completion ends with the tokenizer's end token, which is learned as well, unless ``learn_end`` is false. A
    prompt too long is cut from the left; a completion never: a row without room for it is left out in training and
    validation, and in a test its loss. All of that is counted and said. Where the soft prompt stands in a chat
    (placement ``system`` or ``user``), a prompt is a message of the user, its completion the answer, and a chat is
    never cut: in a test or to predict, one too long is an error.

    Args:
        prompt_column: Column of the prompt.
        completion_column: Column of the completion; for ``predict`` it need not be there.
        messages_column: Column of chats, lists of ``{"role": ..., "content": ...}``, in place of the two; by default
            ``messages``, where there is such a column and none of prompts.
        instance_column: Column of what the instance encoder reads; by default the prompt. Of a chat it is the
            last question, always. Where too long, it is cut from the left.
        learn_end: Whether a completion's end token is learned. It need not be where completions close with a mark
            of their own at which generation stops.
        **kwargs: See :class:`~lopa_lightning.data.text.TextDataModule`.

    Raises:
        LoPAError: If arguments contradict each other.
    """

    def __init__(
        self,
        prompt_column: str = "prompt",
        completion_column: str = "completion",
        messages_column: str | None = None,
        instance_column: str | None = None,
        learn_end: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(truncation_side="left", **kwargs)
        if messages_column is not None and instance_column is not None:
            got = f"got {messages_column!r} and {instance_column!r}"
            raise LoPAError(
                f"a chat's instance is its last question; leave out messages_column or instance_column, {got}"
            )
        if messages_column is None and completion_column in (prompt_column, instance_column):
            raise LoPAError(f"completion_column {completion_column!r} must not be that of the prompt or the instance")
        self.prompt_column, self.completion_column = prompt_column, completion_column
        self.messages_column, self.instance_column = messages_column, instance_column
        self.learn_end = learn_end

    @property
    def input_columns(self) -> list[str]:
        """The column of the prompt, or of the chat."""
        return [self.chat_column or self.prompt_column]

    @property
    def string_columns(self) -> list[str]:
        """Prompt, completion and what the instance encoder reads."""
        return [self.prompt_column, self.completion_column, *([self.instance_column] if self.instance_column else [])]

    @property
    def instance_source(self) -> str | None:
        """The column of what the instance encoder reads, or a word for what it is; None where it reads the prompt."""
        return self.instance_column

    @property
    def chat_column(self) -> str | None:
        """The column of chats; None where prompts and completions have one each."""
        if self.messages_column is not None:
            return self.messages_column
        columns = next(iter(self.raw().values())).column_names
        return CHATS if CHATS in columns and self.prompt_column not in columns else None

    def layout(self, role: Role) -> Layout:
        """Returns what makes examples of rows.

        Args:
            role: What the rows serve.
        """
        if (column := self.chat_column) is not None:
            if self.text_spec.tokenizer.chat_template is None:
                raise LoPAError("the backbone's tokenizer has no chat template; give prompt and completion columns")
            if self.instance_column is not None:
                raise LoPAError(f"a chat's instance is its last question, got instance_column {self.instance_column!r}")
            return Messages(column, self.text_spec.chat)
        return Columns(self.prompt_column, self.completion_column, self.instance_column, role != "predict")

    def named(self, set_index: int, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Adds the ``input`` of each row, with its ``id``, and its ``gold`` completion where it has one."""
        data, layout, (column,) = self.rows("predict"), self.layout("predict"), self.input_columns
        if column not in data.column_names:  # a benchmark's, whose prompts have a layout of their own
            return rows
        stored = [data[row["index"]] for row in rows]
        said = [{name: each[name] for name in ("id", column) if name in each} for each in stored]
        if column == self.chat_column:
            said = [{**each, column: unanswered(each[column])} for each in said]
        examples = map(layout, stored)
        return with_inputs(rows, said, [each.completion if each.answer is None else each.answer for each in examples])

    def row_encoder(self, data: Dataset, what: str, role: Role) -> RowEncoder:
        """Builds what makes ids and labels of prompt and completion."""
        limit = least(self.text_spec.max_tokens, self.max_length)
        return EncodeCompletions(self.layout(role), self.text_spec, limit, role, self.learn_end)

    def warnings_of(self, encoder: RowEncoder) -> dict[str, str]:
        """Returns the warnings on rows that were cut or left out."""
        limit, what = encoder.max_tokens, "their completion alone"
        if self.text_spec.chat.holds_prompt:
            what = "their chat, which is not cut,"
        return {
            **super().warnings_of(encoder),
            "truncated": f"prompts were cut from the left to fit {limit} tokens with their completion",
            "unlabelled": f"rows have no loss: {what} is longer than {limit} tokens",
            "left_out": f"rows were left out: {what} is longer than {limit} tokens",
        }

    def example(self, role: Role, index: int) -> Example:
        """Returns the example of a row, by the ``index`` that its batch has.

        Args:
            role: What the row serves.
            index: Its position in the split.
        """
        return self.layout(role)(self.rows(role)[index])

    def rows(self, role: Role) -> Dataset:
        """Returns the rows that serve a role."""
        (split,) = self.splits_of(role)
        return self.load_split(split, role)

    def answer(self, completion: str) -> str:
        """Returns the part of a completion that is compared: here all but the white space around it."""
        return completion.strip()

    def exact_matches(self, role: Role, indices: Sequence[int], completions: Sequence[str]) -> list[bool]:
        """Returns of each completion whether its answer is, letter for letter, that of the row's own.

        Args:
            role: What the rows serve.
            indices: The rows.
            completions: One of each.
        """
        rows, layout = self.rows(role), self.layout(role)
        examples = [layout(rows[index]) for index in indices]
        wanted = [each.completion if each.answer is None else each.answer for each in examples]
        return [own is not None and self.answer(text) == self.answer(own) for own, text in zip(wanted, completions)]

    def check_scoring(self) -> None:
        """Refuses what could not be scored, before anything is generated."""

    def scoring_identity(self) -> dict[str, Any]:
        """Returns what decides, beside the rows, whether a completion is right, as plain data."""
        return {"scored_by": type(self).__name__}

    def score(self, indices: Sequence[int], completions: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
        """Judges every completion: here, it is right if it is the row's own.

        Args:
            indices: Rows of the test split.
            completions: Completions of each.

        Returns:
            One record for each completion, with ``index``, ``sample``, ``completion`` and ``passed`` at least.
        """
        records = samples(indices, completions)
        texts = [record["completion"] for record in records]
        matches = self.exact_matches("test", [record["index"] for record in records], texts)
        return [{**record, "passed": passed} for record, passed in zip(records, matches)]


def samples(indices: Sequence[int], completions: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """Returns a record of each completion: ``index`` of its row, ``sample``, its number there, and ``completion``."""
    return [
        {"index": index, "sample": sample, "completion": text}
        for index, texts in zip(indices, completions)
        for sample, text in enumerate(texts)
    ]

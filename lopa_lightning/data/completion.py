"""Texts to be continued: a prompt and its completion, from columns or from chats."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lopa_lightning.backbones.chat import Chat, ChatFormat, is_chat, question
from lopa_lightning.backbones.text_spec import TextSpec
from lopa_lightning.backbones.tokens import end_of, running_ids
from lopa_lightning.data.columns import ColumnError, RowError
from lopa_lightning.data.rows import RowEncoder, TextError, check_texts, tokenizer_key
from lopa_lightning.data.splits import Role, with_inputs
from lopa_lightning.data.text import TextDataModule
from lopa_lightning.data.types import Dataset
from lopa_lightning.errors import LoPAError, shown
from lopa_lightning.task import IGNORED

CHATS = "messages"
"""The column that data sets of chats have."""


@dataclass(frozen=True)
class Example:
    """A prompt and what follows it.

    Attributes:
        prompt: What the backbone reads.
        completion: What it is to generate; None where that is not known.
        instance: What the instance encoder reads.
        answer: What a generated text is compared with; None for the completion.
    """

    prompt: str
    completion: str | None
    instance: str
    answer: str | None = None


def check_chats(chats: Iterable[Any], column: str = CHATS) -> None:
    """Checks that chats are lists of messages, with a question before an answer at their end.

    Args:
        chats: The chats.
        column: Theirs.

    Raises:
        ColumnError: If one is not.
    """

    def is_faulty(chat: Any) -> bool:
        asked = unanswered(chat) if is_chat(chat) else []
        return not asked or asked[-1]["role"] == "assistant"

    if any(map(is_faulty, chats)):
        raise ColumnError(column, "must hold chats, lists of {role, content} with a question at the end", is_faulty)


class Layout(Protocol):
    """Makes an example of a row. Its ``repr`` must say all that it depends on."""

    @property
    def columns(self) -> Sequence[str]:
        """The columns that it reads."""

    def __call__(self, row: Mapping[str, Any]) -> Example:
        """Makes an example of a row."""


@dataclass(frozen=True)
class Columns:
    """Reads prompt and completion from two columns.

    Attributes:
        prompt: Column of the prompt.
        completion: Column of the completion.
        instance: Column of what the instance encoder reads; None for the prompt.
        answered: Whether there must be a completion.
    """

    prompt: str
    completion: str
    instance: str | None
    answered: bool

    @property
    def columns(self) -> list[str]:
        """The columns that must be there."""
        return [self.prompt, *([self.completion] if self.answered else []), *([self.instance] if self.instance else [])]

    def __call__(self, row: Mapping[str, Any]) -> Example:
        """Makes an example of a row."""
        instance = self.instance or self.prompt
        check_texts({name: [row[name]] for name in (self.prompt, instance)})
        completion = row.get(self.completion)
        check_texts({self.completion: [completion]}, allow_empty=True)
        return Example(row[self.prompt], completion, row[instance])


@dataclass(frozen=True)
class Messages:
    """Formats a chat by the tokenizer's template; its last answer is the completion.

    Attributes:
        column: Column of the chat: a list of ``{"role": ..., "content": ...}``.
        chat: Renders it.
    """

    column: str
    chat: ChatFormat

    def __repr__(self) -> str:
        return f"Messages({self.column!r}, {self.chat.template!r})"

    @property
    def columns(self) -> list[str]:
        """The column of the chat."""
        return [self.column]

    def __call__(self, row: Mapping[str, Any]) -> Example:
        """Makes an example of a chat. The instance encoder reads the last question."""
        messages = row[self.column]
        if not messages:
            raise TextError(self.column, "is empty", allow_empty=False)
        what = f"column {self.column!r}: a chat must"
        if not is_chat(messages):
            raise LoPAError(f"{what} be a list of {{role, content}}, both texts; got {shown(messages)}")
        asked = unanswered(messages)
        if not asked or asked[-1]["role"] == "assistant":
            raise LoPAError(f"{what} have a question before its last answer, got {shown(messages)}")
        if len(asked) == len(messages):
            return Example(self.chat.prompt(asked), None, question(asked))
        return Example(*self.chat.answered(messages), question(asked), messages[-1].get("content"))


def unanswered(messages: Chat) -> Chat:
    """Returns a chat without its last answer."""
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


@dataclass
class EncodeCompletions:
    """Encodes rows for ``datasets.map``: ids of prompt, completion and end, and which of them are labels.

    Args:
        layout: Makes examples of rows.
        spec: The tokenizers, the instance encoder's length, and the ids before a prompt that is no chat.
        max_tokens: Tokens of prompt and completion at most; None for no limit. Prompts are cut from the left.
        role: What the rows serve. To train and to validate, what has no room for its completion is left
            out; to test, it is kept without one, and for ``predict`` completions are not read.
        learn_end: Whether a completion ends with an end token.
    """

    layout: Layout
    spec: TextSpec
    max_tokens: int | None
    role: Role
    learn_end: bool

    def __post_init__(self) -> None:
        self.columns = self.needed = self.layout.columns
        self.is_chat = isinstance(self.layout, Messages) or self.spec.chat.holds_prompt
        self.start = [] if self.is_chat else self.spec.start_ids
        if self.learn_end and self.spec.tokenizer.eos_token_id is None:
            raise LoPAError("the backbone's tokenizer has no end token, which a completion must learn to end with")

    def key(self) -> list[Any]:
        """Returns all that the ids depend on."""
        tokenizers = [each for each in (self.spec.tokenizer, self.spec.instance_tokenizer) if each is not None]
        options = [self.max_tokens, self.spec.instance_max_tokens, self.start, self.learn_end]
        placed = [self.spec.placement, self.spec.identity()]
        return ["completions", repr(self.layout), self.role, options, placed, *map(tokenizer_key, tokenizers)]

    def __call__(self, rows: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        """Encodes rows."""
        stored = [dict(zip(rows, values)) for values in zip(*rows.values())]
        examples = []
        for row in stored:
            with self._naming(row):
                examples.append(self._in_chat(self.layout(row)))
                if examples[-1].completion is None and self.role in ("train", "val"):
                    raise LoPAError("it has no completion to learn")
        prompts, positions = self._prompt_ids([example.prompt for example in examples])
        answers = running_ids(self.spec.tokenizer, [example.completion or "" for example in examples], self.is_chat)
        encoded = []
        for row, prompt, answer, example in zip(stored, prompts, answers, examples):
            is_asked = example.completion is None or self.role == "predict"
            with self._naming(row):
                encoded.append(self._fitted(prompt, [] if is_asked else self._ended(answer)))
        columns: dict[str, list[Any]] = {key: [row[key] for row in encoded] for key in encoded[0]}
        if self.role == "predict":
            del columns["labels"]
        if self.spec.chat.holds_prompt:
            columns["prompt_position"] = positions
        if self.spec.instance_tokenizer is not None:
            instances = [example.instance for example in examples]
            read = end_of(self.spec.instance_tokenizer, instances, self.spec.instance_max_tokens)
            columns |= {f"instance_{key}": values for key, values in read.items()}
        return {**columns, "index": indices, "length": [len(ids) for ids in columns["input_ids"]]}

    @contextlib.contextmanager
    def _naming(self, row: dict[str, Any]) -> Iterator[None]:
        """Makes a row's error one that names it."""
        try:
            yield
        except LoPAError as error:
            raise RowError({name: row[name] for name in self.columns}, str(error)) from error

    def _in_chat(self, example: Example) -> Example:
        """Makes messages of a prompt and its completion, where the soft prompt stands in a chat."""
        if not self.spec.chat.holds_prompt or isinstance(self.layout, Messages):
            return example
        completion = None if self.role == "predict" else example.completion
        return Example(*self.spec.chat.of_pair(example.prompt, completion), example.instance)

    def _prompt_ids(self, prompts: list[str]) -> tuple[list[list[int]], list[int]]:
        if self.is_chat:
            return self.spec.chat.ids(prompts)
        return running_ids(self.spec.tokenizer, prompts), []

    def _ended(self, ids: list[int]) -> list[int]:
        """Adds the end token; what a chat's template adds after it is no part of the answer."""
        end = self.spec.tokenizer.eos_token_id
        if self.is_chat and end in ids:
            ids = ids[: len(ids) - 1 - ids[::-1].index(end)]
        return [*ids, end] if self.learn_end else ids

    def _fitted(self, prompt: list[int], answer: list[int]) -> dict[str, Any]:
        whole = [*self.start, *prompt]
        limit = self.max_tokens if self.max_tokens is not None else len(whole) + len(answer)
        # A completion's first token is predicted at the prompt's last; a chat around a soft prompt stays whole.
        least = len(whole) if self.spec.chat.holds_prompt else len(self.start) + 1
        if self.role in ("predict", "test"):
            self.spec.chat.check_fits(len(whole), limit)
        if not (has_room := limit - len(answer) >= least):
            answer = []
        room = max(limit - len(answer), least)
        kept = whole if len(whole) <= room else [*self.start, *prompt[len(self.start) - room :]]
        return {
            "input_ids": [*kept, *answer],
            "labels": [IGNORED] * len(kept) + answer,
            "truncated": len(kept) < len(whole),
            "left_out": not has_room and self.role in ("train", "val"),
            "unlabelled": not has_room and self.role == "test",
        }


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
            return Messages(column, self.text_spec.chat)
        return Columns(self.prompt_column, self.completion_column, self.instance_column, role in ("train", "val"))

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
        return EncodeCompletions(self.layout(role), self.text_spec, self._max_tokens(), role, self.learn_end)

    def warnings_of(self, encoder: RowEncoder) -> dict[str, str]:
        """Returns what is said of rows that were cut or left out."""
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

    # Scoring what was generated

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

"""Encoders of prompts and completions into token ids, from columns or from chats."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lopa_lightning.backbones.chat import Chat, ChatFormat, is_chat, question
from lopa_lightning.backbones.text_spec import TextSpec
from lopa_lightning.backbones.tokens import end_of, running_ids
from lopa_lightning.data.columns import RowError
from lopa_lightning.data.rows import TextError, check_texts, tokenizer_key
from lopa_lightning.data.splits import Role
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
        if fault := fault_of_chat(messages):
            raise LoPAError(f"column {self.column!r}: {fault}")
        asked = unanswered(messages)
        if len(asked) == len(messages):
            return Example(self.chat.prompt(asked), None, question(asked))
        return Example(*self.chat.answered(messages), question(asked), messages[-1].get("content"))


def unanswered(messages: Chat) -> Chat:
    """Returns a chat without its last answer."""
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def fault_of_chat(chat: Any) -> str | None:
    """Returns why something is no chat that can be answered; None where it is one."""
    if not is_chat(chat):
        return f"a chat must be a list of {{role, content}}, both texts; got {shown(chat)}"
    asked = unanswered(chat)
    if not asked or asked[-1]["role"] == "assistant":
        return f"a chat must have a question before its last answer, got {shown(chat)}"
    return None


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
                if examples[-1].completion is None and self.role != "predict":
                    raise LoPAError(f"it has no completion to {'score' if self.role == 'test' else 'learn'}")
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
        elif self.spec.placement == "after":
            columns["prompt_position"] = [row["labels"].count(IGNORED) for row in encoded]
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

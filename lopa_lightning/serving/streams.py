"""Answers that come in chunks, checked as they come."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_warn

from lopa_lightning.serving.requests import ServedRequest

if TYPE_CHECKING:
    from openai import AsyncStream, Stream
    from openai.types import Completion
    from openai.types.chat import ChatCompletionChunk

    Chunk = ChatCompletionChunk | Completion


class CheckedStream:
    """The chunks of an answer; raises a PromptDroppedError where the server read another number of tokens.

    A vLLM server says so with the first chunk. A stream that is not read to its end is closed by :meth:`close`, or by
    a ``with`` around it; where the server had not said by then what it read, this warns.
    """

    def __init__(self, stream: Stream[Any], request: ServedRequest, shows_usage: bool) -> None:
        self._stream, self._seen = stream, Usage(request, shows_usage)
        self._chunks = self._checked()

    def __iter__(self) -> Iterator[Chunk]:
        return self._chunks

    def __next__(self) -> Chunk:
        return next(self._chunks)

    def __enter__(self) -> CheckedStream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends the answer: the server stops."""
        self._seen.close()
        self._stream.close()

    def _checked(self) -> Iterator[Chunk]:
        try:
            for chunk in self._stream:
                if self._seen.shows(chunk):
                    yield chunk
            self._seen.check_end()
        finally:
            self.close()


class AsyncCheckedStream:
    """See :class:`CheckedStream`."""

    def __init__(self, stream: AsyncStream[Any], request: ServedRequest, shows_usage: bool) -> None:
        self._stream, self._seen = stream, Usage(request, shows_usage)
        self._chunks = self._checked()

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self._chunks

    async def __anext__(self) -> Chunk:
        return await self._chunks.__anext__()

    async def __aenter__(self) -> AsyncCheckedStream:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the answer: the server stops."""
        self._seen.close()
        await self._stream.close()

    async def _checked(self) -> AsyncIterator[Chunk]:
        try:
            async for chunk in self._stream:
                if self._seen.shows(chunk):
                    yield chunk
            self._seen.check_end()
        finally:
            await self.close()


class Usage:
    """Checks the usage in a stream's chunks, and hides what the caller did not ask for."""

    def __init__(self, request: ServedRequest, shows_usage: bool) -> None:
        self._request, self._shows_usage, self._has_begun, self._is_checked = request, shows_usage, False, False

    def shows(self, chunk: Any) -> bool:
        """Returns whether the caller gets a chunk."""
        if chunk.usage is not None:
            self._is_checked = True
            self._request.check_usage(chunk.usage)
            if chunk.choices or not self._shows_usage:
                chunk.usage = None  # it was asked for at every chunk, to see the first one's
        self._has_begun |= bool(chunk.choices)
        return bool(chunk.choices) or self._shows_usage

    def check_end(self) -> None:
        """Raises a PromptDroppedError if no chunk had a usage."""
        if not self._is_checked:
            self._is_checked = True
            self._request.check_usage(None)

    def close(self) -> None:
        """Warns if the caller got text, and no chunk had a usage."""
        if self._has_begun and not self._is_checked:
            self._is_checked = True
            rank_zero_warn(
                "a stream was closed before the server said how many tokens of the prompt it read: whether it read the "
                "soft prompt is not known"
            )


def stream_options(options: Mapping[str, Any]) -> tuple[bool, dict[str, Any]]:
    """Returns whether the caller wants the usage, and the options by which a server sends it with each chunk."""
    given = dict(options.get("stream_options") or {})
    usage = {"include_usage": True, "continuous_usage_stats": True}
    return bool(given.get("include_usage")), {"stream": True, "stream_options": {**given, **usage}}

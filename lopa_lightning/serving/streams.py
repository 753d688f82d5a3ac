"""Answers that come in chunks, checked as they come."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from lopa_lightning.serving.requests import ServedRequest

if TYPE_CHECKING:
    from openai import AsyncStream, Stream
    from openai.types.chat import ChatCompletionChunk


class CheckedStream:
    """The chunks of an answer; raises a PromptDroppedError where the server read another number of tokens.

    A vLLM server says so with the first chunk. A stream that is not read to its end is closed by :meth:`close`, or by
    a ``with`` around it.
    """

    def __init__(self, stream: Stream[ChatCompletionChunk], request: ServedRequest, shows_usage: bool) -> None:
        self._stream, self._seen = stream, Usage(request, shows_usage)
        self._chunks = self._checked()

    def __iter__(self) -> Iterator[ChatCompletionChunk]:
        return self._chunks

    def __next__(self) -> ChatCompletionChunk:
        return next(self._chunks)

    def __enter__(self) -> CheckedStream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends the answer: the server stops."""
        self._stream.close()

    def _checked(self) -> Iterator[ChatCompletionChunk]:
        try:
            for chunk in self._stream:
                if self._seen.shows(chunk):
                    yield chunk
            self._seen.check_end()
        finally:
            self.close()


class AsyncCheckedStream:
    """See :class:`CheckedStream`."""

    def __init__(self, stream: AsyncStream[ChatCompletionChunk], request: ServedRequest, shows_usage: bool) -> None:
        self._stream, self._seen = stream, Usage(request, shows_usage)
        self._chunks = self._checked()

    def __aiter__(self) -> AsyncIterator[ChatCompletionChunk]:
        return self._chunks

    async def __anext__(self) -> ChatCompletionChunk:
        return await self._chunks.__anext__()

    async def __aenter__(self) -> AsyncCheckedStream:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the answer: the server stops."""
        await self._stream.close()

    async def _checked(self) -> AsyncIterator[ChatCompletionChunk]:
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
        self._request, self._shows_usage, self._was_seen = request, shows_usage, False

    def shows(self, chunk: Any) -> bool:
        """Returns whether the caller gets a chunk."""
        if chunk.usage is not None:
            self._request.check_usage(chunk.usage)
            self._was_seen = True
            if chunk.choices or not self._shows_usage:
                chunk.usage = None  # it was asked for at every chunk, to see the first one's
        return bool(chunk.choices) or self._shows_usage

    def check_end(self) -> None:
        """Raises a PromptDroppedError if no chunk had a usage."""
        if not self._was_seen:
            self._request.check_usage(None)


def stream_options(options: Mapping[str, Any]) -> tuple[bool, dict[str, Any]]:
    """Returns whether the caller wants the usage, and the options by which a server sends it with each chunk."""
    given = dict(options.get("stream_options") or {})
    usage = {"include_usage": True, "continuous_usage_stats": True}
    return bool(given.get("include_usage")), {"stream": True, "stream_options": {**given, **usage}}

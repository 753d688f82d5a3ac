"""Clients that send soft prompts to a stock vLLM server and return the ``openai`` package's objects."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lopa_lightning.backbones.injection import CHAT_PLACEMENTS
from lopa_lightning.errors import LoPAError, at_least, imported
from lopa_lightning.serving.bundle import Bundle
from lopa_lightning.serving.labels import Labelling
from lopa_lightning.serving.prompter import LoPAPrompter
from lopa_lightning.serving.request_options import check_options
from lopa_lightning.serving.requests import ServedPrompter, ServedRequest
from lopa_lightning.serving.retries import wait_before_retry
from lopa_lightning.serving.streams import AsyncCheckedStream, CheckedStream, stream_options

if TYPE_CHECKING:
    from openai import AsyncOpenAI, OpenAI

_AT_ONCE = 16  # requests that are made at a time, for each that is sent at a time


class _Client:
    """What both clients share; nothing is sent here."""

    _kind: str  # class of the openai package

    def __init__(
        self,
        base_url: str,
        bundle: Bundle | LoPAPrompter | ServedPrompter | str | Path,
        api_key: str | None = None,
        *,
        model: str | None = None,
        max_retries: int = 3,
        max_inflight: int = 32,
        **options: Any,
    ) -> None:
        at_least(0, max_retries=max_retries)
        at_least(1, max_inflight=max_inflight)
        kind = getattr(_openai(), self._kind)
        self.served = bundle if isinstance(bundle, ServedPrompter) else ServedPrompter(bundle)
        self.model, self.max_retries, self.max_inflight = model, max_retries, max_inflight
        url = base_url.rstrip("/").removesuffix("/v1")
        # The package wants a key, and would take that of OpenAI from the environment.
        self.openai = kind(base_url=f"{url}/v1", api_key=api_key or "none", max_retries=0, **options)

    def _requests(
        self, method: str, prompts: Any, instance_texts: Any = None, options: Mapping[str, Any] | None = None
    ) -> Iterator[list[ServedRequest]]:
        """Makes the requests of a method, if it is the one that goes with the bundle; ``map`` goes with two.

        All are checked at once, and some made at a time: with the embeddings of a long text each takes megabytes.
        """
        check_options(options or {}, ("stream",) if method == "map" else ())
        placement = self.served.facts.placement
        right, why = "chat" if placement in CHAT_PLACEMENTS else "complete", f"text, with placement {placement!r}"
        if self.served.task is not None:
            right, why = "classify", "label words"
        if method != right and (method != "map" or right == "classify"):
            raise LoPAError(f"the bundle answers with {why}; use {right} in place of {method}")
        if method in ("map", "classify"):
            return self.served.blocks(prompts, instance_texts, _AT_ONCE * self.max_inflight)
        found = self.served.requests(prompts, instance_texts)
        if len(found) != 1:
            raise LoPAError(f"{method} takes one text or one chat, got {len(found)}; use map for several")
        return iter([found])

    def _call(self, request: ServedRequest, options: Mapping[str, Any]) -> Callable[[], Any]:
        """What sends a request by the client of the ``openai`` package."""
        if request.path == "completions":
            body = {**(options.get("extra_body") or {}), **request.body}
            given = {**options, "model": self.model, "prompt": None, "extra_body": body}
            return functools.partial(self.openai.completions.create, **given)
        given = {**options, "model": self.model, "messages": request.messages}
        return functools.partial(self.openai.chat.completions.create, **given)

    def _wait(self, error: Exception, attempt: int) -> float | None:
        """Seconds until a request is sent again; None where it is not.

        Raises:
            LoPAError: If it was too large.
        """
        if getattr(error, "status_code", None) == 413:
            size = cast(Any, error).request.headers.get("content-length", "that many")
            raise LoPAError(
                f"the server, or a proxy before it, takes no request of {size} bytes (413): raise its limit, such as "
                "nginx's client_max_body_size (1 MiB by default), or send ServedPrompter(..., dtype='bfloat16')"
            ) from error
        return wait_before_retry(error, attempt) if attempt < self.max_retries else None


class LoPAClient(_Client):
    """Asks a vLLM server (``--enable-prompt-embeds``) with the soft prompts of a bundle. Threads may share it.

    Args:
        base_url: Of the server, such as ``http://HOST:8000``; ``/v1`` is added where it is not there.
        bundle: A bundle, where it lies (folder or id on the hub), its prompter, or a
            :class:`~lopa_lightning.serving.requests.ServedPrompter`.
        api_key: Of the server; by default none. The environment's is not sent.
        model: What the server calls the backbone; by default it is asked.
        max_retries: How often a request is sent again that the server was too busy for (429, 503), or whose connection
            was not accepted. After any other error it is not: a request that ends a server would end the next one.
        max_inflight: Requests of ``classify`` and ``map`` at a time.
        **options: Of ``openai.OpenAI``, such as ``timeout`` in seconds.

    Raises:
        LoPAError: If the ``openai`` package is not installed, or the bundle cannot be served.

    Example::

        client = LoPAClient("http://localhost:8000", Bundle.from_pretrained("OUT"))
        print(client.chat("How do I return a parcel?", max_tokens=100).choices[0].message.content)
    """

    _kind = "OpenAI"
    openai: OpenAI

    def chat(self, prompt: Any, *, instance_text: str | None = None, stream: bool = False, **options: Any) -> Any:
        """Answers a text or a chat.

        Args:
            prompt: A text, which is one message of the user, or a chat: a list of messages.
            instance_text: What the instance encoder reads; by default the text, of a chat its last message.
            stream: Whether the answer comes in chunks.
            **options: Of ``openai.OpenAI().chat.completions.create``, such as ``max_tokens``, ``n``, ``temperature`` or
                ``response_format``.

        Returns:
            A ``ChatCompletion``; with ``stream`` a :class:`CheckedStream` of ``ChatCompletionChunk``.

        Raises:
            LoPAError: If the chat or an option does not go with a soft prompt.
            PromptDroppedError: If the server read another number of tokens than it was sent.
            openai.OpenAIError: Of the server or the network.
        """
        return self._asked("chat", prompt, instance_text, stream, options)

    def complete(self, prompt: Any, *, instance_text: str | None = None, stream: bool = False, **options: Any) -> Any:
        """Completes a text, for a bundle whose soft prompt does not stand in a chat: placement ``before``, the default.

        The embeddings of the whole text are sent, of which rows of the backbone's table are read.

        Args:
            prompt: A text; or a chat, which is rendered here.
            instance_text: See :meth:`chat`.
            stream: See :meth:`chat`.
            **options: Of ``openai.OpenAI().completions.create``; without ``max_tokens`` a server stops after 16.

        Returns:
            A ``Completion``; with ``stream`` a :class:`CheckedStream` of them.

        Raises:
            LoPAError: If the text or an option does not go with a soft prompt.
            PromptDroppedError: See :meth:`chat`.
            openai.OpenAIError: See :meth:`chat`.
        """
        return self._asked("complete", prompt, instance_text, stream, options)

    def map(self, prompts: Any, *, instance_texts: Sequence[str] | None = None, **options: Any) -> list[Any]:
        """Answers many texts or chats, each by a request of its own, ``max_inflight`` at a time.

        Args:
            prompts: A list of what :meth:`chat` or :meth:`complete` takes, whichever the bundle is for.
            instance_texts: What the instance encoder reads of each.
            **options: See these; there is no ``stream``.

        Returns:
            Their answers, in the order of the prompts.

        Raises:
            LoPAError: See :meth:`chat`.
            PromptDroppedError: See :meth:`chat`.
            openai.OpenAIError: See :meth:`chat`.
        """
        requests = self._requests("map", prompts, instance_texts, options)
        return self._each(lambda request: self._answer(request, options), requests)

    def classify(self, texts: Any) -> list[dict[str, Any]]:
        """Labels texts, as ``module.predict`` does.

        Args:
            texts: One row or a list of them, as ``predict`` takes them.

        Returns:
            A record for each row, in their order: ``label``, and ``probabilities`` by name.

        Raises:
            LoPAError: If a row has not the task's texts, or the server sends no log probabilities.
            PromptDroppedError: See :meth:`chat`.
            openai.OpenAIError: See :meth:`chat`.
        """
        return self._each(self._label, self._requests("classify", texts))

    def close(self) -> None:
        """Closes its connections."""
        self.openai.close()

    def _asked(
        self, method: str, prompt: Any, instance_text: str | None, stream: bool, options: Mapping[str, Any]
    ) -> Any:
        ((request,),) = self._requests(method, prompt, instance_text, options)
        self._find_model()
        if stream:
            shows, streamed = stream_options(options)
            return CheckedStream(self._send(request, {**options, **streamed}), request, shows)
        return self._answer(request, options)

    def _each(self, answer: Callable[[ServedRequest], Any], blocks: Iterator[list[ServedRequest]]) -> list[Any]:
        self._find_model()
        with ThreadPoolExecutor(self.max_inflight) as pool:  # whose map cancels the others after an error
            return [each for block in blocks for each in pool.map(answer, block)]

    def _find_model(self) -> None:
        if self.model is None:
            self.model = chosen_model(self._retried(self.openai.models.list).data, self.served.backbone)

    def _label(self, request: ServedRequest) -> dict[str, Any]:
        labelling = Labelling(self.served.words, request.path)
        for options in labelling:
            labelling.add(self._answer(request, options))
        return labelling.record()

    def _answer(self, request: ServedRequest, options: Mapping[str, Any]) -> Any:
        answer = self._send(request, options)
        request.check_usage(answer.usage)
        return answer

    def _send(self, request: ServedRequest, options: Mapping[str, Any]) -> Any:
        return self._retried(self._call(request, options))

    def _retried(self, send: Callable[[], Any]) -> Any:
        attempt = 0
        while True:
            try:
                return send()
            except _openai().OpenAIError as error:
                if (seconds := self._wait(error, attempt)) is None:
                    raise
            time.sleep(seconds)
            attempt += 1


class AsyncLoPAClient(_Client):
    """Asks a server as :class:`LoPAClient` does, with ``await``: the same arguments, options and answers."""

    _kind = "AsyncOpenAI"
    openai: AsyncOpenAI

    async def chat(self, prompt: Any, *, instance_text: str | None = None, stream: bool = False, **options: Any) -> Any:
        """See :meth:`LoPAClient.chat`; with ``stream`` an :class:`AsyncCheckedStream`."""
        return await self._asked("chat", prompt, instance_text, stream, options)

    async def complete(
        self, prompt: Any, *, instance_text: str | None = None, stream: bool = False, **options: Any
    ) -> Any:
        """See :meth:`LoPAClient.complete`; with ``stream`` an :class:`AsyncCheckedStream`."""
        return await self._asked("complete", prompt, instance_text, stream, options)

    async def map(self, prompts: Any, *, instance_texts: Sequence[str] | None = None, **options: Any) -> list[Any]:
        """See :meth:`LoPAClient.map`."""
        requests = await asyncio.to_thread(self._requests, "map", prompts, instance_texts, options)
        return await self._each(lambda request: self._answer(request, options), requests)

    async def classify(self, texts: Any) -> list[dict[str, Any]]:
        """See :meth:`LoPAClient.classify`."""
        return await self._each(self._label, await asyncio.to_thread(self._requests, "classify", texts))

    async def close(self) -> None:
        """Closes its connections."""
        await self.openai.close()

    async def _asked(
        self, method: str, prompt: Any, instance_text: str | None, stream: bool, options: Mapping[str, Any]
    ) -> Any:
        ((request,),) = await asyncio.to_thread(self._requests, method, prompt, instance_text, options)
        await self._find_model()
        if stream:
            shows, streamed = stream_options(options)
            return AsyncCheckedStream(await self._send(request, {**options, **streamed}), request, shows)
        return await self._answer(request, options)

    async def _each(
        self, answer: Callable[[ServedRequest], Awaitable[Any]], blocks: Iterator[list[ServedRequest]]
    ) -> list[Any]:
        room, found = asyncio.Semaphore(self.max_inflight), list[Any]()
        await self._find_model()

        async def one(request: ServedRequest) -> Any:
            async with room:
                return await answer(request)

        while block := await asyncio.to_thread(next, blocks, None):
            tasks = [asyncio.ensure_future(one(request)) for request in block]
            try:
                found += await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
        return found

    async def _find_model(self) -> None:
        if self.model is None:
            self.model = chosen_model((await self._retried(self.openai.models.list)).data, self.served.backbone)

    async def _label(self, request: ServedRequest) -> dict[str, Any]:
        labelling = Labelling(self.served.words, request.path)
        for options in labelling:
            labelling.add(await self._answer(request, options))
        return labelling.record()

    async def _answer(self, request: ServedRequest, options: Mapping[str, Any]) -> Any:
        answer = await self._send(request, options)
        request.check_usage(answer.usage)
        return answer

    async def _send(self, request: ServedRequest, options: Mapping[str, Any]) -> Any:
        return await self._retried(self._call(request, options))

    async def _retried(self, send: Callable[[], Awaitable[Any]]) -> Any:
        attempt = 0
        while True:
            try:
                return await send()
            except _openai().OpenAIError as error:
                if (seconds := self._wait(error, attempt)) is None:
                    raise
            await asyncio.sleep(seconds)
            attempt += 1


def chosen_model(cards: Sequence[Any], backbone: str) -> str:
    """Returns what a server calls its model. Its adapters, which have a parent, are none.

    Args:
        cards: Of ``/v1/models``.
        backbone: What the bundle calls it.

    Raises:
        LoPAError: If there are several, and none by the backbone's name, or it has no name.
    """
    bases = [card for card in cards if getattr(card, "parent", None) is None]
    named = [card for card in bases if backbone in (card.id, getattr(card, "root", None))]
    if len(bases) != 1 and not named:
        names = ", ".join(card.id for card in bases) or "none"
        raise LoPAError(f"the server has not {backbone!r} among its models ({names}); give model")
    if not isinstance(name := (named or bases)[0].id, str):
        raise LoPAError(f"the server's model has no name, got {name!r}")
    return name


def _openai() -> Any:
    return imported("openai", "serve", "this needs the openai package")

"""An OpenAI-compatible gateway: each bundle is a model, answered by a stock server with the bundle's soft prompts.

It keeps nothing but vectors that it can make again. Requests for other models are passed on as they are.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from typing import Any

import aiohttp
from prometheus_client import generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from lopa_lightning.backbones.injection import CHAT_PLACEMENTS
from lopa_lightning.errors import LoPAError, one_line, shown
from lopa_lightning.serving.batching import Batcher, KeptVectors
from lopa_lightning.serving.client import chosen_model
from lopa_lightning.serving.gateway_bodies import chat_of, instance_of, parsed, row_of, text_of
from lopa_lightning.serving.gateway_calls import (
    Call,
    Fields,
    GatewayError,
    Metrics,
    PassedError,
    Stream,
    answer_of,
    checked,
    event,
    kept_headers,
    of_the_api,
    passed,
    read_json,
    refusal,
    while_connected,
)
from lopa_lightning.serving.labels import Labelling
from lopa_lightning.serving.request_options import check_options
from lopa_lightning.serving.requests import PromptDroppedError, ServedPrompter, ServedRequest
from lopa_lightning.serving.retries import BUSY, busy_wait
from lopa_lightning.serving.streams import Usage, stream_options

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
PASSED = (CHAT, COMPLETIONS, "/v1/embeddings", "/tokenize", "/detokenize")
"""What is passed on of other models: what makes answers, and nothing that changes a server."""
_OF_LABELS = {"temperature", "top_p", "seed", "max_tokens", "max_completion_tokens", "user"}
_OF_STREAMS = {"model", "stream", "stream_options"}
_Handler = Callable[[Call, Request, bytes], Coroutine[Any, Any, Response]]


class Gateway:
    """Answers requests of the OpenAI API. Serve :meth:`app` by an ASGI server, one process of it.

    Args:
        upstream: Address of the server, such as ``http://HOST:8000``.
        bundles: By the name of the model that each is.
        kept: The vectors that the bundles' prompters keep.
        model: What the server calls the backbone; by default it is asked.
        max_body_bytes: Of a request.
        max_retries: How often a request is sent again that the server was too busy for, or whose connection was not
            accepted.
        timeout: Seconds without a byte of an answer, after which it is given up.
    """

    def __init__(
        self,
        upstream: str,
        bundles: Mapping[str, ServedPrompter],
        kept: KeptVectors,
        *,
        model: str | None = None,
        max_body_bytes: int = 8 * 2**20,
        max_retries: int = 2,
        timeout: float = 600.0,
    ) -> None:
        self.upstream, self.bundles, self.model = upstream.rstrip("/").removesuffix("/v1"), dict(bundles), model
        self.max_body_bytes, self.max_retries, self.timeout = max_body_bytes, max_retries, timeout
        self.batcher = Batcher()
        self.metrics = Metrics(kept, self.batcher)
        self._names: dict[str, str] = {}  # of backbones, as the server calls them
        self._session: aiohttp.ClientSession

    def app(self) -> Starlette:
        """Returns the ASGI application."""
        routes = [Route(path, self._endpoint(self._post), methods=["POST"]) for path in PASSED]
        routes += [Route("/v1/models", self._endpoint(self._models)), Route("/health", self._health)]
        routes += [Route("/v1/models/{name:path}", self._endpoint(self._models)), Route("/metrics", self._metrics)]

        async def unknown(request: Request, error: Exception) -> Response:
            there = f"GET /v1/models, /health, /metrics; POST {', '.join(PASSED)}"
            call = Call(request, self.metrics)
            call.end(status := getattr(error, "status_code", 404))
            return refusal(GatewayError(status, f"the gateway has {there}"), call.id)

        return Starlette(routes=routes, exception_handlers={404: unknown, 405: unknown}, lifespan=self._running)

    @contextlib.asynccontextmanager
    async def _running(self, app: Starlette) -> AsyncIterator[None]:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=2),  # less than servers wait for another request
            cookie_jar=aiohttp.DummyCookieJar(),  # one client's cookies are not another's
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=self.timeout),
        )
        async with self._session:
            yield
        self.batcher.close()

    def _endpoint(self, handle: _Handler) -> Callable[[Request], Awaitable[Response]]:
        """Wraps what answers a request: its id, its line in the log, its errors, and a client that has gone."""

        async def endpoint(request: Request) -> Response:
            call = Call(request, self.metrics)
            try:
                body = await self._body(request)
                response = await while_connected(request, handle(call, request, body))
            except PassedError as error:
                response = error.response
            except Exception as error:
                response = refusal(call.told(error, self.upstream), call.id)
            except asyncio.CancelledError:
                call.end(499)
                raise
            response.headers["x-request-id"] = call.id
            if not isinstance(response, Stream):
                call.end(response.status_code)
            return response

        return endpoint

    async def _body(self, request: Request) -> bytes:
        body, size = bytearray(), 0
        async for piece in request.stream():
            size += len(piece)
            if size <= self.max_body_bytes:
                body += piece
            elif size > 8 * self.max_body_bytes:  # until there it is read, for the client to hear what is wrong
                break
        if size > self.max_body_bytes:
            raise GatewayError(413, f"the request has more than {self.max_body_bytes} bytes, --max_body_bytes")
        return bytes(body)

    # Models

    async def _models(self, call: Call, request: Request, body: bytes) -> Response:
        async with await self._send("GET", "/v1/models", call) as response:
            if response.status != 200:
                return await passed(response)
            listed = await read_json(response)
        with of_the_api():
            cards = [card for card in listed.data or () if str(card["id"]) not in self.bundles]
        own = {"object": "model", "created": 0, "owned_by": "lopa"}
        found = [{"id": name, **own, "parent": served.backbone} for name, served in self.bundles.items()] + cards
        if (name := request.path_params.get("name")) is None:
            return answer_of({"object": "list", "data": found})
        if not (named := [card for card in found if card["id"] == name]):
            raise GatewayError(404, f"there is no model {shown(name)}")
        return answer_of(named[0])

    async def _name(self, served: ServedPrompter, call: Call) -> str:
        """What the server calls a bundle's backbone."""
        if self.model is not None:
            return self.model
        if served.backbone not in self._names:
            async with await self._send("GET", "/v1/models", call) as response:
                if response.status != 200:
                    raise PassedError(await passed(response))
                cards = (await read_json(response)).data or []
            try:
                with of_the_api():
                    self._names[served.backbone] = chosen_model(cards, served.backbone)
            except LoPAError as error:
                raise GatewayError(502, f"{error}, as lopa serve --model") from error
        return self._names[served.backbone]

    # Answers

    async def _post(self, call: Call, request: Request, raw: bytes) -> Response:
        body = parsed(raw)
        name = body.get("model")
        served = self.bundles.get(name) if isinstance(name, str) else None
        if served is None:
            response = await self._send("POST", call.target, call, raw)
            if response.content_type != "text/event-stream":
                async with response:
                    return await passed(response)
            return Stream(self._guarded(response.content.iter_any(), response.status, call), response, call)
        call.model = str(name)
        is_chat = served.task is not None or served.facts.placement in CHAT_PLACEMENTS
        if call.path != (right := CHAT if is_chat else COMPLETIONS):
            raise GatewayError(400, f"{name!r} answers at {right}, got {call.path}")
        given = body.pop("messages" if is_chat else "prompt", None)
        options = {key: value for key, value in body.items() if key not in {*_OF_STREAMS, "instance_text"}}
        if "extra_body" in options:
            raise GatewayError(400, "a request has no extra_body: give what is in it beside the others")
        check_options(options)
        for key, kind in (("stream", bool), ("stream_options", dict), ("instance_text", str)):
            if not isinstance(body.get(key), kind | None):
                raise GatewayError(400, f"{key} must be of type {kind.__name__}, got {shown(body[key])}")
        upstream = await self._name(served, call)
        if served.task is not None:
            if others := {key for key, value in body.items() if value is not None} - _OF_LABELS - _OF_STREAMS:
                raise GatewayError(400, f"{name!r} answers with a label, and takes no {', '.join(sorted(others))}")
            made = await self.batcher.make(served, row_of(given))
            return await self._label(call, served, made, {"model": upstream}, body)
        read = instance_of(body.get("instance_text"), call.model, served.instance_column)
        made = await self.batcher.make(served, chat_of(given) if is_chat else text_of(given), read)
        options["model"] = upstream
        if body.get("stream"):
            return await self._streamed(call, made, options, body)
        answer, headers = await self._answer(call, made, options)
        return answer_of({**answer, "model": call.model}, headers)

    async def _answer(
        self, call: Call, made: ServedRequest, options: Mapping[str, Any]
    ) -> tuple[Fields, Mapping[str, str]]:
        """A checked answer that is not streamed, and its headers."""
        async with await self._ask(call, made, options) as response:
            answer = await read_json(response)
            made.check_usage(answer.usage)
            return answer, kept_headers(response.headers, "content-type")

    async def _streamed(
        self, call: Call, made: ServedRequest, options: Mapping[str, Any], body: Mapping[str, Any]
    ) -> Response:
        shows, streamed = stream_options(body)
        response = await self._ask(call, made, {**options, **streamed})
        try:
            pieces = checked(response.content, Usage(made, shows), call.model)
            first = await anext(pieces)  # a prompt that was dropped is an error, and no answer with an error in it
        except BaseException:
            response.close()
            raise

        async def every() -> AsyncIterator[bytes]:
            yield first
            async for piece in pieces:
                yield piece

        return Stream(self._guarded(every(), response.status, call), response, call)

    async def _label(
        self, call: Call, served: ServedPrompter, made: ServedRequest, model: Mapping[str, str], body: Mapping[str, Any]
    ) -> Response:
        """A label as the answer of a chat, with all labels' probabilities beside it."""
        labelling = Labelling(served.words, made.path)
        try:
            for options in labelling:
                extra = options.pop("extra_body")
                answer, headers = await self._answer(call, made, {**options, **extra, **model})
                with of_the_api():
                    labelling.add(answer)
            with of_the_api():
                record = labelling.record()
        except PromptDroppedError:
            raise
        except LoPAError as error:
            raise GatewayError(502, str(error)) from error
        common = {key: answer.get(key) for key in ("id", "created")} | {"model": call.model}
        common["probabilities"] = record["probabilities"]
        choice, message = {"index": 0, "finish_reason": "stop"}, {"role": "assistant", "content": record["label"]}
        if not body.get("stream"):
            found = {**common, "object": "chat.completion", "choices": [{**choice, "message": message}]}
            return answer_of({**found, "usage": answer["usage"]}, headers)
        chunk = {**common, "object": "chat.completion.chunk", "choices": [{**choice, "delta": message}]}
        shows, _ = stream_options(body)
        chunks = [chunk, {**chunk, "choices": [], "usage": answer["usage"]}] if shows else [chunk]
        said = b"".join(event(json.dumps(each).encode()) for each in chunks) + event(b"[DONE]")
        return Response(said, headers=headers, media_type="text/event-stream")

    # To and from the server

    async def _ask(self, call: Call, made: ServedRequest, options: Mapping[str, Any]) -> aiohttp.ClientResponse:
        """Sends a request with its soft prompt; what is no answer goes to the client as it is."""
        data = json.dumps({**options, **made.body}).encode()
        call.headers["content-type"] = "application/json"
        response = await self._send("POST", f"/v1/{made.path}", call, data)
        if response.status == 200:
            return response
        if response.status == 404:  # it may have another model than before
            self._names.clear()
        async with response:
            raise PassedError(await passed(response))

    async def _send(self, method: str, path: str, call: Call, data: bytes | None = None) -> aiohttp.ClientResponse:
        """Sends a request, and again where the server was not there or too busy, and after nothing else."""
        for attempt in itertools.count():
            try:
                response = await self._session.request(
                    method, f"{self.upstream}{path}", data=data, headers=call.headers, allow_redirects=False
                )
            except aiohttp.ClientConnectorError:
                if attempt >= self.max_retries:
                    raise
                wait = busy_wait({}, attempt)
            else:
                if response.status not in BUSY or attempt >= self.max_retries:
                    return response
                wait = busy_wait(response.headers, attempt)
                response.release()
            self.metrics.retries.inc()
            await asyncio.sleep(wait)
        raise AssertionError

    async def _guarded(self, pieces: AsyncIterator[bytes], status: int, call: Call) -> AsyncIterator[bytes]:
        """A stream whose last event is what went wrong, if something did."""
        try:
            async for piece in pieces:
                call.first_byte()
                yield piece
        except Exception as error:  # the answer has begun
            told = call.told(error, self.upstream)
            status = told.status
            yield event(bytes(refusal(told, call.id).body))
        call.end(status)

    # Of the gateway itself

    async def _health(self, request: Request) -> Response:
        said, status = "reachable", 200
        try:
            timeout = aiohttp.ClientTimeout(total=5)
            async with self._session.get(f"{self.upstream}/health", timeout=timeout) as response:
                if response.status >= 500:
                    said, status = f"status {response.status}", 503
        except (aiohttp.ClientError, TimeoutError, asyncio.TimeoutError) as error:
            said, status = one_line(error), 503
        return JSONResponse({"status": "ok", "upstream": said, "models": list(self.bundles)}, status)

    async def _metrics(self, request: Request) -> Response:
        return Response(generate_latest(self.metrics.registry), media_type="text/plain; version=0.0.4")

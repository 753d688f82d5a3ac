"""What the gateway makes of HTTP: bodies, headers, errors, events of a stream, and the record of each request."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

import aiohttp
from multidict import CIMultiDict
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from lopa_lightning.errors import LoPAError, one_line, shown
from lopa_lightning.serving.batching import Batcher, BusyError, KeptVectors
from lopa_lightning.serving.requests import PromptDroppedError
from lopa_lightning.serving.streams import Usage

LOG = logging.getLogger("lopa.serve")
PLAIN = "(plain)"  # a model that is no bundle; by its own name, clients could make metrics without end
_ONE_HOP = {"connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te"}
_ONE_HOP |= {"trailer", "transfer-encoding", "upgrade", "expect", "host", "content-length", "x-request-id"}
_ONE_HOP |= {"accept-encoding", "content-encoding", "date", "server"}


class GatewayError(Exception):
    """What a client is told in place of an answer.

    Args:
        status: Of HTTP.
        message: One line.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class PassedError(Exception):
    """What the server says in place of an answer; the client gets it as it is."""

    def __init__(self, response: Response) -> None:
        super().__init__(f"the server says {response.status_code}")
        self.response = response


class Fields(dict[str, Any]):
    """A JSON object whose values are attributes too, as the ``openai`` package has them; None where there is none."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value


class Metrics:
    """Counts for Prometheus.

    Args:
        kept: Vectors of the gateway.
        batcher: Of the gateway.
    """

    def __init__(self, kept: KeptVectors, batcher: Batcher) -> None:
        self.registry = found = CollectorRegistry()
        ProcessCollector(registry=found)
        self.requests = Counter("lopa_requests", "Requests that have ended", ["model", "status"], registry=found)
        seconds = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, float("inf"))
        timed: dict[str, Any] = {"labelnames": ["model"], "registry": found, "buckets": seconds}
        self.seconds = Histogram("lopa_request_seconds", "Until the last byte", **timed)
        self.first = Histogram("lopa_first_byte_seconds", "Until the first byte of an answer", **timed)
        self.running = Gauge("lopa_running", "Requests at hand", registry=found)
        self.dropped = Counter("lopa_prompts_dropped", "Answers without their soft prompt", registry=found)
        self.retries = Counter("lopa_retries", "Requests sent again", registry=found)
        for name, what, value in (
            ("lopa_encoder_waiting", "Texts that wait for an encoder", lambda: len(batcher)),
            ("lopa_encoder_batches", "Batches of texts so far", lambda: batcher.batches),
            ("lopa_vector_hits", "Instance vectors that were kept, so far", lambda: kept.hits),
            ("lopa_vector_misses", "Instance vectors that were not, so far", lambda: kept.misses),
            ("lopa_vector_bytes", "Of instance vectors that are kept", lambda: kept.bytes),
        ):
            Gauge(name, what, registry=found).set_function(value)


class Call:
    """A request: its id, what is sent on of its headers, its line in the log and its part in the metrics."""

    def __init__(self, request: Request, metrics: Metrics) -> None:
        given = request.headers.get("x-request-id", "")
        self.id = given if re.fullmatch(r"[\x21-\x7e]{1,128}", given) else uuid.uuid4().hex
        self.path, self.model, self.error = str(request.scope["path"]), PLAIN, ""
        # Not of request.url, which some versions of Starlette make of the Host header as it came.
        self.target = f"{self.path}?{request.scope['query_string'].decode('latin-1')}".rstrip("?")
        self.headers = kept_headers(request.headers)
        self.headers.update({"x-request-id": self.id, "accept-encoding": "identity"})
        self._metrics, self._start, self._has_begun, self._has_ended = metrics, time.perf_counter(), False, False
        metrics.running.inc()

    def first_byte(self) -> None:
        """Notes that the answer begins."""
        if not self._has_begun:
            self._has_begun = True
            self._metrics.first.labels(self.model).observe(time.perf_counter() - self._start)

    def end(self, status: int) -> None:
        """Notes that the request has ended; 499 where its client has gone."""
        if self._has_ended:
            return
        self._has_ended = True
        if status == 200:
            self.first_byte()
        seconds = time.perf_counter() - self._start
        self._metrics.running.dec()
        self._metrics.requests.labels(self.model, status).inc()
        self._metrics.seconds.labels(self.model).observe(seconds)
        said = f" error={shown(self.error)}" if self.error else ""
        path = quote(self.path)  # no control characters
        LOG.info("id=%s path=%s model=%s status=%d ms=%.0f%s", self.id, path, self.model, status, seconds * 1e3, said)

    def told(self, error: Exception, upstream: str) -> GatewayError:
        """Returns what the client is told of an error."""
        said = one_line(error)
        found = GatewayError(500, "the gateway has failed; its log says more")
        if isinstance(error, GatewayError):
            found = error
        elif isinstance(error, PromptDroppedError):
            self._metrics.dropped.inc()
            found = GatewayError(502, str(error))
        elif isinstance(error, LoPAError):
            found = GatewayError(400, str(error))
        elif isinstance(error, BusyError):
            found = GatewayError(503, said)
        elif isinstance(error, ClientDisconnect):
            found = GatewayError(499, "the client has gone")
        elif isinstance(error, (TimeoutError, asyncio.TimeoutError)):
            found = GatewayError(504, f"the server {upstream} does not answer in time: {said}")
        elif isinstance(error, aiohttp.ClientConnectorError):
            found = GatewayError(503, f"no server at {upstream}: {said}")
        elif isinstance(error, aiohttp.ClientError):
            found = GatewayError(502, f"the server {upstream} broke off: {said}")
        else:
            LOG.exception("id=%s", self.id, exc_info=error)
        self.error = str(found)
        return found


class Stream(StreamingResponse):
    """An answer in pieces; the server's is closed when the client has gone."""

    def __init__(self, pieces: AsyncIterator[bytes], response: aiohttp.ClientResponse, call: Call) -> None:
        super().__init__(pieces, response.status, kept_headers(response.headers))
        self._response, self._call = response, call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._response.close()
            self._call.end(499)  # if it has not ended before


def kept_headers(headers: Mapping[str, str], *others: str) -> CIMultiDict[str]:
    """Returns headers to send on, each as often as it came: not those between two machines, of packing, or others."""
    pairs = list(headers.items())
    named = ",".join(value for name, value in pairs if name.lower() == "connection").lower().split(",")
    left_out = _ONE_HOP | {*others} | {name.strip() for name in named}
    return CIMultiDict((name, value) for name, value in pairs if name.lower() not in left_out)


async def passed(response: aiohttp.ClientResponse) -> Response:
    """Returns what the server says, as it is."""
    return Response(await response.read(), response.status, kept_headers(response.headers))


@contextmanager
def of_the_api() -> Iterator[None]:
    """Reads what a server says.

    Raises:
        GatewayError: If it is not what the OpenAI API has there.
    """
    try:
        yield
    except (GatewayError, LoPAError):
        raise
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        raise GatewayError(502, f"the server's answer is none of the OpenAI API: {one_line(error)}") from error


async def read_json(response: aiohttp.ClientResponse) -> Fields:
    """Returns the server's JSON; see :func:`of_server`."""
    return of_server(await response.read())


def of_server(raw: bytes) -> Fields:
    """Returns the JSON of a server's answer, or of a part of it.

    Raises:
        GatewayError: If it is no object.
    """
    with of_the_api():
        found = json.loads(raw, object_hook=Fields, parse_constant=no_number)
    if not isinstance(found, Fields):
        raise GatewayError(502, "the server's answer is no JSON object")
    return found


def no_number(name: str) -> None:
    """Refuses what Python's JSON takes for a number, and JSON does not.

    Raises:
        ValueError: Always.
    """
    raise ValueError(f"{name} is no number of JSON")


def answer_of(content: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> JSONResponse:
    """Returns an answer that is made of a server's.

    Raises:
        GatewayError: If the server's cannot be sent on, such as half a character.
    """
    with of_the_api():
        return JSONResponse(content, headers=headers)


def refusal(error: GatewayError, request_id: str) -> JSONResponse:
    """Returns an error in the shape of the OpenAI API."""
    kind = "invalid_request_error" if error.status < 500 else "api_error"
    said = {"message": str(error), "type": kind, "param": None, "code": error.status, "request_id": request_id}
    return JSONResponse({"error": said}, error.status, {"x-request-id": request_id})


def event(data: bytes) -> bytes:
    """Returns an event of a stream."""
    return b"data: " + data + b"\n\n"


async def checked(content: aiohttp.StreamReader, seen: Usage, model: str) -> AsyncIterator[bytes]:
    """Yields the events of a server's stream as the client asked for them, under the name of its model.

    Raises:
        PromptDroppedError: If the server read another number of tokens than it was sent.
    """
    async for line in _lines(content):
        data = line.removeprefix(b"data:").strip()
        if data == b"[DONE]":
            seen.check_end()  # before clients stop reading
        if data == line or data == b"[DONE]":  # a comment, or the end
            yield line + b"\n\n"
            continue
        chunk = of_server(data)
        if "error" in chunk:
            yield event(data)
            return
        with of_the_api():
            is_shown, told = seen.shows(chunk), json.dumps({**chunk, "model": model}).encode()
        if is_shown:
            yield event(told)
    seen.check_end()


async def _lines(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    rest = b""
    async for piece in content.iter_any():
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line := line.strip():
                yield line
    if rest := rest.strip():
        yield rest


async def while_connected(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """Waits for an answer, and ends the work on it when the client goes.

    Raises:
        ClientDisconnect: If it has gone.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass

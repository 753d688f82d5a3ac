"""The gateway between the real ``openai`` client and a server of the standard library that answers as vLLM does."""

from __future__ import annotations

import asyncio
import http.client
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import openai
import pytest
import torch
import uvicorn
from starlette.requests import Request
from transformers import AutoTokenizer

from lopa_lightning import ServedPrompter
from lopa_lightning.cli import main
from lopa_lightning.errors import LoPAError
from lopa_lightning.serving.batching import Batcher, KeptVectors
from lopa_lightning.serving.gateway import Gateway
from lopa_lightning.serving.gateway_calls import Call, Metrics
from lopa_lightning.serving.serve import load
from tests.serving.test_client import made as made_here
from tests.serving.upstream import Upstream, _Handler, decoded, prompts_in
from tests.tiny import WIDTH

made = made_here  # a fixture

Tiny = Callable[[str], str]
KINDS = {
    "support": "chat system",
    "notes": "chat user",
    "reviews": "chat words",
    "code": "completion",
    "grades": "words",
}


class Held(_Handler):
    """Sends a stream in pieces, the later ones when it may."""

    server: Any

    def _reply(self, status: int, text: str, kind: str = "application/json") -> None:
        if kind != "text/event-stream":
            time.sleep(self.server.seconds)
            super()._reply(status, text, kind)
            return
        self.send_response(status)
        self.send_header("Content-Type", kind)
        for name, value in self.server.sets:
            self.send_header(name, value)
        self.end_headers()
        for number, piece in enumerate(text.split("\n\n")[:-1]):
            if number and not self.server.goes_on.wait(10):
                raise AssertionError
            try:
                self.wfile.write(f"{piece}\n\n".encode())
                time.sleep(0.02)
            except OSError:
                self.server.ended.set()
                return


@contextmanager
def fake(tokenizer: Any, port: int = 0) -> Iterator[Any]:
    server: Any = Upstream(tokenizer)
    if port:
        server.server_close()
        server.socket = socket.create_server(("127.0.0.1", port))
        server.server_address = server.socket.getsockname()
        server.server_port = port
    server.RequestHandlerClass, server.seconds = Held, 0.0
    server.goes_on, server.ended = threading.Event(), threading.Event()
    server.goes_on.set()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@contextmanager
def running(gateway: Gateway) -> Iterator[Any]:
    config = uvicorn.Config(gateway.app(), log_config=None, access_log=False, timeout_graceful_shutdown=20)
    server: Any = uvicorn.Server(config)
    listener = socket.create_server(("127.0.0.1", 0))
    server.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server
    server.should_exit = True
    thread.join(20)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def tokenizer(tiny: Tiny) -> Any:
    return AutoTokenizer.from_pretrained(tiny("chat"))


@pytest.fixture(scope="module")
def served(made: Any) -> tuple[dict[str, ServedPrompter], KeptVectors]:
    kept = KeptVectors(2**20)
    return load({name: made(kind)[1] for name, kind in KINDS.items()}, kept), kept


@pytest.fixture
def upstream(tokenizer: Any) -> Iterator[Any]:
    with fake(tokenizer) as server:
        yield server


@pytest.fixture
def gateway(served: Any, upstream: Any) -> Iterator[Any]:
    with running(Gateway(upstream.url, *served, max_body_bytes=20_000)) as server:
        yield server


@pytest.fixture
def client(gateway: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="the key", max_retries=0) as found:
        yield found


def asked(text: str) -> Any:
    return [{"role": "user", "content": text}]


def metric(gateway: Any, name: str) -> float:
    host = gateway.url.removeprefix("http://")
    connection = http.client.HTTPConnection(host)
    connection.request("GET", "/metrics")
    found = re.search(rf"^{re.escape(name)} (\S+)$", connection.getresponse().read().decode(), re.MULTILINE)
    return 0.0 if found is None else float(found[1])


def test_a_bundle_is_a_model_of_an_unchanged_client(made: Any, client: Any, upstream: Any, gateway: Any) -> None:
    text = "the film was great"
    options = {"n": 2, "max_tokens": 4, "response_format": {"type": "json_object"}}
    parts = [{"role": "user", "content": [{"type": "text", "text": text}]}]
    for messages in (asked(text), parts):
        answer = client.chat.completions.create(
            model="support", messages=messages, **options, extra_headers={"X-Request-Id": "mine", "x-team": "a"}
        )
        assert answer.model == "support"
        assert answer._request_id == "mine"
        assert [choice.message.content for choice in answer.choices] == ["ab", "ab"]
        body = upstream.asked[-1]
        assert {key: value for key, value in body.items() if key != "messages"} == {"model": "tiny", **options}
        assert body["messages"][1:] == asked(text)
        (sent,) = prompts_in(body["messages"])
        assert [part["type"] for part in body["messages"][0]["content"]] == ["prompt_embeds"]
        with torch.no_grad():
            model = made("chat system")[0]
            wanted = model._net().soft_prompt(model.input_spec.instance_batch([text], "cpu"))[0][0]
        torch.testing.assert_close(sent, wanted, rtol=0, atol=1e-6)
        sent_on = {name.lower(): value for name, value in upstream.headers[-1]}
        assert (sent_on["authorization"], sent_on["x-request-id"], sent_on["x-team"]) == ("Bearer the key", "mine", "a")
    assert [model.id for model in client.models.list()] == [*KINDS, "lora", "tiny"]
    assert client.models.retrieve("notes").owned_by == "lopa"
    with pytest.raises(openai.NotFoundError, match="no model 'none'"):
        client.models.retrieve("none")
    assert metric(gateway, 'lopa_requests_total{model="support",status="200"}') == 2
    assert metric(gateway, "lopa_running") == 0


def test_what_the_instance_encoder_reads_can_be_given(client: Any, upstream: Any) -> None:
    for extra in ({"instance_text": "the film"}, {}):
        client.chat.completions.create(model="notes", messages=asked("a text"), extra_body=extra)
    client.chat.completions.create(model="notes", messages=asked("the film"))
    given, own, as_given = (prompts_in(body["messages"])[0] for body in upstream.asked)
    torch.testing.assert_close(given, as_given, rtol=0, atol=1e-6)
    assert not torch.allclose(given, own, atol=1e-6)
    assert all("instance_text" not in body for body in upstream.asked)


def test_texts_of_their_own_must_be_given_where_training_had_them(client: Any, served: Any, upstream: Any) -> None:
    served[0]["notes"].instance_column = "topic"
    try:
        with pytest.raises(openai.BadRequestError, match="read texts of their own, 'topic': give such"):
            client.chat.completions.create(model="notes", messages=asked("a text"))
        assert upstream.asked == []
        client.chat.completions.create(model="notes", messages=asked("a text"), extra_body={"instance_text": "b"})
    finally:
        served[0]["notes"].instance_column = None


def test_a_host_header_changes_no_path(gateway: Any, upstream: Any) -> None:
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"a=1", "server": None}
    for host in (b"x/v1/load_lora_adapter?", b"x/sleep?level=2&y=", b"["):
        call = Call(Request({**scope, "headers": [(b"host", host)]}), Metrics(KeptVectors(1), Batcher()))
        assert (call.path, call.target) == ("/v1/completions", "/v1/completions?a=1")


def test_a_stream_comes_as_it_is_made(client: Any, upstream: Any) -> None:
    upstream.goes_on.clear()
    stream = client.chat.completions.create(model="support", messages=asked("the film"), stream=True)
    assert next(stream).choices[0].delta.content == "a"  # while the server waits
    upstream.goes_on.set()
    (last,) = stream
    assert (last.choices[0].delta.content, last.usage, last.model) == ("b", None, "support")
    options: Any = {"model": "support", "messages": asked("the film"), "stream_options": {"include_usage": True}}
    *_, last = client.chat.completions.create(**options, stream=True)
    assert last.choices == []
    assert last.usage.prompt_tokens == upstream.read(upstream.asked[-1])


def test_a_bundle_before_the_text_completes_texts(made: Any, client: Any, upstream: Any) -> None:
    answer = client.completions.create(model="code", prompt="the film", max_tokens=4)
    assert (answer.choices[0].text, answer.model) == ("ab", "code")
    chunks = client.completions.create(model="code", prompt=["the film"], stream=True)
    assert [chunk.choices[0].text for chunk in chunks] == ["a", "b"]
    model = made("completion")[0]
    with torch.no_grad():
        wanted = model._net().soft_prompt(model.input_spec.instance_batch(["the film"], "cpu"))[0][0]
    for body in upstream.asked:
        assert body["model"] == "tiny"
        assert "prompt" not in body
        torch.testing.assert_close(decoded(body["prompt_embeds"])[:3], wanted, rtol=0, atol=1e-6)
    assert set(upstream.paths) == {"/v1/completions"}
    with pytest.raises(openai.BadRequestError, match="prompt must be one text"):
        client.completions.create(model="code", prompt=["a", "b"])
    with pytest.raises(openai.BadRequestError, match="'code' answers at /v1/completions, got /v1/chat"):
        client.chat.completions.create(model="code", messages=asked("the film"))


@pytest.mark.parametrize(("name", "kind"), [("reviews", "chat words"), ("grades", "words")])
def test_a_label_is_the_answer_of_a_classifier(name: str, kind: str, client: Any, upstream: Any, served: Any) -> None:
    good, bad = served[0][name].words.values()
    upstream.logprobs = {good: -5.0, bad: -4.0, 7: -1.0, 8: -0.5}
    options: Any = {"model": name, "messages": asked("the film"), "temperature": 0}
    answer = client.chat.completions.create(**options)
    assert (answer.choices[0].message.content, answer.model, answer.object) == ("bad", name, "chat.completion")
    odds = torch.tensor([-5.0, -4.0]).softmax(0).tolist()
    assert answer.probabilities == pytest.approx(dict(zip(["good", "bad"], odds)))
    chunk, usage = client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
    assert (chunk.choices[0].delta.content, usage.usage.prompt_tokens) == ("bad", answer.usage.prompt_tokens)
    assert {body.get("messages", [{}])[-1].get("content") for body in upstream.asked} == {
        "the film . It was" if kind == "chat words" else None
    }
    with pytest.raises(openai.BadRequestError, match="answers with a label, and takes no n"):
        client.chat.completions.create(**options, n=2)
    with pytest.raises(openai.BadRequestError, match="one message of the user"):
        client.chat.completions.create(**{**options, "messages": asked("a") + asked("b")})


def test_bundles_and_plain_requests_are_mixed_and_each_is_right(
    made: Any, client: Any, upstream: Any, served: Any
) -> None:
    upstream.seconds = 0.05
    upstream.logprobs = dict(zip(served[0]["reviews"].words.values(), (-1.0, -2.0)))
    names = [*list(KINDS)[:3], "tiny"]
    texts = [f"the film was {'a story ' * (number % 4)}word{number}" for number in range(12)]

    def ask(number: int) -> Any:
        return client.chat.completions.create(model=names[number % 4], messages=asked(texts[number // 4])).usage

    with ThreadPoolExecutor(16) as pool:
        usages = list(pool.map(ask, range(4 * len(texts))))
    assert len(upstream.asked) == len(usages) == 48
    found = {name: 0 for name in names}
    for body in upstream.asked:
        content = body["messages"][-1]["content"]
        text = content if isinstance(content, str) else content[-1]["text"]
        prompts, row = prompts_in(body["messages"]), text.removesuffix(" . It was")
        name = (
            "tiny"
            if not prompts
            else "notes"
            if len(body["messages"]) == 1
            else "reviews"
            if row != text
            else "support"
        )
        found[name] += 1
        if prompts:
            model = made(KINDS[name])[0]
            with torch.no_grad():
                wanted = model._net().soft_prompt(model.input_spec.instance_batch([row], "cpu"))[0][0]
            torch.testing.assert_close(prompts[0], wanted, rtol=0, atol=1e-5)
        number = 4 * texts.index(row) + names.index(name)
        assert usages[number].prompt_tokens == upstream.read(body)
    assert set(found.values()) == {12}
    encoders = {id(each.prompter.encoder) for each in served[0].values()}
    assert len(encoders) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_dropped_soft_prompt_is_a_502(stream: bool, client: Any, upstream: Any, gateway: Any) -> None:
    upstream.drops = True
    with pytest.raises(openai.InternalServerError, match=r"read \d+ tokens .* the soft prompt was dropped") as error:
        client.chat.completions.create(model="support", messages=asked("the film"), stream=stream)
    assert error.value.status_code == 502
    assert metric(gateway, "lopa_prompts_dropped_total") == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "says", ["{", "[]", '"an error"', '{"usage": []}', "[" * 100_000, '{"usage": 7, "choices": []}', '{"usage": NaN}']
)
def test_what_is_none_of_the_api_is_a_502(says: str, stream: bool, client: Any, upstream: Any) -> None:
    client.chat.completions.create(model="support", messages=asked("the film"))  # it knows the server's name now
    upstream.says = says
    with pytest.raises(openai.InternalServerError, match=r"the server's answer is no|not say how many") as error:
        list(client.chat.completions.create(model="support", messages=asked("the film"), stream=stream))
    assert error.value.status_code == 502


@pytest.mark.parametrize("lists", ["[]", '{"data": 5}', '{"data": [5]}', '{"data": [{}]}'])
def test_models_that_are_none_are_a_502(lists: str, client: Any, upstream: Any) -> None:
    upstream.lists = lists
    with pytest.raises(openai.InternalServerError, match="the server's answer is no") as error:
        client.models.list()
    assert error.value.status_code == 502
    with pytest.raises(openai.InternalServerError, match=r"the server's (answer is no|model has no name)"):
        client.chat.completions.create(model="support", messages=asked("the film"))


def test_a_stream_that_never_says_what_was_read_ends_in_an_error(client: Any, upstream: Any) -> None:
    upstream.says_usage = False
    with pytest.raises(openai.APIError, match="does not say how many tokens"):
        list(client.chat.completions.create(model="support", messages=asked("the film"), stream=True))


def test_a_client_that_goes_ends_the_servers_answer(client: Any, upstream: Any, gateway: Any) -> None:
    upstream.goes_on.clear()
    stream = client.chat.completions.create(model="support", messages=asked("the film"), stream=True)
    next(stream)
    stream.close()
    deadline = time.monotonic() + 5
    while metric(gateway, 'lopa_requests_total{model="support",status="499"}') == 0:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    upstream.goes_on.set()
    assert upstream.ended.wait(5)
    upstream.seconds = 1.0  # and before the first byte
    with pytest.raises(openai.APITimeoutError):
        client.chat.completions.create(model="support", messages=asked("the film"), timeout=0.3)
    while metric(gateway, 'lopa_requests_total{model="support",status="499"}') < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_only_a_busy_server_is_asked_again(client: Any, upstream: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("random.uniform", lambda low, high: 0.0)
    client.chat.completions.create(model="support", messages=asked("the film"))
    for model in ("support", "tiny"):
        for statuses, seen in (([503, 429], 200), ([500], 500), ([503, 503, 503], 503), ([400], 400)):
            upstream.asked, upstream.statuses = [], list(statuses)
            raw = client.chat.completions.with_raw_response
            try:
                status = raw.create(model=model, messages=asked("the film")).http_response.status_code
            except openai.APIStatusError as error:
                status = error.status_code if error.body == {"message": "no"} else 0
            assert (status, len(upstream.asked)) == (seen, len(statuses) + (seen == 200))


def test_a_server_that_was_gone_is_used_again(
    served: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("random.uniform", lambda low, high: 0.0)
    with fake(tokenizer) as server:
        port = server.server_port
    with running(Gateway(f"http://127.0.0.1:{port}/v1/", *served)) as gateway:
        client = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="x", max_retries=0)

        def ask(**options: Any) -> Any:
            return client.chat.completions.create(model="support", messages=asked("the film"), **options)

        def health() -> tuple[int, Any]:
            connection = http.client.HTTPConnection(gateway.url.removeprefix("http://"))
            connection.request("GET", "/health")
            response = connection.getresponse()
            return response.status, json.load(response)

        with (
            caplog.at_level("INFO", "lopa.serve"),
            pytest.raises(openai.InternalServerError, match="no server at") as error,
        ):
            ask()
        assert error.value.status_code == 503
        assert error.value.body["request_id"] == error.value.request_id
        assert f"id={error.value.request_id} path=/v1/chat/completions model=support status=503" in caplog.text
        assert health()[0] == 503
        assert metric(gateway, "lopa_retries_total") == 2
        with fake(tokenizer, port) as server:
            assert ask().choices[0].message.content == "ab"
            assert health() == (200, {"status": "ok", "upstream": "reachable", "models": list(KINDS)})
            server.RequestHandlerClass = type("Broken", (Held,), {"_reply": lambda self, *_: self.connection.close()})
            with pytest.raises(openai.InternalServerError, match="broke off"):
                ask()
            assert len(server.asked) == 2
            server.RequestHandlerClass = Held
            assert len(list(ask(stream=True))) == 2
        client.close()


@pytest.mark.sampled(5)
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"extra_body": {"echo": True}}, "echo=True"),
        ({"frequency_penalty": 0.5}, "frequency_penalty=0.5"),
        ({"extra_body": {"suffix": "x"}}, "suffix"),
        ({"extra_body": {"use_beam_search": True}}, "use_beam_search"),
        ({"extra_body": {"prompt_logprobs": 1}}, "prompt_logprobs=1"),
        ({"extra_body": {"prompt_embeds": "gASV"}}, "prompt_embeds are refused"),
        ({"messages": [{"role": "user", "content": [{"type": "prompt_embeds", "data": "gASV"}]}]}, "are refused"),
        ({"model": "tiny", "messages": [{"role": "user", "content": [{"type": "prompt_embeds"}]}]}, "are refused"),
        ({"model": "tiny", "messages": [{"role": "user", "content": [{"image_embeds": "x"}]}]}, "image_embeds are ref"),
        ({"extra_body": {"instance_text": 1}}, "instance_text must be of type str"),
        ({"messages": [{"role": "user"}]}, "must have a role, and a text"),
        ({"messages": "the film"}, "messages must be a list"),
        ({"messages": asked("a <prompt_embeds> b")}, "must not contain <prompt_embeds>"),
        ({"messages": asked("the film " * 3000)}, "more than 20000 bytes"),
        ({"extra_body": {"stream_options": 1}}, "stream_options must be of type dict"),
        ({"extra_body": {"extra_body": {"instance_text": "x"}}}, "a request has no extra_body"),
        ({"model": "reviews", "extra_body": {"instance_text": "x"}}, "takes no instance_text"),
        ({"messages": [*asked("a"), {"role": "assistant", "content": "b"}]}, "whose last message asks"),
    ],
)
def test_what_cannot_be_right_is_refused_and_not_sent(options: Any, said: str, client: Any, upstream: Any) -> None:
    with pytest.raises(openai.APIStatusError, match=said) as error:
        client.chat.completions.create(**{"model": "support", "messages": asked("the film"), **options})
    assert error.value.status_code == (413 if "bytes" in said else 400)
    assert error.value.type == "invalid_request_error"
    assert upstream.asked == []


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b'{"model": "support", "model": "tiny"}', "has a key twice"),
        (b'{"model": "support", "temperature": NaN}', "NaN is no number of JSON"),
        (b'{"model": ', "not JSON"),
        (b"[" * 10_000, "not JSON"),
        (b"[]", "must be a JSON object"),
        (b'{"model": "support", "messages": [{"role": "user", "content": "\\ud800"}]}', "not Unicode"),
        (
            b'{"model": "notes", "messages": [{"role": "user", "content": "a"}], "instance_text": "\\ud800"}',
            "not Unicode",
        ),
    ],
)
def test_a_body_that_servers_may_read_otherwise_is_refused(raw: bytes, said: str, gateway: Any, upstream: Any) -> None:
    connection = http.client.HTTPConnection(gateway.url.removeprefix("http://"))
    connection.request("POST", "/v1/chat/completions", raw)
    response = connection.getresponse()
    error = json.load(response)["error"]
    assert (response.status, error["request_id"]) == (400, response.headers["x-request-id"])
    assert said in error["message"]
    assert upstream.asked == []


def test_what_is_passed_on_is_listed(client: Any, upstream: Any, gateway: Any) -> None:
    plain: Any = {"model": "tiny", "messages": asked("the film"), "frequency_penalty": 0.5}
    assert client.chat.completions.create(**plain).model == "tiny"
    assert upstream.asked == [plain]
    assert len(list(client.chat.completions.create(**plain, stream=True, stream_options={}))) == 3
    with pytest.raises(openai.BadRequestError, match="'support' answers at /v1/chat/completions, got /v1/completions"):
        client.completions.create(model="support", prompt="the film")
    connection = http.client.HTTPConnection(gateway.url.removeprefix("http://"))
    connection.request("POST", "/v1/load_lora_adapter", "{}")
    response = connection.getresponse()
    assert response.status == 404
    assert "/v1/chat/completions" in json.load(response)["error"]["message"]
    assert len(upstream.asked) == 2


@pytest.mark.parametrize("status", [200, 400])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("model", ["support", "reviews", "tiny"])
def test_headers_that_come_more_than_once_are_all_sent_on(
    model: str, stream: bool, status: int, upstream: Any, gateway: Any, served: Any
) -> None:
    upstream.logprobs = dict.fromkeys(served[0]["reviews"].words.values(), -1.0)
    upstream.sets = [("Set-Cookie", "a=1; Path=/"), ("Set-Cookie", "b=2"), ("X-Hop", "no"), ("Connection", "x-hop")]
    upstream.statuses = [status]
    connection = http.client.HTTPConnection(gateway.url.removeprefix("http://"))
    connection.putrequest("POST", "/v1/chat/completions")
    options = {"stream": True, "stream_options": {}} if stream else {}
    body = json.dumps({"model": model, "messages": asked("the film"), **options}).encode()
    sent = [("Via", "1.1 a"), ("Via", "1.1 b"), ("X-Mine", "1"), ("X-Its", "2")]
    for name, value in [*sent, ("Connection", "X-Mine"), ("Connection", "x-its"), ("Content-Length", str(len(body)))]:
        connection.putheader(name, value)
    connection.endheaders(body)
    response = connection.getresponse()
    response.read()
    assert response.status == status
    assert response.headers.get_all("set-cookie") == ["a=1; Path=/", "b=2"]
    assert response.headers["x-hop"] is None
    assert len(response.headers.get_all("content-type")) == 1
    got = [(name.lower(), value) for name, value in upstream.headers[-1]]
    assert [value for name, value in got if name == "via"] == ["1.1 a", "1.1 b"]
    assert {name for name, _ in got}.isdisjoint({"x-mine", "x-its"})
    assert len({name for name, _ in got}) == len(got) - 1


def test_a_shutdown_finishes_what_runs(served: Any, upstream: Any) -> None:
    upstream.goes_on.clear()
    with running(Gateway(upstream.url, *served)) as gateway:
        client = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="x", max_retries=0)
        stream = client.chat.completions.create(model="support", messages=asked("the film"), stream=True)
        assert next(stream).choices[0].delta.content == "a"
        gateway.should_exit = True
        time.sleep(0.3)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", int(gateway.url.rpartition(":")[2])))
        upstream.goes_on.set()
        assert [chunk.choices[0].delta.content for chunk in stream] == ["b"]
        client.close()


def test_vectors_are_kept_and_waiting_texts_made_together(made: Any) -> None:
    kept = KeptVectors(0)
    (served,) = load({"a": made("chat system")[1]}, kept).values()
    sizes, batcher = [], Batcher()
    forward = served.prompter.encoder.forward

    def counted(batch: Any) -> Any:
        sizes.append(len(batch["instance_input_ids"]))
        return forward(batch)

    served.prompter.encoder.forward = counted
    good = [asked(f"the film word{number}") for number in range(8)]

    async def ask(chats: list[Any]) -> list[Any]:
        return await asyncio.gather(*(batcher.make(served, chat) for chat in chats), return_exceptions=True)

    first = asyncio.run(ask(good))
    assert sizes == [8]
    assert kept.bytes == 0
    kept.most_bytes = 4 * (WIDTH * 4 + 1000)
    asyncio.run(ask(good))
    sizes.clear()
    again = asyncio.run(ask(good[4:] + good[4:]))
    assert sizes == []
    assert [each.messages for each in again] == [each.messages for each in first[4:] * 2]
    mixed = asyncio.run(ask([good[0], asked("a <prompt_embeds>"), good[1]]))
    assert isinstance(mixed[1], LoPAError)
    for found, wanted in ((mixed[0], first[0]), (mixed[2], first[1])):
        (one,), (other,) = prompts_in(found.messages), prompts_in(wanted.messages)
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    assert kept.bytes <= kept.most_bytes
    batcher.close()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--upstream", "host:8000", "--bundle", "a=OUT"], "--upstream must be an address such as http"),
        (["--upstream", "http://h", "--bundle", "OUT"], "--bundle must be NAME=BUNDLE"),
        (["--upstream", "http://h", "--bundle", "a=OUT", "--bundle", "a=OUT"], "each name once"),
        (["--upstream", "http://h", "--bundle", "a=/nowhere"], "no bundle found for '/nowhere'"),
        (["--upstream", "http://h", "--bundle", f"a={__file__}"], "is a file, and a bundle is a folder"),
        (
            ["--upstream", "http://h", "--bundle", "a=OUT", "--port", "99999"],
            "--port must be from 0 to 65535, got 99999",
        ),
        (["--upstream", "http://h", "--bundle", "a=OUT", "--device", "none"], "device 'none' cannot be used: "),
        (["--upstream", "http://h", "--bundle", "a=OUT", "--timeout", "-1"], "timeout must be at least 1, got -1.0"),
        (["--upstream", "http://h", "--bundle", "a=OUT", "--timeout", "nan"], "timeout must be at least 1, got nan"),
        (["--upstream", "http://h", "--bundle", "a=OUT", "--host", "192.0.2.1"], "cannot listen at 192.0.2.1:8080"),
    ],
)
def test_a_command_line_that_cannot_be_right_is_refused(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["serve", *arguments])
    assert said in capsys.readouterr().err

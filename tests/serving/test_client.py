"""The clients: what they send and what they make of answers, against a server of the standard library."""

from __future__ import annotations

import asyncio
import gc
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from transformers import AutoTokenizer

from lopa_lightning import AsyncLoPAClient, Bundle, LoPAClient, ServedPrompter, build_messages, serving
from lopa_lightning.errors import LoPAError
from lopa_lightning.modules.predict import row_encoder
from lopa_lightning.serving.export import export_bundle
from lopa_lightning.serving.labels import MOST_WORDS, Labelling
from lopa_lightning.serving.requests import PromptDroppedError, encoded_tensor
from tests.serving import upstream as upstream_file
from tests.serving.helpers import checkpoint
from tests.serving.upstream import M, Upstream, decoded, prompts_in, running
from tests.tiny import WIDTH

Tiny = Callable[[str], str]
PLACES = {"system": "<|system|>{z}<|user|>{text}<|assistant|>", "user": "<|user|>{z}\n{text}<|assistant|>"}


@pytest.fixture(scope="module")
def made(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Any, Bundle]]:
    """Bundles that are placed in a chat, with their modules, each trained once."""
    found: dict[str, tuple[Any, Bundle]] = {}

    def make(kind: str) -> tuple[Any, Bundle]:
        if kind not in found:
            model, path = checkpoint(kind, tmp_path_factory.mktemp("made") / "run", tiny, tiny("chat"))
            found[kind] = model, export_bundle(path, ["the film was"])
        return found[kind]

    return make


@pytest.fixture
def upstream(tiny: Tiny) -> Iterator[Upstream]:
    with running(Upstream(AutoTokenizer.from_pretrained(tiny("chat")))) as server:
        yield server


def asynchronous(client: AsyncLoPAClient, method: str, *args: Any, **options: Any) -> Any:
    async def run() -> Any:
        found = await getattr(client, method)(*args, **options)
        found = [chunk async for chunk in found] if options.get("stream") else found
        await client.close()
        return found

    return asyncio.run(run())


def called(kind: str, upstream: Upstream, source: Any, method: str, *args: Any, **options: Any) -> Any:
    """Calls a method of either client: what one does, the other does."""
    settings = {"max_retries": options.pop("max_retries", 3), "api_key": options.pop("api_key", None)}
    if kind == "async":
        return asynchronous(AsyncLoPAClient(upstream.url, source, **settings), method, *args, **options)
    client = LoPAClient(f"{upstream.url}/v1/", source, **settings)
    found = getattr(client, method)(*args, **options)
    found = list(found) if options.get("stream") else found
    client.close()
    return found


BOTH = pytest.mark.parametrize("kind", ["sync", "async"])


@pytest.mark.sampled(2)
@BOTH
@pytest.mark.parametrize("placement", ["system", "user"])
def test_a_chat_is_sent_with_the_modules_soft_prompt(
    kind: str, placement: str, made: Any, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "of OpenAI")
    model, bundle = made(f"chat {placement}")
    text = "the film was great"
    answer = called(kind, upstream, bundle, "chat", text, n=2, max_tokens=4, response_format={"type": "json_object"})
    assert isinstance(answer, openai.types.chat.ChatCompletion)
    assert [choice.message.content for choice in answer.choices] == ["ab", "ab"]
    (body,) = upstream.asked
    others = {key: value for key, value in body.items() if key != "messages"}
    assert others == {"model": "tiny", "n": 2, "max_tokens": 4, "response_format": {"type": "json_object"}}
    (sent,) = prompts_in(body["messages"])
    with torch.no_grad():
        wanted = model._net().soft_prompt(model.input_spec.instance_batch([text], "cpu"))[0][0]
    torch.testing.assert_close(sent, wanted, rtol=0, atol=1e-6)
    part = next(part for part in body["messages"][0]["content"] if "data" in part)
    layout = {
        "system": [{"role": "system", "content": [part]}, {"role": "user", "content": text}],
        "user": [{"role": "user", "content": [part, {"type": "text", "text": text}]}],
    }
    assert body["messages"] == layout[placement]
    pieces = PLACES[placement].format(z="\0", text=text).split("\0")
    own = sum(len(upstream.tokenizer(piece)["input_ids"]) for piece in pieces)
    assert answer.usage.prompt_tokens == M + own
    assert "of OpenAI" not in str(upstream.headers)
    assert build_messages(ServedPrompter(bundle), text) == body["messages"]


@BOTH
def test_a_stream_shows_what_was_asked_for(kind: str, made: Any, upstream: Upstream) -> None:
    source = ServedPrompter(made("chat system")[1])
    chunks = called(kind, upstream, source, "chat", "the film", stream=True)
    assert [chunk.choices[0].delta.content for chunk in chunks] == ["a", "b"]
    assert {chunk.usage for chunk in chunks} == {None}
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *_, last = called(kind, upstream, source, "chat", "the film", **options)
    assert last.choices == []
    assert last.usage.prompt_tokens == upstream.read(upstream.asked[-1])


@pytest.mark.sampled(2)
@BOTH
@pytest.mark.parametrize("says", ["at the end", "never"])
def test_a_stream_is_not_left_unchecked_in_silence(kind: str, says: str, made: Any, upstream: Upstream) -> None:
    source = ServedPrompter(made("chat system")[1])
    upstream.late_usage, upstream.says_usage = True, says == "at the end"
    if says == "never":
        with pytest.raises(PromptDroppedError, match="does not say how many tokens"):
            called(kind, upstream, source, "chat", "the film", stream=True)
    else:
        called(kind, upstream, source, "chat", "the film", stream=True)

    async def left() -> None:
        async with await AsyncLoPAClient(upstream.url, source).chat("the film", stream=True) as stream:
            await stream.__anext__()

    def dropped() -> None:
        next(LoPAClient(upstream.url, source).chat("the film", stream=True))
        gc.collect()

    with pytest.warns(UserWarning, match="closed before the server said how many tokens") as warned:
        asyncio.run(left()) if kind == "async" else dropped()
    assert len([each for each in warned if "closed before" in str(each.message)]) == 1


@pytest.mark.parametrize(("number", "trained"), [(0, "chat system"), (1, "completion")])
def test_the_examples_of_the_readme_run_word_for_word(
    number: int,
    trained: str,
    made: Any,
    upstream: Upstream,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made(trained)[1].save_pretrained(tmp_path / "OUT")
    monkeypatch.chdir(tmp_path)
    for name in ("http_proxy", "HTTP_PROXY"):  # which leads localhost:8000 here
        monkeypatch.setenv(name, upstream.url)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    text = (Path(serving.__file__).parent / "README.md").read_text(encoding="utf-8")
    code = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "LoPAClient" in block][number]
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    assert set(capsys.readouterr().out.split()) == {"ab"}
    assert {path.partition("/v1/")[0] for path in upstream.paths} == {"http://localhost:8000"}


@BOTH
@pytest.mark.parametrize("stream", [False, True])
def test_a_dropped_soft_prompt_is_an_error(kind: str, stream: bool, made: Any, upstream: Upstream) -> None:
    upstream.drops = True
    with pytest.raises(PromptDroppedError, match=r"read \d+ tokens .* expected \d+: 3 virtual .* prompt was dropped"):
        called(kind, upstream, made("chat system")[1], "chat", "the film", stream=stream)


@BOTH
def test_only_a_busy_server_is_asked_again(
    kind: str, made: Any, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("random.uniform", lambda low, high: 0.0)
    source = ServedPrompter(made("chat system")[1])
    upstream.statuses = [503, 429]
    called(kind, upstream, source, "chat", "the film")
    assert len(upstream.asked) == 3
    upstream.statuses = [503, 503]
    with pytest.raises(openai.InternalServerError):
        called(kind, upstream, source, "chat", "the film", max_retries=1)
    assert len(upstream.asked) == 5
    for status in (500, 400):
        upstream.asked, upstream.statuses = [], [status]
        with pytest.raises(openai.APIStatusError):
            called(kind, upstream, source, "chat", "the film")
        assert len(upstream.asked) == 1
    upstream.asked, upstream.statuses = [], [413]
    with pytest.raises(LoPAError, match=r"no request of \d\d\d+ bytes \(413\).* client_max_body_size \(1 MiB"):
        called(kind, upstream, source, "chat", "the film")
    assert len(upstream.asked) == 1


def test_a_connection_that_is_not_accepted_is_tried_again_and_a_broken_one_is_not(
    made: Any, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    source = ServedPrompter(made("chat system")[1])
    client = LoPAClient("http://127.0.0.1:9", source, model="tiny", max_retries=2)
    with pytest.raises(openai.APIConnectionError):
        client.chat("the film")
    assert len(waits) == 2
    monkeypatch.setattr(upstream_file._Handler, "_reply", lambda self, *_: self.connection.close())
    client = LoPAClient(upstream.url, source, model="tiny")
    with pytest.raises(openai.APIConnectionError):
        client.chat("the film")
    assert (len(waits), len(upstream.asked)) == (2, 1)


@pytest.mark.sampled(2)
@BOTH
@pytest.mark.parametrize("knows_ids", [True, False])
def test_labels_are_those_of_their_words(kind: str, knows_ids: bool, made: Any, upstream: Upstream) -> None:
    model, bundle = made("chat words")
    good, bad = bundle.config.answer["word_ids"]
    upstream.knows_ids, upstream.logprobs = knows_ids, {good: -5.0, bad: -4.0, 7: -1.0, 8: -0.5}
    long = "the film was a long story " * 20
    with pytest.warns(UserWarning, match="1 of 2 texts were cut"):
        records = called(kind, upstream, bundle, "classify", ["the film <|endoftext|>", long])
    odds = 1 / (1 + math.exp(-1.0))
    for record in records:
        assert record["label"] == "bad"
        assert record["probabilities"] == pytest.approx({"good": 1 - odds, "bad": odds})
    asked = {json.dumps([body["messages"][-1]["content"], body["allowed_token_ids"]]) for body in upstream.asked}
    texts = {body["messages"][-1]["content"] for body in upstream.asked}
    assert "the film < |endoftext|> . It was" in texts
    assert all(text.endswith(" . It was") and len(text) < len(long) for text in texts)
    assert len(asked) == (2 if knows_ids else 4)
    encoder, rows = row_encoder(model, ["the film <|endoftext|>", long])
    lengths = {upstream.read(body) - M for body in upstream.asked}
    assert lengths == set(encoder(rows, [0, 1])["length"])


def test_many_labels_take_several_requests_and_must_be_comparable() -> None:
    words = {str(label): 100 + label for label in range(MOST_WORDS + 2)}

    def labelled(shift: float) -> dict[str, Any]:
        labelling, sizes = Labelling(words), []
        for options in labelling:
            group = options["extra_body"]["logprob_token_ids"]
            sizes.append(len(group))
            top = [_named(word, -float(word - 100) - shift) for word in group]
            first = _Fake(content=[_Fake(top_logprobs=top, **vars(top[0]))])
            labelling.add(_Fake(choices=[_Fake(logprobs=first)]))
        assert sizes == [MOST_WORDS, 2]
        return labelling.record()

    record = labelled(1.0)
    wanted = torch.tensor([-float(label) for label in range(len(words))]).softmax(0)
    assert list(record["probabilities"].values()) == pytest.approx(wanted.tolist())
    with pytest.raises(LoPAError, match="--logprobs-mode raw_logprobs"):
        labelled(0.0)


class _Fake:
    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)


def _named(word: int, value: float) -> _Fake:
    return _Fake(token=f"token_id:{word}", logprob=value)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"extra_body": {"echo": True}}, "echo=True"),
        ({"extra_body": {"prompt_logprobs": 0}}, "prompt_logprobs=0"),
        ({"frequency_penalty": 0.5}, "frequency_penalty=0.5"),
        ({"extra_body": {"repetition_penalty": 1.1}}, "repetition_penalty"),
        ({"extra_body": {"suffix": "x"}}, "suffix"),
        ({"extra_body": {"use_beam_search": True}}, "use_beam_search"),
        ({"tools": []}, "tools"),
        ({"model": "lora"}, "model='lora'"),
        ({"extra_body": {"stream": True}}, "extra_body must not have stream"),
        ({"extra_body": [1]}, "extra_body must be a mapping"),
        ({"instance_text": "caf\udce9"}, "without half a character; instance text 0 is 'caf"),
        ({"instance_text": ""}, "an instance text must not be empty; instance text 0 is"),
    ],
)
def test_what_does_not_go_with_a_soft_prompt_is_refused(
    options: dict[str, Any], said: str, made: Any, upstream: Upstream
) -> None:
    client = LoPAClient(upstream.url, ServedPrompter(made("chat system")[1]))
    with pytest.raises(LoPAError, match=said):
        client.chat("the film", **options)
    client.chat("the film", presence_penalty=0, extra_body={"repetition_penalty": 1.0, "echo": False})
    with pytest.raises(LoPAError, match="use chat"):
        client.classify("the film")
    with pytest.raises(LoPAError, match="without half a character; text 0 is"):
        client.chat("caf\udce9")
    with pytest.raises(LoPAError, match="chat takes one text or one chat, got 2; use map"):
        client.chat(["the", "film"])
    assert len(upstream.asked) == 1


def test_soft_prompts_are_made_some_at_a_time_and_not_without_a_server(
    made: Any, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    served, sizes = ServedPrompter(made("chat system")[1]), []
    make = served.prompter.forward
    monkeypatch.setattr(served.prompter, "forward", lambda rows: sizes.append(len(rows["text"])) or make(rows))
    texts = [f"the film {number}" for number in range(40)]
    with pytest.raises(openai.APIConnectionError):
        LoPAClient("http://127.0.0.1:9", served, max_retries=0).map(texts)
    with pytest.raises(LoPAError, match="a text to complete must not be empty; text 39"):
        LoPAClient(upstream.url, served).map([*texts[:-1], ""])
    with pytest.raises(LoPAError, match=r"takes \d+ bytes, max_prompt_bytes is 9"):
        LoPAClient(upstream.url, ServedPrompter(served.prompter, max_prompt_bytes=9)).map(texts)
    assert (sizes, upstream.asked) == ([], [])
    answers = LoPAClient(upstream.url, served, max_inflight=1).map(texts)
    assert sizes == [16, 16, 8]
    assert len(answers) == len(upstream.asked) == 40
    for text, body in zip(texts, upstream.asked):
        (found,), (wanted,) = prompts_in(body["messages"]), prompts_in(served.requests(text)[0].messages)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
        assert body["messages"][-1]["content"] == text


def test_a_soft_prompt_is_a_tensor_of_its_own_finite_and_bounded() -> None:
    table = torch.randn(4096, WIDTH)
    data = encoded_tensor(table[:4], torch.bfloat16)
    assert torch.equal(decoded(data), table[:4].bfloat16())
    assert len(data) < 4000
    with pytest.raises(LoPAError, match=r"NaN or infinite in part in torch\.float16"):
        encoded_tensor(torch.full((2, 2), 1e6), torch.float16)
    with pytest.raises(
        LoPAError, match=r"4096 × 32 takes \d+ bytes, max_prompt_bytes is 1000: raise it by .* client_max_body_size"
    ):
        encoded_tensor(table, torch.float32, 1000)


def test_a_bundle_that_no_server_answers_with_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    _, path = checkpoint("head", tmp_path, tiny)
    bundle = export_bundle(path, ["the film"])
    bundle.save_pretrained(tmp_path / "OUT")
    for source in (bundle, tmp_path / "OUT", str(tmp_path / "OUT")):
        with pytest.raises(LoPAError, match="a head reads hidden states"):
            LoPAClient("http://127.0.0.1:9", source)


def test_the_backbones_tokenizer_must_be_there_and_the_bundles_but_not_its_weights(tiny: Tiny, tmp_path: Path) -> None:
    backbone = tmp_path / "backbone"
    shutil.copytree(tiny("chat"), backbone)
    _, path = checkpoint("soft in a chat", tmp_path / "run", tiny, str(backbone))
    bundle = export_bundle(path, ["the film"])
    (backbone / "model.safetensors").unlink()
    assert len(prompts_in(build_messages(bundle, "the film"))) == 1
    template = (backbone / "chat_template.jinja").read_text()
    (backbone / "chat_template.jinja").write_text(template.replace("<|assistant|>", "<|model|>"))
    with pytest.raises(LoPAError, match=r"the chat template of the backbone .* is not the one that the bundle"):
        ServedPrompter(bundle)
    (backbone / "chat_template.jinja").write_text(template)
    config = json.loads((backbone / "config.json").read_text())
    (backbone / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4000}))
    with pytest.raises(LoPAError, match=r"max_position_embeddings.*4000"):
        ServedPrompter(bundle)
    shutil.rmtree(backbone)
    with pytest.raises(LoPAError, match="tokenizer and the config of the backbone"):
        ServedPrompter(bundle)

"""A real vLLM server answers soft prompts token for token as ``generate`` does."""

from __future__ import annotations

import asyncio
import base64
import functools
import io
import json
import math
import os
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lopa_lightning import (
    AsyncLoPAClient,
    Bundle,
    CausalLMModule,
    ClassificationModule,
    InstanceEncoderSpec,
    LoPA,
    LoPAClient,
    PretrainedSpec,
    ServedPrompter,
    TextClassificationDataModule,
)
from lopa_lightning.backbones.chat import PLACEHOLDER, reads_parts
from lopa_lightning.serving import export
from lopa_lightning.serving.doctor import findings
from tests.backbones.chat_templates import TEMPLATES, tokenizer_of
from tests.conftest import REAL_MODELS
from tests.serving.vllm_server import VARIABLE, missing, vllm_server

pytestmark = [pytest.mark.real, pytest.mark.skipif(missing() is not None, reason=str(missing()))]

M, NEW = 10, 24
MODEL, ENCODER = (
    REAL_MODELS / name for name in ("HuggingFaceTB/SmolLM2-135M-Instruct", "sentence-transformers/all-MiniLM-L6-v2")
)
TEXTS = [
    "What is the capital of France?",
    "Write a haiku on rain.",
    "def add(a, b):\n    return",
    " leading space, and a newline at the end\n",
    "Übersetze: Guten Morgen 🙂",
    "Name three colours.",
    "2 + 2 =",
    "Is it safe to eat raw eggs?",
]
CHATS = [
    [{"role": "system", "content": "Answer in one word."}, {"role": "user", "content": "Is snow cold?"}],
    [
        {"role": "user", "content": "My name is Ada."},
        {"role": "assistant", "content": "Hello Ada!"},
        {"role": "user", "content": "What is my name?"},
    ],
]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    if not MODEL.is_dir() or not ENCODER.is_dir():
        pytest.skip(f"no {MODEL} or {ENCODER}")
    with vllm_server(str(MODEL)) as url:
        yield url


def module(placement: str) -> CausalLMModule:
    torch.manual_seed(0)
    encoder = InstanceEncoderSpec(str(ENCODER), pooling="mean")
    method = functools.partial(LoPA, num_virtual_tokens=M, rank=4, hidden_dim=64)
    found = CausalLMModule(
        backbone=PretrainedSpec(str(MODEL), dtype="float32"),
        prompt_encoder=method,
        instance_encoder=encoder,
        placement=placement,
        generation={"max_new_tokens": NEW},
    )
    found.configure_model()
    with torch.no_grad():  # far from the initial values, and another prompt for each text
        for parameter in found._net().prompt_encoder.parameters():
            parameter += 0.3 * parameter.std(correction=0) * torch.randn_like(parameter)
    found.learned = True
    return found.eval()


def soft_prompts(model: Any, texts: list[str]) -> list[Tensor]:
    with torch.no_grad():
        prompts, _ = model._net().soft_prompt(model.input_spec.instance_batch(texts, "cpu"))
    return list(prompts)


def encoded(tensor: Tensor) -> str:
    buffer = io.BytesIO()
    torch.save(tensor.clone(), buffer)
    return base64.b64encode(buffer.getvalue()).decode()


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as response:
        found: dict[str, Any] = json.load(response)
    return found


def messages_of(chat: list[dict[str, Any]], placement: str, prompt: Tensor) -> list[dict[str, Any]]:
    """The chat as a client sends it: written out here, not taken from the package."""
    part = {"type": "prompt_embeds", "data": encoded(prompt)}
    *before, last = chat
    if placement == "user":
        return [*before, {"role": "user", "content": [part, {"type": "text", "text": last["content"]}]}]
    if chat[0]["role"] == "system":
        return [{"role": "system", "content": [{"type": "text", "text": chat[0]["content"]}, part]}, *chat[1:]]
    return [{"role": "system", "content": [part]}, *chat]


@pytest.mark.parametrize("placement", ["system", "user"])
def test_chats_with_a_soft_prompt_are_answered_as_generate_does(server: str, placement: str) -> None:
    model = module(placement)
    chats: list[Any] = [*([{"role": "user", "content": text}] for text in TEXTS), *CHATS]
    prompts = soft_prompts(model, [chat[-1]["content"] for chat in chats])
    greedy = {"model": str(MODEL), "temperature": 0, "max_tokens": NEW}
    bodies = [{**greedy, "messages": messages_of(chat, placement, z)} for chat, z in zip(chats, prompts)]
    with ThreadPoolExecutor(8) as pool:  # in one batch of the server
        answers = list(pool.map(lambda body: post(f"{server}/v1/chat/completions", body), bodies))
    ids, positions = model.input_spec.prompt_ids(chats)
    assert [answer["usage"]["prompt_tokens"] for answer in answers] == [M + len(own) for own in ids]
    for body, own, at in zip(bodies, ids, positions):
        layout = post(f"{server}/tokenize", {"model": str(MODEL), "messages": body["messages"]})["tokens"]
        assert layout == [*own[:at], *layout[at : at + M], *own[at:]]
        assert len(set(layout[at : at + M]) - set(own)) == 1
    found = [answer["choices"][0]["message"]["content"] for answer in answers]
    assert found == [text for (text,) in model.generate([*TEXTS, *CHATS])]
    assert len(set(found)) == len(found)


def bundle_of(model: Any, texts: list[str] | None = None) -> Bundle:
    rows = export._rows(model, texts) if texts else []
    tensors = {key: value.detach() for key, value in model.state_dict().items()}
    prompts = torch.cat([prompt for _, prompt in rows]) if rows else None
    return Bundle(export._config(model, {}, {}), tensors, "", [row for row, _ in rows], prompts)


@pytest.mark.parametrize("placement", ["system", "user"])
def test_the_clients_answer_as_generate_does(server: str, placement: str) -> None:
    model = module(placement)
    source = ServedPrompter(bundle_of(model))
    client, greedy = LoPAClient(server, source), {"temperature": 0, "max_tokens": NEW}
    wanted = [text for (text,) in model.generate([*TEXTS, *CHATS])]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda chat: client.chat(chat, **greedy), [*TEXTS, *CHATS]))
    assert [answer.choices[0].message.content for answer in answers] == wanted
    samples = client.chat(TEXTS[0], n=2, temperature=0.01, seed=0, max_tokens=4).choices
    assert len(samples) == 2
    assert all(wanted[0].startswith(str(choice.message.content)) for choice in samples)
    chunks = list(client.chat(TEXTS[0], stream=True, **greedy))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == wanted[0]
    with client.chat(TEXTS[0], stream=True, **greedy) as stream:
        next(stream)

    async def concurrent() -> list[Any]:
        other = AsyncLoPAClient(server, source)
        found = await asyncio.gather(*(other.chat(chat, **greedy) for chat in [*TEXTS, *CHATS]))
        await other.close()
        return found

    assert [answer.choices[0].message.content for answer in asyncio.run(concurrent())] == wanted
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    answer = client.chat(TEXTS[0], response_format=form, **greedy).choices[0].message.content
    assert type(json.loads(answer)["a"]) is bool


def test_whole_embeddings_are_completed_as_generate_does(server: str) -> None:
    model = module("before")
    ids, _ = model.input_spec.prompt_ids(TEXTS)
    table = model._net().backbone.embedding_table()
    bodies = [
        {
            **{"model": str(MODEL), "temperature": 0, "max_tokens": NEW},
            "prompt_embeds": encoded(torch.cat([z, table[torch.tensor(own)]])),
        }
        for z, own in zip(soft_prompts(model, TEXTS), ids)
    ]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda body: post(f"{server}/v1/completions", body), bodies))
    assert [answer["usage"]["prompt_tokens"] for answer in answers] == [M + len(own) for own in ids]
    wanted = [text for (text,) in model.generate(TEXTS)]
    assert [answer["choices"][0]["text"] for answer in answers] == wanted
    client = LoPAClient(server, ServedPrompter(bundle_of(model), max_prompt_bytes=2**22))
    greedy = {"temperature": 0, "max_tokens": NEW}
    assert [answer.choices[0].text for answer in client.map(TEXTS, **greedy)] == wanted
    chunks = list(client.complete(TEXTS[0], stream=True, **greedy))
    assert "".join(chunk.choices[0].text for chunk in chunks) == wanted[0]
    assert len(client.complete(TEXTS[0], n=2, max_tokens=2).choices) == 2
    chats = [answer.choices[0].text for answer in client.map(CHATS, **greedy)]
    assert chats == [text for (text,) in model.generate(CHATS)]


@pytest.mark.parametrize("placement", ["before", "after_first", "after", "system", "user"])
def test_a_server_of_the_backbone_passes_every_check(server: str, placement: str) -> None:
    source = ServedPrompter(bundle_of(module(placement), TEXTS[:3]), max_prompt_bytes=2**22)
    found = list(findings(LoPAClient(server, source, max_retries=0)))
    assert {each.status for each in found} == {"ok"}, list(map(str, found))
    assert [each.check for each in found][-2:] == ["parity", "size"]
    assert ("token by token" in found[4].said) == (placement in ("system", "user"))
    source.scale = 0.5
    (parity,) = (each for each in findings(LoPAClient(server, source, max_retries=0)) if each.check == "parity")
    assert parity.status == "FAIL"


@pytest.mark.parametrize("placement", ["system", "before", "after"])
def test_a_label_is_the_word_that_the_server_chooses(server: str, placement: str, tmp_path: Path) -> None:
    texts = [
        "a dull film",
        "great fun",
        "I slept",
        "the best of the year",
        "badly told",
        "warm and clever",
        "no",
        "yes",
    ]
    (tmp_path / "new.csv").write_text("text,label\n" + "".join(f"{text},bad\n" for text in texts))
    torch.manual_seed(0)
    model = ClassificationModule(
        backbone=PretrainedSpec(str(MODEL), dtype="float32"),
        instance_encoder=InstanceEncoderSpec(str(ENCODER), pooling="mean"),
        prompt_encoder=functools.partial(LoPA, num_virtual_tokens=M, rank=4, hidden_dim=64),
        objective="causal_lm",
        placement=placement,
    )
    data = TextClassificationDataModule(
        data_files=dict.fromkeys(("train", "test"), str(tmp_path / "new.csv")),
        **{"labels": ["bad", "good"], "words": ["no", "yes"], "template": ["{text}\nIs that praise? {mask}"]},
    )
    model.learned = True
    run = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    parts: Any = run.predict(model, data)
    probabilities = {i: row for part in parts for i, row in zip(part["index"].tolist(), part["probabilities"].tolist())}
    records = LoPAClient(server, bundle_of(model)).classify(texts)
    for record, own in zip(records, model.predict(texts), strict=True):
        assert record["label"] == own["label"]
        assert record["probabilities"] == pytest.approx(own["probabilities"], abs=1e-4)
    if placement != "system":
        return
    words = model.word_ids(["no", "yes"])
    for index, (text, prompt) in enumerate(zip(texts, soft_prompts(model, texts))):
        asked = [{"role": "user", "content": f"{text}\nIs that praise?"}]
        choice = {"model": str(MODEL), "temperature": 0, "max_tokens": 1, "allowed_token_ids": words}
        body = {**choice, "messages": messages_of(asked, "system", prompt), "logprobs": True, "top_logprobs": 20}
        answer = post(f"{server}/v1/chat/completions", body)["choices"][0]
        assert answer["message"]["content"] == ("no", "yes")[probabilities[index][1] > 0.5]
        logprobs = {each["token"]: each["logprob"] for each in answer["logprobs"]["content"][0]["top_logprobs"]}
        if {"no", "yes"} <= set(logprobs):
            odds = probabilities[index][1] / probabilities[index][0]
            assert math.exp(logprobs["yes"] - logprobs["no"]) == pytest.approx(odds, rel=1e-3)


def test_the_server_takes_no_text_with_the_placeholder(server: str) -> None:
    body = {"model": str(MODEL), "messages": [{"role": "user", "content": f"a {PLACEHOLDER} b"}]}
    with pytest.raises(urllib.error.HTTPError, match="400"):
        post(f"{server}/v1/chat/completions", body)


def test_the_server_hands_parts_to_the_same_templates() -> None:
    code = (
        "import json, sys; from vllm.renderers.hf import _detect_content_format as found\n"
        "print(json.dumps([found(each, default='string') for each in json.load(sys.stdin)]))"
    )
    given = json.dumps([each.text for each in TEMPLATES.values()])
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    answer = subprocess.run(
        [os.environ[VARIABLE], "-c", code], input=given, env=environment, capture_output=True, text=True, check=True
    )
    formats = json.loads(answer.stdout.splitlines()[-1])
    assert formats == ["openai" if reads_parts(tokenizer_of(each)) else "string" for each in TEMPLATES.values()]
    assert set(formats) == {"openai", "string"}

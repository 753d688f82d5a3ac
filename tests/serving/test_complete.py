"""Soft prompts before a text: it is sent as embeddings, of which rows of the backbone's table are read."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    FalconH1Config,
    Gemma2Config,
    Gemma3nTextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    OPTConfig,
)

from lopa_lightning import LoPAClient, PretrainedSpec, ServedPrompter, build_messages, build_prompt_embeds
from lopa_lightning.backbones.pretrained import load_model, meta_model
from lopa_lightning.backbones.text import TextBackbone
from lopa_lightning.errors import LoPAError
from lopa_lightning.modules.predict import batches, row_encoder
from lopa_lightning.serving import embeddings
from lopa_lightning.serving.embeddings import EmbeddingTable, check_architecture
from lopa_lightning.serving.export import export_bundle
from lopa_lightning.serving.requests import PromptDroppedError
from tests.serving.helpers import checkpoint
from tests.serving.test_client import called
from tests.serving.upstream import M, Upstream, decoded, running

Tiny = Callable[[str], str]
TEXTS = ["the film was great", "No"]
BOTH = pytest.mark.parametrize("client", ["sync", "async"])


@pytest.fixture(scope="module")
def made(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, ServedPrompter]]:
    """Modules whose soft prompt stands before a text, and what makes their requests."""

    @functools.cache
    def make(kind: str) -> tuple[Any, ServedPrompter]:
        model, path = checkpoint(kind, tmp_path_factory.mktemp("made") / "run", tiny)
        return model, ServedPrompter(export_bundle(path, ["the film was"]))

    return make


@pytest.fixture
def upstream(tiny: Tiny, made: Any) -> Iterator[Upstream]:
    model = load_model(PretrainedSpec(tiny("llama")), "causal_lm")
    with running(Upstream(AutoTokenizer.from_pretrained(tiny("llama")), model)) as server:
        yield server


def read_by(module: Any, text: str) -> torch.Tensor:
    """What the module's own backbone reads of a text: soft prompt and embeddings ``[m + T, d]``."""
    ids, _ = module.input_spec.prompt_ids([text])
    texts = {"input_ids": torch.tensor(ids), "attention_mask": torch.ones(1, len(ids[0]), dtype=torch.long)}
    with torch.no_grad():
        prompt, _ = module.net.soft_prompt(module.input_spec.instance_batch([text], "cpu"))
        whole: torch.Tensor = module.net.backbone.to_continue(prompt, texts)[0][0]
    return whole


@pytest.mark.sampled(2)
@BOTH
@pytest.mark.parametrize("kind", ["completion", "after first", "after"])
def test_a_text_is_sent_as_the_module_reads_it(client: str, kind: str, made: Any, upstream: Upstream) -> None:
    module, source = made(kind)
    answer = called(client, upstream, source, "complete", TEXTS[0], n=2, max_tokens=4, extra_body={"min_tokens": 1})
    assert isinstance(answer, openai.types.Completion)
    assert [choice.text for choice in answer.choices] == ["ab", "ab"]
    (body,) = upstream.asked
    assert upstream.paths == ["/v1/completions"]
    sent = decoded(body.pop("prompt_embeds"))
    assert body == {"model": "tiny", "n": 2, "max_tokens": 4, "min_tokens": 1, "prompt": None}
    wanted = read_by(module, TEXTS[0])
    at = {"completion": 0, "after first": 1, "after": len(wanted) - M}[kind]
    texts = [[*range(at), *range(at + M, len(wanted))], [*range(at, at + M)]]
    assert torch.equal(sent[texts[0]], wanted[texts[0]])
    torch.testing.assert_close(sent[texts[1]], wanted[texts[1]], rtol=0, atol=0 if kind == "after first" else 1e-6)
    assert answer.usage.prompt_tokens == len(wanted)
    assert torch.equal(decoded(build_prompt_embeds(source, TEXTS[0])), sent)


@BOTH
def test_many_texts_are_answered_in_order_and_streams_are_checked(client: str, made: Any, upstream: Upstream) -> None:
    _, source = made("completion")
    answers = called(client, upstream, source, "map", [TEXTS[0], TEXTS[1], TEXTS[0]], max_tokens=1)
    lengths = [M + len(ids) for ids in source.spec.prompt_ids([TEXTS[0], TEXTS[1], TEXTS[0]])[0]]
    assert [answer.usage.prompt_tokens for answer in answers] == lengths
    chunks = called(client, upstream, source, "complete", TEXTS[0], stream=True)
    assert [chunk.choices[0].text for chunk in chunks] == ["a", "b"]
    upstream.drops = True
    for stream in (False, True):
        with pytest.raises(PromptDroppedError, match=r"read \d+ tokens .* 3 virtual .* prompt was dropped"):
            called(client, upstream, source, "complete", TEXTS[0], stream=stream)


@pytest.mark.sampled(2)
@BOTH
@pytest.mark.parametrize(("kind", "knows_ids"), [("words", True), ("words", False), ("words after", True)])
def test_labels_are_those_of_predict(client: str, kind: str, knows_ids: bool, made: Any, upstream: Upstream) -> None:
    module, source = made(kind)
    upstream.knows_ids = knows_ids
    records = called(client, upstream, source, "classify", [*TEXTS, "a long story " * 30])
    for record, own in zip(records, module.predict([*TEXTS, "a long story " * 30]), strict=True):
        assert record["label"] == own["label"]
        assert record["probabilities"] == pytest.approx(own["probabilities"], abs=1e-5)
    encoder, rows = row_encoder(module, [TEXTS[0]])
    (batch,) = batches(module, encoder, rows, 0, 1)
    text = slice(M, None) if kind == "words" else slice(-M)
    sent = {decoded(body["prompt_embeds"])[text].numpy().tobytes() for body in upstream.asked}
    table = module.net.backbone.embedding_table()
    assert table[batch["input_ids"][0]].numpy().tobytes() in sent


def test_what_does_not_go_together_is_refused(made: Any, upstream: Upstream) -> None:
    client = LoPAClient(upstream.url, made("completion")[1])
    with pytest.raises(LoPAError, match=r"with placement 'before'; use complete in place of chat"):
        client.chat("the film")
    with pytest.raises(LoPAError, match="does not stand in a chat"):
        build_messages(client.served, "the film")
    with pytest.raises(LoPAError, match=r"a text has \d+ tokens, and beside the virtual ones is room for 61"):
        client.complete("the film was " * 60)
    with pytest.raises(LoPAError, match="suffix='x' is refused"):
        client.complete("the film", suffix="x")
    with pytest.raises(LoPAError, match="stream goes with single requests"):
        client.map(TEXTS, stream=True)
    assert upstream.asked == []


def test_values_are_rounded_once_to_the_dtype_that_is_asked_for(made: Any) -> None:
    module, source = made("completion")
    served = ServedPrompter(source.prompter, dtype="bfloat16", scale=0.5)
    found = decoded(build_prompt_embeds(served, TEXTS[0]))
    assert torch.equal(found[M:], (read_by(module, TEXTS[0])[M:] * 0.5).bfloat16())
    with pytest.raises(LoPAError, match="dtype must be one of bfloat16, float16"):
        ServedPrompter(source.prompter, dtype="int8")


# The table

SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 16, "num_key_value_heads": 1}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "gemma2": Gemma2Config(**SIZES, head_dim=8),
    "granite": GraniteConfig(**SIZES, embedding_multiplier=12.0),
    "gpt2": GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2),
    "neox": GPTNeoXConfig(**{k: v for k, v in SIZES.items() if k != "num_key_value_heads"}),
    "opt": OPTConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16),
}
IDS = [3, 49, 3, 0]


def saved(name: str, folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> PretrainedSpec:
    """Saves a model of an architecture without a tokenizer."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=dtype)
    torch.nn.init.normal_(model.get_input_embeddings().weight)
    model.save_pretrained(folder, **options)
    return PretrainedSpec(str(folder))


def table_of(spec: PretrainedSpec, dtype: torch.dtype = torch.float32) -> EmbeddingTable:
    return EmbeddingTable(spec, meta_model(spec, "causal_lm"), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_rows_are_what_the_backbone_embeds(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    spec = saved(name, tmp_path, dtype)
    own = TextBackbone(load_model(spec, "causal_lm")).model.get_input_embeddings()(torch.tensor(IDS))
    found = table_of(spec, dtype)(IDS)
    assert found.dtype == own.dtype == dtype
    assert torch.equal(found, own)


@pytest.mark.parametrize("saved_as", ["lm_head.weight", "language_model.embed_tokens.weight"])
def test_a_tied_or_renamed_table_is_found_and_one_of_another_shape_refused(saved_as: str, tmp_path: Path) -> None:
    spec = saved("tied", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    table = tensors.pop("model.embed_tokens.weight")
    save_file({**tensors, saved_as: table.clone()}, tmp_path / "model.safetensors", {"format": "pt"})
    assert torch.equal(table_of(spec)(IDS), table[IDS])
    save_file({**tensors, saved_as: table[:49].clone()}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(LoPAError, match=r"must be \[50, 16\] and not quantised, got \[49, 16\] F32"):
        table_of(spec)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(LoPAError, match=r"is not found in its files: model\.embed_tokens"):
        table_of(spec)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(LoPAError, match=r"no model\.safetensors in "):
        table_of(spec)


class Hub(ThreadingHTTPServer):
    """Sends ranges of a folder's files."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Files)
        self.folder, self.sent, self.has_ranges = folder, list[tuple[str, int]](), True


class _Files(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        path = self.server.folder / self.path.rpartition("/")[2]
        assert self.path.startswith("/org/model/resolve/v1/")
        if not path.is_file():
            self.send_error(404)
            return
        first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        content = path.read_bytes()[int(first) : int(last) + 1 if last else None]
        self.server.sent.append((path.name, len(content)))
        self.send_response(206 if self.server.has_ranges else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.mark.parametrize("shards", [False, True])
def test_rows_come_from_the_hub_by_ranges_of_bytes_and_are_kept(
    shards: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = saved("llama", tmp_path, max_shard_size="6KB" if shards else "1GB")
    assert (tmp_path / "model.safetensors.index.json").is_file() == shards
    model, hub = meta_model(spec, "causal_lm"), Hub(tmp_path)
    monkeypatch.setattr(
        embeddings, "hf_hub_url", lambda name, file, revision: f"{url}/{name}/resolve/{revision}/{file}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"] if shards else {}
    monkeypatch.setattr(embeddings, "indexed", lambda location, options: index)
    with running(hub) as server:  # type: ignore[type-var]
        url = f"http://127.0.0.1:{server.server_port}"
        table = EmbeddingTable(PretrainedSpec("org/model", revision="v1"), model, torch.float32)
        read = len(hub.sent)
        own = load_model(spec, "causal_lm").get_input_embeddings().weight[torch.tensor(IDS)]
        assert torch.equal(table(IDS), own)
        assert [size for _, size in hub.sent[read:]] == [64, 64, 64]  # rows 0, 3 and 49
        assert torch.equal(table([49]), own[1:2])
        assert len(hub.sent) == read + 3
        assert sum(size for _, size in hub.sent) < 4000
        hub.has_ranges = False
        with pytest.raises(LoPAError, match="no ranges of bytes are sent"):
            table([5])
    with pytest.raises(LoPAError, match="rows of embeddings cannot be read from http"):
        table([6])


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (FalconH1Config(**SIZES, mamba_d_ssm=16, mamba_n_heads=2, mamba_d_head=8), "multiply given embeddings"),
        (Gemma3nTextConfig(**SIZES, head_dim=8), "every layer reads the tokens' ids"),
    ],
)
def test_an_architecture_that_servers_read_otherwise_is_refused(config: Any, said: str) -> None:
    class Model:
        def __init__(self) -> None:
            self.config = config

        def get_input_embeddings(self) -> torch.nn.Module:
            return torch.nn.Embedding(2, 2)

    with pytest.raises(LoPAError, match=f"a server cannot be sent soft prompts for .* models: .*{said}"):
        check_architecture(Model())  # type: ignore[arg-type]
    model = Model()
    model.config = CONFIGS["gemma2"]
    with pytest.raises(LoPAError, match=r"update it to 5\.4"):
        check_architecture(model)  # type: ignore[arg-type]


def test_the_backbones_other_weights_are_not_read(tiny: Tiny, tmp_path: Path) -> None:
    backbone = tmp_path / "backbone"
    shutil.copytree(tiny("llama"), backbone)
    _, path = checkpoint("soft", tmp_path / "run", tiny, str(backbone))
    bundle = export_bundle(path, ["the film"])
    tensors = load_file(backbone / "model.safetensors")
    own = {"model.embed_tokens.weight": tensors["model.embed_tokens.weight"]}
    save_file(own, backbone / "model.safetensors", {"format": "pt"})
    ids = ServedPrompter(bundle).spec.prompt_ids(["the film"])[0][0]
    found = decoded(build_prompt_embeds(bundle, "the film"))
    assert torch.equal(found[M:], own["model.embed_tokens.weight"][ids])

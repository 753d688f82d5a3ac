"""A server of the standard library that answers as vLLM does, or wrongly where it is told to."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from torch import Tensor

M = 3  # virtual tokens of the bundles here
_FLAG = "You must set `--enable-prompt-embeds` to input `prompt_embeds`"


def decoded(data: str) -> Tensor:
    found: Tensor = torch.load(io.BytesIO(base64.b64decode(data, validate=True)), weights_only=True)
    return found


def prompts_in(messages: list[dict[str, Any]]) -> list[Tensor]:
    parts = [part for message in messages if isinstance(message["content"], list) for part in message["content"]]
    return [decoded(part["data"]) for part in parts if part["type"] == "prompt_embeds"]


class Upstream(ThreadingHTTPServer):
    """What it is sent is kept in ``asked``; with a ``model`` log probabilities are this model's own."""

    daemon_threads = True

    def __init__(self, tokenizer: Any, model: Any = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.tokenizer, self.model, self.scale = tokenizer, model, 1.0
        self.asked, self.paths, self.statuses = list[dict[str, Any]](), list[str](), list[int]()
        self.headers, self.logprobs = list[list[tuple[str, str]]](), dict[int, float]()
        self.drops, self.knows_ids, self.says_usage, self.late_usage = False, True, True, False
        self.version: str | None = "0.32.0"
        self.name, self.key, self.takes_prompts, self.tokenizes, self.most = "tiny", "", True, True, 2**30
        self.extra_tokens, self.reverses = 0, False
        self.says: str | None = None  # in place of any answer
        self.sets = list[tuple[str, str]]()  # headers of every answer
        self.lists: str | None = None  # in place of its models

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def pieces(self, messages: list[dict[str, Any]]) -> list[list[int]]:
        """Tokens around soft prompts: a chat as its template writes it, its parts joined by new lines."""
        text = ""
        for message in messages:
            content = message["content"]
            parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
            text += f"<|{message['role']}|>" + "\n".join("\0" if "data" in part else part["text"] for part in parts)
        pieces = f"{text}<|assistant|>".split("\0")
        return [list(self.tokenizer(piece, add_special_tokens=False)["input_ids"]) for piece in pieces]

    def read(self, body: dict[str, Any]) -> int:
        """Tokens of a prompt."""
        if "prompt_embeds" in body:
            return len(decoded(body["prompt_embeds"])) - (M if self.drops else 0)
        if "messages" not in body:
            return 1
        pieces = self.pieces(body["messages"])
        return sum(map(len, pieces)) + (0 if self.drops else M * (len(pieces) - 1)) + self.extra_tokens

    def fault(self, body: dict[str, Any]) -> str | None:
        sent = [decoded(body["prompt_embeds"])] if "prompt_embeds" in body else prompts_in(body.get("messages", []))
        if sent and not self.takes_prompts:
            return _FLAG
        width = sent[0].shape[-1] if sent and self.model is not None else 0
        wanted = self.model.config.hidden_size if width else 0
        return None if width == wanted else f"`prompt_embeds` hidden_size {width} does not match {wanted}."

    def first_logprobs(self, body: dict[str, Any]) -> dict[int, float]:
        """Of each token that may come first."""
        if self.model is None:
            return self.logprobs
        if "prompt_embeds" in body:
            whole = decoded(body["prompt_embeds"]) * self.scale
        else:
            embed, sent = self.model.get_input_embeddings(), prompts_in(body["messages"])
            first, *others = (embed(torch.tensor(ids, dtype=torch.long)) for ids in self.pieces(body["messages"]))
            whole = torch.cat([first, *(x for pair in zip(sent, others) for x in (pair[0] * self.scale, pair[1]))])
        with torch.no_grad():
            logits = self.model(inputs_embeds=whole[None].to(self.model.dtype)).logits[0, -1]
        return dict(enumerate(logits.float().log_softmax(-1).tolist()))


@contextmanager
def running(upstream: Upstream) -> Iterator[Upstream]:
    # Looks for its end every 10 ms: by default it would be every 500.
    thread = threading.Thread(target=upstream.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield upstream
    finally:
        upstream.shutdown()
        upstream.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: Upstream

    def do_GET(self) -> None:
        if self.path.endswith("/version"):
            version = self.server.version
            self._reply(404 if version is None else 200, json.dumps({"version": version}))
            return
        if self.server.key and self.headers.get("Authorization") != f"Bearer {self.server.key}":
            self._reply(401, json.dumps({"error": "Unauthorized"}))
            return
        if self.server.lists is not None:
            self._reply(200, self.server.lists)
            return
        base = {"id": self.server.name, "parent": None, "object": "model", "max_model_len": 64}
        cards = [{"id": "lora", "parent": "tiny", "object": "model"}, base]
        self._reply(200, json.dumps({"object": "list", "data": cards}))

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        body = json.loads(self.rfile.read(length))
        self.server.asked.append(body)
        self.server.paths.append(self.path)
        self.server.headers.append(self.headers.items())
        status = self.server.statuses.pop(0) if self.server.statuses else 200
        if length > self.server.most:
            status = 413
        if status != 200:
            self._reply(status, json.dumps({"error": {"message": "no"}}))
            return
        if self.server.says is not None:
            kind = "text/event-stream" if body.get("stream") else "application/json"
            self._reply(200, f"data: {self.server.says}\n\n" if body.get("stream") else self.server.says, kind)
            return
        if self.path.endswith("/tokenize"):
            self._tokenize(body)
            return
        if fault := self.server.fault(body):
            self._reply(400, json.dumps({"error": {"message": fault}}))
            return
        usage = {"prompt_tokens": self.server.read(body), "completion_tokens": 2, "total_tokens": 0}
        usage = usage if self.server.says_usage else None
        common = {"id": "1", "created": 0, "model": body["model"]}
        chats = self.path.endswith("/chat/completions")
        common["object"] = "chat.completion" if chats else "text_completion"
        if body.get("stream"):
            self._stream(body, common, usage, chats)
            return
        content = {"message": {"role": "assistant", "content": "ab"}} if chats else {"text": "ab"}
        choice = {"index": 0, "finish_reason": "stop", "logprobs": self._logprobs(body, chats), **content}
        choices = [{**choice, "index": index} for index in range(body.get("n", 1))]
        self._reply(200, json.dumps({**common, "choices": choices, "usage": usage}))

    def _stream(self, body: dict[str, Any], common: dict[str, Any], usage: Any, chats: bool) -> None:
        common = {**common, "object": "chat.completion.chunk"} if chats else common
        words = [{"delta": {"content": word}} if chats else {"text": word} for word in ("a", "b")]
        chunks = [{**common, "choices": [{"index": 0, "finish_reason": None, "logprobs": None, **w}]} for w in words]
        if body["stream_options"].get("continuous_usage_stats") and not self.server.late_usage:
            chunks = [{**chunk, "usage": usage} for chunk in chunks]
        chunks.append({**common, "choices": [], "usage": usage})
        lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
        self._reply(200, "".join([*lines, "data: [DONE]\n\n"]), "text/event-stream")

    def _tokenize(self, body: dict[str, Any]) -> None:
        first, *others = self.server.pieces(body["messages"])
        tokens = [*first, *(token for ids in others for token in (*[len(self.server.tokenizer)] * M, *ids))]
        tokens = tokens[::-1] if self.server.reverses else tokens
        self._reply(200 if self.server.tokenizes else 404, json.dumps({"tokens": tokens, "count": len(tokens)}))

    def _logprobs(self, body: dict[str, Any], chats: bool) -> dict[str, Any] | None:
        if not body.get("logprobs"):
            return None
        assert (body["top_logprobs"] if chats else body["logprobs"]) == 20
        assert body["return_tokens_as_token_ids"]
        values = self.server.first_logprobs(body)
        allowed = body.get("allowed_token_ids") or list(values)
        likely = sorted(values, key=lambda token: -values[token])[:2]
        named = {
            f"token_id:{token}": values[token]
            for token in (body["logprob_token_ids"] if self.server.knows_ids else likely)
        }
        best = max(allowed, key=lambda token: values[token])
        token = {"token": f"token_id:{best}", "logprob": values[best], "bytes": None}
        if chats:
            top = [{"token": name, "logprob": value, "bytes": None} for name, value in named.items()]
            return {"content": [{**token, "top_logprobs": top}]}
        named.setdefault(token["token"], values[best])
        return {"tokens": [token["token"]], "token_logprobs": [values[best]], "top_logprobs": [named]}

    def _reply(self, status: int, text: str, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        for name, value in self.server.sets:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: Any) -> None:
        pass

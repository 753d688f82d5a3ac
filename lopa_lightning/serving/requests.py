"""What a server is sent, and what it must answer. No network here.

A soft prompt that stands in a chat is sent as a part of a message. One that stands beside a text is sent with the
embeddings of the whole text.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from transformers import PreTrainedModel

from lopa_lightning import checkpoint
from lopa_lightning.backbones.chat import Chat, with_instances
from lopa_lightning.backbones.injection import CHAT_PLACEMENTS
from lopa_lightning.backbones.pretrained import load_config, meta_model
from lopa_lightning.backbones.text_spec import TextSpec
from lopa_lightning.backbones.tokens import label_word_ids
from lopa_lightning.data.rows import EncodeRows
from lopa_lightning.data.task_rows import rows_of, task_encoder, task_template
from lopa_lightning.errors import LoPAError, one_line, one_of
from lopa_lightning.modules import CausalLMModule, ClassificationModule, LoPALightningModule
from lopa_lightning.modules.predict import check_rows
from lopa_lightning.serving.bundle import Bundle, tokenizer_facts
from lopa_lightning.serving.embeddings import EmbeddingTable, check_architecture
from lopa_lightning.serving.prompter import LoPAPrompter

MOST_BYTES = 2**20
"""Of a soft prompt as it is sent, with its text's embeddings where they are; what many proxies take of a request."""


class PromptDroppedError(LoPAError):
    """A server read another number of tokens than it was sent, as one does that drops the soft prompt."""


@dataclass(frozen=True)
class ServedRequest:
    """A chat to send, or a text as embeddings.

    Attributes:
        body: What is sent of the prompt: ``messages``, with the soft prompt as a part of one, or ``prompt_embeds``.
        virtual_tokens: m.
        ids: Tokens of the text or the rendered chat beside them.
        position: How many of these stand before the virtual tokens.
    """

    body: dict[str, Any]
    virtual_tokens: int
    ids: list[int]
    position: int

    @property
    def path(self) -> str:
        """Where it is sent to, after ``/v1/``."""
        return "chat/completions" if "messages" in self.body else "completions"

    @property
    def messages(self) -> list[dict[str, Any]]:
        """Of a chat.

        Raises:
            LoPAError: If it is a text as embeddings.
        """
        if "messages" not in self.body:
            raise LoPAError("the bundle's soft prompt does not stand in a chat, and whole texts are sent (complete)")
        return list(self.body["messages"])

    def check_usage(self, usage: Any) -> None:
        """Compares what a server says that it has read.

        Args:
            usage: Of the ``openai`` package; None where there is none.

        Raises:
            PromptDroppedError: If ``prompt_tokens`` is not that of text and soft prompt together.
        """
        m, own = self.virtual_tokens, len(self.ids)
        read = getattr(usage, "prompt_tokens", None)
        if read == m + own:
            return
        wanted = f"expected {m + own}: {m} virtual and {own} of the text"
        if read is None:
            raise PromptDroppedError(f"the server does not say how many tokens of the prompt it read ({wanted})")
        why = "its chat template or tokenizer is not the bundle's, or a proxy changed the request"
        if read == own:
            why = "the soft prompt was dropped on the way, or by the server"
        raise PromptDroppedError(f"the server read {read} tokens of the prompt, {wanted}; {why}")


class ServedPrompter:
    """Makes the requests of a bundle. Threads may share it.

    It loads the instance encoder, and tokenizer and config of the backbone, which count the tokens that a server must
    read. Of the backbone's weights nothing is read; or where the soft prompt does not stand in a chat, and the text is
    sent as embeddings, the rows of its tokens.

    Args:
        source: The bundle, its prompter, or where the bundle lies: a folder, or an id on the hub.
        trust_remote_code: Whether models may run code of their own, where the bundle says that they do.
        max_prompt_bytes: Of a soft prompt as it is sent, with the embeddings of its text where they are, at most.
        dtype: In which values are sent: ``bfloat16``, ``float16`` or ``float32``; by default the dtype of the backbone
            in training.
        scale: All values are multiplied by it, for a server that wants them so; ``lopa doctor`` says if one does.

    Raises:
        LoPAError: If no server can answer with the bundle, or the backbone's tokenizer, chat template or config is not
            there, or not the bundle's; or if its embedding table is needed, and cannot be read by rows.
    """

    def __init__(
        self,
        source: Bundle | LoPAPrompter | str | Path,
        trust_remote_code: bool = False,
        max_prompt_bytes: int = MOST_BYTES,
        dtype: str | None = None,
        scale: float = 1.0,
    ) -> None:
        found = Bundle.from_pretrained(source) if isinstance(source, (str, Path)) else source
        bundle = found if isinstance(found, Bundle) else found.bundle
        bundle.check_served()
        self.facts, self.max_prompt_bytes = bundle.config.prompt, max_prompt_bytes
        module = bundle.unloaded_module(trust_remote_code)
        self.backbone = module.backbone_spec.name
        model, self.spec = _backbone(module, self.facts.num_virtual_tokens)
        _check_tokenizer(bundle, self.spec, self.backbone)
        now = {"name": self.backbone, "config": checkpoint.config_facts(load_config(module.backbone_spec))}
        checkpoint.check_identity(
            {"backbone": bundle.config.identity.get("backbone")}, {"backbone": now}, weights=False
        )
        self.task = module.required_task() if isinstance(module, ClassificationModule) else None
        self.words: dict[str, int] = {}  # token of each label's word
        self.instance_column = module.instance_column if isinstance(module, CausalLMModule) else None
        in_chat = self.facts.placement in CHAT_PLACEMENTS
        if self.task is not None:
            answer = self.spec.chat.answer_start if in_chat else None
            ids = label_word_ids(self.spec.tokenizer, self.task.words or [], answer)
            self.words = dict(zip(self.task.labels, ids))
            encoder = task_encoder(self.task, self.spec)
            assert isinstance(encoder, EncodeRows)  # a bundle that is served answers with words
            self._tokenize = encoder.to_backbone
        trained_in = _sent_dtype(self.facts.dtype)  # it reads virtual tokens in it, too
        self.dtype, self.scale = trained_in if dtype is None else _sent_dtype(dtype), scale
        self._table = None if in_chat else EmbeddingTable(module.backbone_spec, model, trained_in)
        self.prompter = found if isinstance(found, LoPAPrompter) else LoPAPrompter(found, trust_remote_code)
        self._one_at_a_time = threading.Lock()

    def requests(self, inputs: Any, instance_texts: str | Sequence[str] | None = None) -> list[ServedRequest]:
        """Makes requests, in their order.

        Args:
            inputs: A text, a chat (a list of messages), or a list of either. For a classifier rows as ``predict`` takes
                them.
            instance_texts: What the instance encoder reads; by default the texts, of a chat its last message.

        Raises:
            LoPAError: If an input is none, the template does not take it, or a soft prompt is not finite or too large.
        """
        return [request for block in self.blocks(inputs, instance_texts) for request in block]

    def blocks(
        self, inputs: Any, instance_texts: str | Sequence[str] | None = None, size: int | None = None
    ) -> Iterator[list[ServedRequest]]:
        """Makes requests, in their order, some at a time: all inputs are checked at once, and soft prompts made late.

        One that is not finite is only seen then.

        Args:
            inputs: See :meth:`requests`.
            instance_texts: See :meth:`requests`.
            size: Requests at a time; by default all.

        Raises:
            LoPAError: See :meth:`requests`.
        """
        if self.task is not None:
            if instance_texts is not None:
                raise LoPAError("the instance encoder of a classifier reads the rows; instance_texts is for chats")
            return self._of_rows(inputs, size)
        prompts, instances = with_instances(inputs, instance_texts, self.instance_column)
        return self._blocks(prompts, {"text": instances}, None, size)

    def _of_rows(self, texts: Any, size: int | None) -> Iterator[list[ServedRequest]]:
        assert self.task is not None
        rows = rows_of(texts, task_template(self.task).columns)
        check_rows(rows)
        if not next(iter(rows.values())):
            return iter([])
        encoded = None
        if self._table is None:
            asked, cut = self._tokenize.texts(rows)
        else:
            found = self._tokenize(rows)
            encoded, cut = found["input_ids"], found["truncated"]
            asked = [""] * len(cut)  # its tokens are what is sent
        if sum(cut):
            rank_zero_warn(f"{sum(cut)} of {len(cut)} texts were cut to {self._tokenize.max_tokens} tokens")
        return self._blocks(asked, rows, encoded, size)

    def _blocks(
        self,
        asked: Sequence[str | Chat],
        rows: Mapping[str, Sequence[str]],
        encoded: list[list[int]] | None,
        size: int | None,
    ) -> Iterator[list[ServedRequest]]:
        if not asked:
            return iter([])
        with self._one_at_a_time:  # tokenizers and encoder are not made for threads
            ids, positions = self.spec.prompt_ids(asked) if encoded is None else (encoded, [0] * len(encoded))
        longest, room = max(map(len, ids)), self.spec.max_tokens
        if room is not None and longest > room:
            raise LoPAError(f"a text has {longest} tokens, and beside the virtual ones is room for {room}")
        if size is not None:  # some are sent before others are made
            self._check_size(longest)

        def block(first: int, end: int) -> list[ServedRequest]:
            with self._one_at_a_time:
                prompts = self.prompter({name: list(texts[first:end]) for name, texts in rows.items()})
            parts = (asked[first:end], prompts, ids[first:end], positions[first:end])
            return [self._request(*each) for each in zip(*parts)]

        step = size or len(asked)
        return (block(first, first + step) for first in range(0, len(asked), step))

    def _check_size(self, tokens: int) -> None:
        """Refuses what would be too large to send, before anything is made."""
        rows = self.facts.num_virtual_tokens + (0 if self._table is None else tokens)
        encoded_tensor(torch.zeros(rows, self.facts.embedding_dim), self.dtype, self.max_prompt_bytes)

    def _request(self, asked: str | Chat, prompt: Tensor, ids: list[int], position: int) -> ServedRequest:
        sent = prompt
        if self._table is not None:
            text, position = self._table(ids), {"after_first": 1, "after": len(ids)}.get(self.facts.placement, 0)
            sent = torch.cat([text[:position], prompt.to(text), text[position:]])
        data = encoded_tensor(sent * self.scale, self.dtype, self.max_prompt_bytes)
        if self._table is not None:
            return ServedRequest({"prompt_embeds": data}, len(prompt), ids, position)
        chat = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
        messages = self.spec.chat.sent(chat, {"type": "prompt_embeds", "data": data})
        return ServedRequest({"messages": messages}, len(prompt), ids, position)


def build_messages(source: ServedPrompter | LoPAPrompter | Bundle | str | Path, messages: Any) -> list[dict[str, Any]]:
    """Returns a chat with the soft prompt in it, to send with a client of one's own to ``/v1/chat/completions``.

    Nothing is sent. Check that the answer's ``usage.prompt_tokens`` is what :meth:`ServedPrompter.requests` says.

    Args:
        source: A :class:`ServedPrompter`, which loads once what it needs; of what else it takes one is made.
        messages: A text or a chat; for a classifier a row as ``predict`` takes it.

    Raises:
        LoPAError: See :class:`ServedPrompter`; or if it is not one chat, or the soft prompt does not stand in one.
    """
    return _one(source, messages).messages


def build_prompt_embeds(source: ServedPrompter | LoPAPrompter | Bundle | str | Path, text: Any) -> str:
    """Returns soft prompt and text as ``prompt_embeds``, to send with a client of one's own to ``/v1/completions``.

    Nothing is sent. With ``openai``'s: ``completions.create(prompt=None, extra_body={"prompt_embeds": ...})``. Check
    the answer's ``usage.prompt_tokens`` as for :func:`build_messages`.

    Args:
        source: See :func:`build_messages`.
        text: A text or a chat; for a classifier a row as ``predict`` takes it.

    Raises:
        LoPAError: See :class:`ServedPrompter`; or if it is not one text, or the soft prompt stands in a chat.
    """
    found = _one(source, text)
    if "messages" in found.body:
        raise LoPAError("the bundle's soft prompt stands in a chat, which a server renders; use build_messages")
    return str(found.body["prompt_embeds"])


def _one(source: ServedPrompter | LoPAPrompter | Bundle | str | Path, asked: Any) -> ServedRequest:
    served = source if isinstance(source, ServedPrompter) else ServedPrompter(source)
    found = served.requests(asked)
    if len(found) != 1:
        raise LoPAError(f"there must be one text or one chat, got {len(found)}")
    return found[0]


def encoded_tensor(values: Tensor, dtype: torch.dtype, most: int = MOST_BYTES) -> str:
    """Returns virtual tokens, or a text with them, as vLLM reads them: base64 of what ``torch.save`` writes.

    Args:
        values: ``[T, d]``.
        dtype: In which it is sent.
        most: Bytes of base64 at most.

    Raises:
        LoPAError: If a value is NaN or infinite in this dtype, or there are more bytes.
    """
    sent = values.detach().to("cpu", dtype)
    if not sent.isfinite().all():
        raise LoPAError(f"the soft prompt is NaN or infinite in part in {dtype}, and a server would answer nothing")
    buffer = io.BytesIO()
    torch.save(sent.contiguous().clone(), buffer)  # of a view all that it is a view of would be written
    data = base64.b64encode(buffer.getvalue()).decode()
    if len(data) > most:
        count, width = sent.shape
        raise LoPAError(
            f"the soft prompt of {count} × {width} takes {len(data)} bytes, max_prompt_bytes is {most}: raise it by "
            "ServedPrompter(..., max_prompt_bytes=...) or --max_prompt_bytes, and what proxies take of a request, such "
            "as nginx's client_max_body_size (1 MiB by default)"
        )
    return data


def _backbone(module: LoPALightningModule, m: int) -> tuple[PreTrainedModel, TextSpec]:
    """The backbone without weights, and its tokenizer, chat template and lengths."""
    kind, name = module.builder.kind, module.backbone_spec.name
    needs = f"a client needs the tokenizer and the config of the backbone {name!r}, to count the tokens of a text"
    try:
        model = meta_model(kind.spec, kind.family)
        spec = kind.input_spec(kind.backbone(model, placement=module.placement), m, None, None)
    except LoPAError as error:
        raise LoPAError(f"{needs}: {error}") from error
    except Exception as error:  # of transformers or the hub
        raise LoPAError(f"{needs}: {one_line(error)}") from error
    assert isinstance(spec, TextSpec)
    check_architecture(model)
    starts = isinstance(module, CausalLMModule) and module.start_token
    return model, dataclasses.replace(spec, start_token=starts)


def _check_tokenizer(bundle: Bundle, spec: TextSpec, name: str) -> None:
    wanted, found = bundle.config.tokenizers.get("backbone"), tokenizer_facts(spec.tokenizer)
    if wanted is None or wanted.sha256 != found.sha256:
        what = "tokenizer"
    elif wanted.chat_template_sha256 != found.chat_template_sha256:
        what = "chat template"
    else:
        return
    raise LoPAError(f"the {what} of the backbone {name!r} is not the one that the bundle was trained with")


def _sent_dtype(name: str) -> torch.dtype:
    """In which values are sent; nothing is won by more than float32."""
    found = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float32}
    one_of("dtype", name, found)
    return found[name]

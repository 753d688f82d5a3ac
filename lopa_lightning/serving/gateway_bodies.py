"""What the gateway reads in the body of a request, which is a stranger's."""

from __future__ import annotations

import json
from typing import Any

from lopa_lightning.errors import is_unicode, one_line, shown
from lopa_lightning.serving.gateway_calls import GatewayError, no_number


def parsed(raw: bytes) -> dict[str, Any]:
    """Returns a request's body.

    Raises:
        GatewayError: If it is no JSON object, or has what a server may read otherwise or must not be sent: a key twice,
            NaN, or embeddings, which servers unpickle.
    """
    try:
        found = json.loads(raw, object_pairs_hook=_object, parse_constant=no_number)
    except (ValueError, RecursionError) as error:
        raise GatewayError(400, f"the request is not JSON: {one_line(error)}") from error
    if not isinstance(found, dict):
        raise GatewayError(400, f"the request must be a JSON object, got {shown(found)}")
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise GatewayError(400, f"an object of the request has a key twice: {shown([key for key, _ in pairs])}")
    # Anywhere: servers also tell a part of a message by its keys alone.
    if embeds := next((name for name in (*found, found.get("type")) if str(name).endswith("_embeds")), None):
        what = f"{shown(embeds, str)} are refused"
        raise GatewayError(400, f"{what}: the gateway makes the soft prompts, and sends no client's embeddings")
    return found


def chat_of(messages: Any) -> list[dict[str, Any]]:
    """Returns a request's messages with texts as their contents.

    Raises:
        GatewayError: If one has no text, or several.
    """
    if not isinstance(messages, list) or not messages:
        raise GatewayError(400, f"messages must be a list of messages, got {shown(messages)}")
    chat = []
    for message in messages:
        texts = _texts(message)
        if len(texts) != 1:
            raise GatewayError(400, f"a message must have one text, got {shown(message)}")
        chat.append({**message, "content": texts[0]})
    return chat


def text_of(prompt: Any) -> str:
    """Returns the text of a request for a completion.

    Raises:
        GatewayError: If it is not one text.
    """
    texts = prompt if isinstance(prompt, list) else [prompt]
    if len(texts) != 1 or not isinstance(texts[0], str):
        raise GatewayError(400, f"prompt must be one text, got {shown(prompt)}")
    return _texts({"role": "user", "content": texts[0]})[0]


def instance_of(given: Any, name: str, column: str | None) -> str | None:
    """Returns what the instance encoder reads in place of a request's last message or text; None where nothing is said.

    Args:
        given: ``instance_text`` of the request.
        name: Of the model.
        column: Where the instance encoder read texts of their own in training, their column.

    Raises:
        GatewayError: If such a text is not there, or is not Unicode.
    """
    if given is None and column is not None:
        what = f"in training the instance encoder of {name!r} read texts of their own, {column!r}"
        raise GatewayError(400, f"{what}: give such a text as instance_text")
    return None if given is None else _texts({"role": "user", "content": given})[0]


def row_of(messages: Any) -> tuple[str, ...]:
    """Returns the texts of a classifier's row: of one message of the user, a part for each of the task's columns.

    Raises:
        GatewayError: If there is another message.
    """
    if not isinstance(messages, list) or len(messages) != 1 or (_texts(messages[0]) and messages[0]["role"] != "user"):
        raise GatewayError(400, f"a label is given to one message of the user, got {shown(messages)}")
    return tuple(_texts(messages[0]))


def _texts(message: Any) -> list[str]:
    content = message.get("content") if isinstance(message, dict) and isinstance(message.get("role"), str) else None
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in parts
    ):
        raise GatewayError(400, f"a message must have a role, and a text or parts of text; got {shown(message)}")
    texts = [str(part["text"]) for part in parts]
    if not is_unicode("".join(texts)):
        raise GatewayError(400, f"a text is not Unicode, with half a character in it: {shown(texts)}")
    return texts

"""Says whether a server answers with a bundle's soft prompts as the module does: a line a check, with a remedy."""

from __future__ import annotations

import argparse
import contextlib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lopa_lightning.backbones.pretrained import load_config
from lopa_lightning.command_line.parser import Options
from lopa_lightning.errors import LoPAError, at_least, one_line, shown
from lopa_lightning.serving.bundle import Bundle
from lopa_lightning.serving.client import LoPAClient, chosen_model
from lopa_lightning.serving.labels import word_logprobs, word_options
from lopa_lightning.serving.requests import MOST_BYTES, ServedPrompter, ServedRequest
from lopa_lightning.signals import stoppable

_OLDEST, _SAFER, _ADVISED = (0, 21), (0, 26), (0, 32)
_EXACT, _ROUNDED = 1e-3, 5e-2  # of log probabilities, in float32 and in bfloat16
_TIMEOUT = 120.0  # seconds
_NO_ROWS = "the bundle has no rows to compare with; export it again"


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        status: ``FAIL`` where answers cannot be relied on.
        check: Name of the check.
        said: What was found, and what to do about it.
    """

    status: Literal["ok", "warn", "FAIL"]
    check: str
    said: str

    def __str__(self) -> str:
        return f"{self.status:<6}{self.check:<9}{self.said}"


def options() -> argparse.ArgumentParser:
    """Returns what reads the options."""
    parser = Options("doctor", "Checks whether a server answers with a bundle's soft prompts as it should.")
    parser.add_argument("--upstream", required=True, metavar="URL", help="of the server, such as http://HOST:8000")
    parser.add_argument("--bundle", required=True, help="folder of a bundle, or its hub id")
    parser.add_argument("--revision", help="branch, tag or commit of a bundle on the hub")
    parser.add_argument("--api_key", help="of the server")
    parser.add_argument("--model", help="what the server calls the backbone (default: it is asked)")
    parser.add_argument("--max_prompt_bytes", type=int, default=MOST_BYTES, help="of a soft prompt (default: 1 MiB)")
    return parser


def main(args: Sequence[str]) -> None:
    """Runs ``lopa doctor``.

    Args:
        args: What follows on the command line.

    Raises:
        LoPAError: If no server can answer with the bundle.
        SystemExit: With status 1 if a check fails.
    """
    given, has_failed = options().parse_args(args), False
    at_least(1, max_prompt_bytes=given.max_prompt_bytes)
    with stoppable():
        bundle = Bundle.from_pretrained(given.bundle, given.revision)
        served = ServedPrompter(bundle, max_prompt_bytes=given.max_prompt_bytes)
        asking: dict[str, Any] = {"model": given.model, "max_retries": 0, "timeout": _TIMEOUT}
        for finding in findings(LoPAClient(given.upstream, served, given.api_key, **asking)):
            print(finding, flush=True)
            has_failed |= finding.status == "FAIL"
    if has_failed:
        raise SystemExit(1)


def findings(client: LoPAClient) -> Iterator[Finding]:
    """Checks a server, and yields what was found; nothing more after a failure that leaves nothing to check.

    Args:
        client: Of the server, with a bundle.
    """
    for check in (_reached, _version, _model, _taken, _layout, _prompts, _parity, _body):
        found = check(client)
        yield found
        if found.status == "FAIL" and check in (_reached, _model, _taken):
            return


def _reached(client: LoPAClient) -> Finding:
    try:
        client.openai.models.list()
    except Exception as error:  # of the network, or a server of another kind
        status = getattr(error, "status_code", None)
        fix = "give its key by --api_key" if status in (401, 403) else "is --upstream right, and the server ready?"
        return Finding("FAIL", "server", f"{client.openai.base_url} does not answer: {one_line(error)}; {fix}")
    return Finding("ok", "server", str(client.openai.base_url))


def _version(client: LoPAClient) -> Finding:
    try:
        said = str(_ask(client, "version")["version"])
        parts = re.match(r"(\d+)\.(\d+)", said)
        found = (int(parts[1]), int(parts[2])) if parts else None
    except Exception:  # a router need not tell it
        said, found = "", None
    if found is None:
        return Finding("warn", "version", "not told; it must be vLLM 0.21 or later")
    if found < _OLDEST:
        return Finding("FAIL", "version", f"vLLM {said} takes no soft prompts in chats; install 0.32 or later")
    if found < _ADVISED:
        least = "0.26, and better 0.32" if found < _SAFER else "0.32"
        return Finding("warn", "version", f"hostile requests can stop vLLM {said}; install {least} or later")
    return Finding("ok", "version", f"vLLM {said}")


def _model(client: LoPAClient) -> Finding:
    backbone, cards = client.served.backbone, client.openai.models.list().data
    try:
        client.model = client.model or chosen_model(cards, backbone)
    except LoPAError as error:
        return Finding("FAIL", "model", str(error))
    card = next((card for card in cards if card.id == client.model), None)
    if backbone in (client.model, getattr(card, "root", None)):
        return Finding("ok", "model", client.model)
    said = f"the server calls it {client.model!r}, the bundle {backbone!r}; what follows says if they are the same"
    return Finding("warn", "model", said)


def _taken(client: LoPAClient) -> Finding:
    shape = client.served.facts
    try:
        client._send(_requests(client)[0], {"max_tokens": 1})
    except LoPAError as error:  # before anything was sent
        return Finding("FAIL", "request", str(error))
    except Exception as error:
        said = shown(str(error), str)
        if "enable-prompt-embeds" in str(error):
            return Finding("FAIL", "flag", "the server takes no soft prompts: start it with --enable-prompt-embeds")
        if "hidden_size" in str(error):
            return Finding("FAIL", "width", f"the server's model is not the bundle's backbone: {said}")
        return Finding("FAIL", "request", f"the server refuses a soft prompt: {said}")
    return Finding("ok", "flag", f"soft prompts are taken, {shape.num_virtual_tokens} × {shape.embedding_dim}")


def _layout(client: LoPAClient) -> Finding:
    """Compares what is read token by token where the server tells, else by number."""
    requests, by = _requests(client), "by number of tokens"
    fix = "serve the bundle's backbone with its own chat template"
    for request in requests:
        try:
            request.check_usage(client._send(request, {"max_tokens": 1}).usage)
        except Exception as error:
            return Finding("FAIL", "layout", f"{error}; {fix}")
        if request.path == "completions":
            continue
        with contextlib.suppress(Exception):  # it may be closed to clients
            found = list(_ask(client, "tokenize", {"model": client.model, "messages": request.messages})["tokens"])
            at, end, by = request.position, request.position + request.virtual_tokens, "token by token"
            if found[:at] + found[end:] != request.ids or len(set(found[at:end])) != 1:
                return Finding("FAIL", "layout", f"another chat is read, or the soft prompt stands elsewhere; {fix}")
    return Finding("ok", "layout", f"{len(requests)} prompts are read as in training, {by}")


def _prompts(client: LoPAClient) -> Finding:
    """Whether this machine makes the soft prompts that the bundle was exported with."""
    prompter = client.served.prompter
    wanted = prompter.bundle.prompts
    if wanted is None or not len(wanted):
        return Finding("warn", "prompts", _NO_ROWS)
    off = float((prompter([row["input"] for row in prompter.bundle.rows]).cpu() - wanted).abs().max())
    said = f"within {off:.1e} of the bundle's"
    if off <= _EXACT * max(1.0, float(wanted.abs().max())):
        return Finding("ok", "prompts", said)
    return Finding("FAIL", "prompts", f"{said}; use the instance encoder's files and dtype of training")


def _parity(client: LoPAClient) -> Finding:
    """Compares first tokens with the bundle's rows; where they differ, tries other scales."""
    served, bundle = client.served, client.served.prompter.bundle
    if not bundle.rows:
        return Finding("warn", "parity", _NO_ROWS)
    try:
        off = _distance(client, bundle)
    except Exception as error:  # of the server, or no log probabilities in its answer
        why = f"the server does not tell the log probabilities of first tokens: {one_line(error)}"
        return Finding("FAIL", "parity", f"{why}; it must take logprobs=20, vLLM's --max-logprobs")
    tolerance = _EXACT if served.facts.dtype == "float32" else _ROUNDED
    said = f"first tokens' log probabilities are within {off:.1e} of the module's"
    if off <= tolerance:
        return Finding("ok", "parity", said)
    if off <= _ROUNDED:
        return Finding("warn", "parity", f"{said}, as of a server in bfloat16; --dtype float32 serves them as trained")
    multiplier = getattr(load_config(bundle.unloaded.backbone_spec), "embedding_multiplier", None) or 1.0
    root, before = math.sqrt(served.facts.embedding_dim), served.scale
    try:
        for scale in (root, 1 / root, 1 / multiplier, multiplier):
            served.scale = before * scale
            with contextlib.suppress(Exception):  # values may not be finite at another scale
                if scale != 1 and _distance(client, bundle) <= tolerance:
                    fits = f"with ServedPrompter(..., scale={served.scale:.6g}) they fit: the server scales embeddings"
                    return Finding("FAIL", "parity", f"{said}; {fits} otherwise, as older ones do; update it")
    finally:
        served.scale = before
    fix = "serve the bundle's backbone at its revision, with the default --logprobs-mode"
    return Finding("FAIL", "parity", f"{said}; {fix}")


def _distance(client: LoPAClient, bundle: Bundle) -> float:
    """The largest difference of log probabilities from the rows'; infinite where one is none."""
    worst = 0.0
    for row in bundle.rows:
        if "probabilities" in row:
            found, wanted = client.classify(row["input"])[0]["probabilities"], row["probabilities"]
            pairs = [(math.log(max(found[label], 1e-9)), math.log(max(wanted[label], 1e-9))) for label in wanted]
        else:
            (request,) = client.served.requests(row["input"])
            ids, values = row["first_tokens"]["ids"], row["first_tokens"]["log_probabilities"]
            told = word_logprobs(client._send(request, word_options(ids, request.path)), ids)
            pairs = [(told[token], value) for token, value in zip(ids, values) if token in told]
        off = [abs(here - there) for here, there in pairs]
        if not off or not all(map(math.isfinite, off)):
            return math.inf
        worst = max(worst, *off)
    return worst


def _body(client: LoPAClient) -> Finding:
    try:
        client._send(_requests(client)[0], {"max_tokens": 1, "user": "x" * MOST_BYTES})
    except Exception as error:
        return Finding("warn", "size", f"a request of 1 MiB is not taken: {shown(str(error), str)}")
    return Finding("ok", "size", "requests of 1 MiB are taken")


def _requests(client: LoPAClient) -> list[ServedRequest]:
    """Of the bundle's rows."""
    rows = [row["input"] for row in client.served.prompter.bundle.rows] or ["Hello"]
    return [client.served.requests(row)[0] for row in rows]


def _ask(client: LoPAClient, path: str, body: dict[str, Any] | None = None) -> Any:
    """Asks what the ``openai`` package has no method for."""
    url = str(client.openai.base_url).rstrip("/").removesuffix("v1") + path
    call: Any = client.openai
    return call.get(url, cast_to=object) if body is None else call.post(url, body=body, cast_to=object)

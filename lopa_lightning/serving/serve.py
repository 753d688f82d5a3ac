"""Runs an OpenAI-compatible gateway that answers with the soft prompts of bundles."""

from __future__ import annotations

import argparse
import contextlib
import logging
import re
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

from lopa_lightning.command_line.parser import Options, UsageError
from lopa_lightning.errors import LoPAError, at_least
from lopa_lightning.serving.batching import KeepingPrompter, KeptVectors
from lopa_lightning.serving.bundle import Bundle
from lopa_lightning.serving.device import best_device, usable
from lopa_lightning.serving.requests import MOST_BYTES, ServedPrompter
from lopa_lightning.signals import Stopped, stoppable


def options() -> argparse.ArgumentParser:
    """Returns what reads the options."""
    parser = Options("serve", "Runs an OpenAI-compatible gateway that answers with the soft prompts of bundles.")
    parser.add_argument("--upstream", required=True, help="address of the server, such as http://HOST:8000")
    parser.add_argument(
        "--bundle",
        required=True,
        action="append",
        metavar="NAME=BUNDLE",
        help="name of a model, and its bundle: a folder, or a hub id, perhaps with @REVISION; several times",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8080, help="port to listen at (default: 8080)")
    parser.add_argument("--model", help="what the server calls the backbone (default: it is asked)")
    parser.add_argument("--device", help="of the instance encoders (default: the accelerator, if there is one)")
    parser.add_argument("--max_body_bytes", type=int, default=8 * 2**20, help="of a request (default: 8 MiB)")
    parser.add_argument("--max_prompt_bytes", type=int, default=MOST_BYTES, help="of a soft prompt (default: 1 MiB)")
    parser.add_argument("--cache_bytes", type=int, default=64 * 2**20, help="of instance vectors (default: 64 MiB)")
    parser.add_argument("--timeout", type=float, default=600, help="seconds without a byte of an answer (default: 600)")
    parser.add_argument("--shutdown_seconds", type=int, default=60, help="for what runs, after SIGTERM (default: 60)")
    return parser


def main(args: Sequence[str]) -> None:
    """Runs ``lopa serve`` until it is ended.

    Args:
        args: What follows on the command line.

    Raises:
        LoPAError: If a package is not installed, the port is taken, or a bundle cannot be served.
        UsageError: If the command line is wrong.
    """
    given = options().parse_args(args)
    if not re.match(r"https?://[^/]", given.upstream):
        raise UsageError(f"--upstream must be an address such as http://HOST:8000, got {given.upstream}")
    if not 0 <= given.port < 2**16:
        raise UsageError(f"--port must be from 0 to 65535, got {given.port}")
    at_least(1, max_body_bytes=given.max_body_bytes, max_prompt_bytes=given.max_prompt_bytes, timeout=given.timeout)
    at_least(1, shutdown_seconds=given.shutdown_seconds)
    at_least(0, cache_bytes=given.cache_bytes)
    sources = named_bundles(given.bundle)
    try:
        import uvicorn

        from lopa_lightning.serving.gateway import Gateway
    except ImportError as error:
        raise LoPAError(f'the gateway needs {error.name}: pip install "lopa-lightning[serve]"') from None
    device = usable(given.device or str(best_device()))
    with stoppable(), _bound(given.host, given.port) as listener:
        logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
        logging.getLogger("lopa.serve").setLevel(logging.INFO)
        kept = KeptVectors(given.cache_bytes)
        read = {name: Bundle.from_pretrained(*source) for name, source in sources.items()}
        bundles = load(read, kept, device, given.max_prompt_bytes)
        limits = {"max_body_bytes": given.max_body_bytes, "timeout": given.timeout}
        app = Gateway(given.upstream, bundles, kept, model=given.model, **limits).app()
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            timeout_keep_alive=75,  # more than proxies in front keep a connection that nobody uses
            timeout_graceful_shutdown=given.shutdown_seconds,
        )
        host, port = listener.getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        print(f"{', '.join(bundles)} at http://{host}:{port}/v1, answered by {given.upstream}", flush=True)
        with contextlib.suppress(Stopped):  # uvicorn raises a signal again once what ran has ended
            uvicorn.Server(config).run(sockets=[listener])


def load(
    bundles: Mapping[str, Bundle], kept: KeptVectors, device: str = "cpu", max_prompt_bytes: int = MOST_BYTES
) -> dict[str, ServedPrompter]:
    """Loads what makes the requests of bundles; those of one instance encoder share it.

    Args:
        bundles: By the name of the model that each is.
        kept: Where their vectors are kept.
        device: Of the instance encoders.
        max_prompt_bytes: Of a soft prompt as it is sent, at most.

    Raises:
        LoPAError: If one cannot be served; the message names it.
    """
    found: dict[str, ServedPrompter] = {}
    for name, bundle in bundles.items():
        try:
            prompter = KeepingPrompter(bundle, kept, [each.prompter for each in found.values()])
            if prompter.encoder is not None and prompter.encoder.spec.control == "shuffled":
                raise LoPAError("control: shuffled gives a text another one's vector, whichever is asked beside it")
            found[name] = ServedPrompter(prompter.to(device), max_prompt_bytes=max_prompt_bytes)
        except LoPAError as error:
            raise LoPAError(f"--bundle {name}: {error}") from error
    return found


def named_bundles(given: Sequence[str]) -> dict[str, tuple[str, str | None]]:
    """Returns folder or hub id, and revision, of each bundle by its name.

    Args:
        given: ``NAME=BUNDLE`` each, or ``NAME=BUNDLE@REVISION``.

    Raises:
        UsageError: If one has no name, or two have the same.

    Example:
        >>> named_bundles(["sst2=OUT", "support=hub/id@main"])
        {'sst2': ('OUT', None), 'support': ('hub/id', 'main')}
    """
    found: dict[str, tuple[str, str | None]] = {}
    for each in given:
        name, _, source = each.partition("=")
        if not name or not source or name in found:
            raise UsageError(f"--bundle must be NAME=BUNDLE, each name once, got {each}")
        hub_id, _, revision = source.partition("@")
        found[name] = (source, None) if not revision or Path(source).is_dir() else (hub_id, revision)
    return found


def _bound(host: str, port: int) -> socket.socket:
    """A socket that has its address, and takes no connection before the gateway is ready."""
    try:
        family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, number)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise LoPAError(f"cannot listen at {host}:{port}: {error}") from error
    return listener

"""What ``lopa serve`` adds to requests: direct ones, plain ones through it, and ones with a soft prompt, in turns."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import numpy as np

from lopa_lightning import Bundle, ServedPrompter
from lopa_lightning.serving.export import export_bundle
from tests.benchmarks.harness import ROOT, Row, parser, ratios, report, summary
from tests.serving.helpers import checkpoint
from tests.tiny import save_tiny

_TEXTS = [f"the film word{one} was word{two} and the story was good" for one in range(40) for two in range(25)]
_SAID = {
    "whole": {"choices": [{"index": 0, "message": {"role": "assistant", "content": "a"}, "finish_reason": "stop"}]}
}
_SAID["piece"] = {"choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": None}]}
_COLUMNS = {
    **{"way": "requests", "answer": "answer", "count": "of them", "per_second": "per second"},
    **{"p50": "p50 ms", "p99": "p99 ms", "first": "first byte, p50 ms", "over_direct": "per second, over direct"},
    **{"first_over_direct": "first byte, over direct", "per_core": "per second and core of the gateway"},
    **{"mib_before": "MiB before", "mib_after": "MiB after"},
}


async def upstream(port: int, tokens: int, pause: float) -> None:
    """Answers at once, as many tokens as the header ``x-tokens`` says; a stream has a token each ``pause`` seconds."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                lines = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
                headers = dict(line.split(": ", 1) for line in lines[1:] if line)
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                usage = {"usage": {"prompt_tokens": int(headers.get("x-tokens", 0)), "completion_tokens": tokens}}
                if lines[0].startswith("get"):
                    await _write(writer, json.dumps({"object": "list", "data": [{"id": "base"}]}).encode())
                elif b'"stream": true' not in body:
                    await _write(writer, json.dumps({"id": "1", **_SAID["whole"], **usage}).encode())
                else:
                    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n")
                    writer.write(b"transfer-encoding: chunked\r\n\r\n")
                    for piece in [json.dumps({"id": "1", **_SAID["piece"], **usage})] * tokens + ["[DONE]"]:
                        event = f"data: {piece}\n\n".encode()
                        writer.write(b"%x\r\n%s\r\n" % (len(event), event))
                        await writer.drain()
                        await asyncio.sleep(pause)
                    writer.write(b"0\r\n\r\n")
                    await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", port)
    await server.serve_forever()


async def _write(writer: asyncio.StreamWriter, body: bytes) -> None:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    writer.write(head % len(body) + body)
    await writer.drain()


@contextlib.contextmanager
def process(*arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """Runs Python in a process of its own until the block ends."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with tempfile.TemporaryFile() as log:
        running = subprocess.Popen([sys.executable, *arguments], env=environment, stdout=log, stderr=log)
        try:
            yield running
        finally:
            running.terminate()
            running.wait(60)


def _used(pid: int) -> tuple[float, float]:
    """Processor seconds and MiB of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    seconds = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return seconds, int(fields[21]) * os.sysconf("SC_PAGE_SIZE") / 2**20


async def ask(
    url: str, model: str, requests: list[tuple[str, int, int]], streams: bool, at_once: int, tokens: int
) -> Row:
    """Sends requests, so many at once; returns milliseconds of each, until its first byte and until its last."""
    first, whole, room = list[float](), list[float](), asyncio.Semaphore(at_once)

    async def one(session: aiohttp.ClientSession, text: str, more: int, read: int) -> None:
        body = {"model": model, "max_tokens": tokens, "temperature": 0, "stream": streams, "ignore_eos": True}
        body["messages"] = [{"role": "user", "content": text}]
        if more:  # as many tokens in the place of a soft prompt
            body["messages"].insert(0, {"role": "system", "content": "a" + " a" * (more - 1)})
        async with room:
            start = time.perf_counter()
            async with session.post(url, json=body, headers={"x-tokens": str(read)}) as response:
                await response.content.readany()
                first.append(1000 * (time.perf_counter() - start))
                await response.read()
                if response.status != 200:
                    raise RuntimeError(f"{url} answers with {response.status}")
            whole.append(1000 * (time.perf_counter() - start))

    start = time.perf_counter()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        for at in range(0, len(requests), 1000):  # so that those that wait take no memory
            await asyncio.gather(*(one(session, *each) for each in requests[at : at + 1000]))
    return {"seconds": time.perf_counter() - start, "first": first, "whole": whole}


def measure(given: argparse.Namespace, folder: Path) -> list[Row]:
    """The lines of the table."""
    bundle = given.bundle
    if bundle is None:
        bundle = folder / "OUT"
        export_bundle(checkpoint("chat system", folder / "run", lambda kind: _tiny(folder, kind))[1]).save_pretrained(
            bundle
        )
    served = ServedPrompter(Bundle.from_pretrained(bundle))
    m, made = served.facts.num_virtual_tokens, served.requests(_TEXTS)
    sizes = [m + len(each.ids) for each in made]
    ports = []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    direct = given.upstream or f"http://127.0.0.1:{ports[0]}"
    gateway, call = (
        f"http://127.0.0.1:{ports[1]}",
        f"asyncio.run(upstream({ports[0]}, {given.tokens}, {given.token_ms / 1000}))",
    )
    fake = process("-c", f"import asyncio; from tests.benchmarks.gateway import upstream; {call}")
    options = ("--upstream", direct, "--bundle", f"bench={bundle}", "--port", str(ports[1]))
    with (
        fake if given.upstream is None else contextlib.nullcontext(),
        process("-m", "lopa_lightning", "serve", *options) as run,
    ):
        names = _wait(f"{gateway}/v1/models", run)
        base = given.model or names[-1]
        ways = {
            "direct": (direct, base, m),
            "plain, through the gateway": (gateway, base, m),
            "with a soft prompt, through it": (gateway, "bench", 0),
        }
        rows = []
        for answer in given.answers:
            found: dict[str, list[Row]] = {way: [] for way in ways}
            for number in range(given.rounds + 1):
                for way in list(ways)[:: -1 if number % 2 else 1]:
                    url, model, more = ways[way]
                    each = given.requests // (len(given.answers) * len(ways) * given.rounds) or 1
                    sent = [(_TEXTS[at % len(_TEXTS)], more, sizes[at % len(sizes)]) for at in range(each)]
                    before = _used(run.pid)
                    done = asyncio.run(
                        ask(f"{url}/v1/chat/completions", model, sent, answer == "stream", given.at_once, given.tokens)
                    )
                    after = _used(run.pid)
                    done |= {"cpu": after[0] - before[0], "mib": (before[1], after[1]), "count": each}
                    if number:
                        found[way].append(done)
            rows += [_row(way, answer, found[way], found["direct"]) for way in ways]
    return rows


def _row(way: str, answer: str, found: list[Row], direct: list[Row]) -> Row:
    whole, first = (np.concatenate([each[key] for each in found]) for key in ("whole", "first"))
    rates, bare = ([each["count"] / each["seconds"] for each in some] for some in (found, direct))
    firsts, bare_firsts = ([float(np.median(each["first"])) for each in some] for some in (found, direct))
    row = {
        **{"way": way, "answer": answer, "count": len(whole), "per_second": summary(rates)},
        **{"p50": float(np.median(whole)), "p99": float(np.percentile(whole, 99)), "first": float(np.median(first))},
        "seconds": [each["seconds"] for each in found],
    }
    if way == "direct":
        return row
    row |= {"over_direct": ratios(rates, bare), "first_over_direct": ratios(firsts, bare_firsts)}
    row["per_core"] = len(whole) / max(sum(each["cpu"] for each in found), 0.01)
    return row | {"mib_before": found[0]["mib"][0], "mib_after": found[-1]["mib"][1]}


def _tiny(folder: Path, kind: str) -> str:
    path = folder / kind
    if not path.is_dir():
        path.mkdir()
        save_tiny(kind, path)
    return str(path)


def _wait(url: str, run: subprocess.Popen[bytes]) -> list[str]:
    """The models' names, once there is an answer."""

    async def names() -> list[str]:
        for _ in range(600):
            with contextlib.suppress(aiohttp.ClientError):
                async with aiohttp.ClientSession() as session, session.get(url) as response:
                    if response.status == 200:
                        return [card["id"] for card in (await response.json())["data"]]
            if run.poll() is not None:
                break
            await asyncio.sleep(0.2)
        raise RuntimeError(f"no gateway at {url}")

    return asyncio.run(names())


def main(arguments: list[str] | None = None) -> None:
    """Runs the benchmark."""
    options = parser("gateway", __doc__)
    options.add_argument("--requests", type=int, default=6000, help="in all (default: 6000)")
    options.add_argument("--answers", nargs="+", choices=("whole", "stream"), default=["whole", "stream"])
    options.add_argument("--at-once", type=int, default=16, help="requests at once (default: 16)")
    options.add_argument("--tokens", type=int, default=16, help="of an answer (default: 16)")
    options.add_argument("--token-ms", type=float, default=5.0, help="between a fake stream's tokens (default: 5)")
    options.add_argument(
        "--upstream", help="a real server; by default one that answers at once, in a process of its own"
    )
    options.add_argument("--model", help="its model (default: its last)")
    options.add_argument(
        "--bundle", type=Path, help="folder of a bundle in a chat; by default one of tiny random models"
    )
    given = options.parse_args(arguments)
    if given.quick:
        given.requests, given.rounds = 48, 1
    with tempfile.TemporaryDirectory() as folder:
        report("gateway", given, measure(given, Path(folder)), _COLUMNS)


if __name__ == "__main__":
    main(sys.argv[1:])

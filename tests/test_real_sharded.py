"""Real weights under FSDP2 on two processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.modules.helpers import reviews
from tests.processes import logs, on_two
from tests.real_sharded_run import ROWS, fit, fit_on_two

Find = Callable[[str], str]

# tests/test_sharded.py shows the same of tiny models, where memory cannot be told from an interpreter's own.
pytestmark = [pytest.mark.real, pytest.mark.distributed, pytest.mark.slow]


def test_smollm2_is_never_whole_and_learns_as_on_one_process(real_model: Find, tmp_path: Path) -> None:
    model = real_model("HuggingFaceTB/SmolLM2-135M-Instruct")
    reviews(tmp_path, rows=ROWS)
    assert on_two(fit_on_two, model, tmp_path, folder=tmp_path) == [0, 0], logs(tmp_path)
    alone = fit(model, tmp_path)
    for rank in (0, 1):
        result = torch.load(tmp_path / f"rank{rank}.pt")
        print({name: value if name == "loss" else f"{value / 2**20:.0f} MiB" for name, value in result.items()})
        assert result["loss"] == pytest.approx(alone["loss"], abs=1e-4)
        layers = result["model"] - result["around"]
        assert result["held"] < result["model"] / 2 * 1.15
        assert result["loading"] < (layers / 2 + result["around"] * 1.5) * 1.15

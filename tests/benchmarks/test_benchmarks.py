"""The benchmarks run, and their files say what was measured; never how fast it was."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import json
import logging
import multiprocessing
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lopa_lightning.cli import main as lopa
from tests.benchmarks.cases import CASES, MINILM, SMOLLM2, Places
from tests.benchmarks.floor import FIXED, rectangle
from tests.benchmarks.images import CASES as OF_IMAGES
from tests.benchmarks.images import CLIP, IMAGES
from tests.benchmarks.padding import share
from tests.data.image_files import write_images
from tests.mini_code import write_mini_cruxeval, write_mini_mbpp
from tests.mini_glue import write_mini_glue
from tests.tiny import POSITIONS, save_tiny
from tests.tiny_images import save_vision, vision_model

Run = Callable[..., dict[str, Any]]

# Benchmarks of what others run: cases, floor and peers, whose turns, tables and files are those of all.
MORE = pytest.mark.slow

KINDS = ("minilm_sst2", "smollm2_mbpp")  # an encoder and a decoder; what is measured of the other cases is the same


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> Places:
    """Tiny models and data by the hub ids of the real ones."""
    models, data = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("data")
    for name, kind in ((MINILM, "bert_base"), (SMOLLM2, "llama")):
        (models / name).mkdir(parents=True)
        save_tiny(kind, models / name)
    save_vision(vision_model("clip"), models / CLIP)
    write_images(str(data / IMAGES))
    for name, write in (
        ("nyu-mll/glue", write_mini_glue),
        ("google-research-datasets/mbpp", write_mini_mbpp),
        ("cruxeval-org/cruxeval", write_mini_cruxeval),
    ):
        (data / name).mkdir(parents=True)
        write(data / name)
    return Places(models, data)


@pytest.fixture(autouse=True)
def _talkative_again() -> Iterator[None]:
    """A benchmark tells libraries to be quiet; the tests that follow must not be."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels):
        logger.setLevel(level)


@pytest.fixture
def run(roots: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a benchmark quickly, and returns what it wrote once that agrees with what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lopa"])
    # Folders with the last names of the real ones would be taken for these in a cache that both share.
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")

    def quickly(name: str, *arguments: str, **options: Any) -> dict[str, Any]:
        folders = ["--models-root", str(roots.models), "--data-root", str(roots.data)]
        path = tmp_path / f"{name}.json"
        module = importlib.import_module(f"tests.benchmarks.{name}")
        module.main(["--quick", *folders, "--json", str(path), *arguments], **options)
        record: dict[str, Any] = json.loads(path.read_text())
        printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
        assert len(printed) == 1 + len(record["rows"])
        assert record["benchmark"] == name
        assert record["environment"]["torch"] == importlib.metadata.version("torch")
        assert record["environment"]["threads"] == torch.get_num_threads()
        return record

    return quickly


def in_this_process(arguments: list[str], additions: Mapping[str, str]) -> None:
    """What the benchmarks start in a process of its own."""
    if arguments[0] == "lopa_lightning":
        lopa(arguments[1:])
    else:
        importlib.import_module(arguments[0]).main(arguments[1:])


def check_summary(found: Mapping[str, float], values: list[float]) -> None:
    assert found == pytest.approx({"median": statistics.median(values), "min": min(values), "max": max(values)})


def check_ratio(found: Mapping[str, float], above: list[float], below: list[float]) -> None:
    assert len(above) == len(below) >= 1
    check_summary(found, [a / b for a, b in zip(above, below)])


def test_floor(run: Run) -> None:
    rows = {row["case"]: row for row in run("floor", "--cases", *KINDS, FIXED)["rows"]}
    assert list(rows) == [*KINDS, FIXED]
    for row in rows.values():
        seconds = row["seconds"]
        learned = ["with_loss", "padded_with_loss"] if row["case"].startswith("smollm2") else []
        assert set(seconds) == {"ours", "floor", "padded", *learned}
        assert all(len(values) == 2 for values in seconds.values())
        check_ratio(row["ratio"], seconds["ours"], seconds["floor"])
        for kind in ("padded", *learned):
            check_ratio(row[f"over_{kind}"], seconds["ours"], seconds[kind])
        check_summary(row["ours"], [1000 * each / row["batches"] for each in seconds["ours"]])
        assert row["operations"] > 1
    fixed = rows[FIXED]  # cut to the tiny model's positions, all alike
    assert (fixed["tokens"], fixed["padding"]) == (fixed["examples"] * POSITIONS, 0)


def test_the_floor_has_a_batchs_tokens_and_no_padding() -> None:
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0], [1, 1, 1, 0]])
    ids = torch.arange(12).view(3, 4)
    found = rectangle({"input_ids": ids, "attention_mask": mask})
    assert found.tolist() == [[0, 1, 2], [3, 5, 6], [8, 9, 10]]


@pytest.mark.slow
def test_images(run: Run) -> None:
    rows = run("images")["rows"]
    assert [row["case"] for row in rows] == list(OF_IMAGES)
    for row in rows:
        seconds = row["seconds"]
        assert set(seconds) == {"ours", "floor", "lora"}
        check_ratio(row["ratio"], seconds["ours"], seconds["floor"])
        check_ratio(row["over_lora"], seconds["lora"], seconds["ours"])
        assert 1 <= row["operations"] < 1.2
        assert row["images"] == 2


@pytest.mark.slow
def test_peers(run: Run) -> None:
    rows = run("peers", "--cases", *KINDS)["rows"]
    assert [row["case"] for row in rows] == list(KINDS)
    for row in rows:
        seconds = row["seconds"]
        assert set(seconds) == {"ours", "floor", "prompt_tuning", "lora", "released"}
        assert row["examples"] == 4
        for name, values in seconds.items():
            check_summary(row[name], [row["examples"] / each for each in values])
            if name not in ("ours", "floor"):
                check_ratio(row[f"over_{name}"], values, seconds["ours"])
                check_ratio(row[f"floor_over_{name}"], values, seconds["floor"])


@MORE
def test_memory(run: Run) -> None:
    (row,) = run("memory", run=in_this_process)["rows"]
    above = row["above"]
    assert set(above) == {"ours", "floor", "prompt_tuning", "lora", "released"}
    assert all(loaded > 50 for loaded in row["loaded"].values())  # MiB of an interpreter with torch in it
    for name, values in above.items():
        check_summary(row[name], values)


@MORE
def test_scaling(run: Run) -> None:
    rows = run("scaling", "--axes", "tokens", "rows", run=in_this_process)["rows"]
    by_axis = {axis: [row for row in rows if row["axis"] == axis] for axis in ("tokens", "rows")}
    for axis, lines in by_axis.items():
        small, large = lines
        assert small["size"] < large["size"]
        times = [row["first"] if axis == "rows" else statistics.median(row["seconds"]) for row in (small, large)]
        slope = np.log(times[1] / times[0]) / np.log(large["size"] / small["size"])
        assert large["exponent"] == pytest.approx(slope)
    small, large = by_axis["rows"]
    for name, growth in large["growth"].items():
        assert growth == pytest.approx((large[name] - small[name]) / (large["size"] - small["size"]) * 1e5)


def test_shares(run: Run) -> None:
    whole, *operators = run("shares", "--cases", FIXED, "--top", "1000")["rows"]
    for side in ("ours", "floor"):
        assert whole[side] == pytest.approx(sum(row[side] for row in operators))
    assert whole["more"] == pytest.approx(sum(row["more"] for row in operators))
    by_name = {row["operator"]: row for row in operators}
    # Two layers of attention, forward and back, on both sides; only a training step chooses with cross entropy.
    attention = by_name["aten::_scaled_dot_product_flash_attention_for_cpu"]
    assert attention["ours_calls"] >= attention["floor_calls"] == 2
    assert by_name["aten::_log_softmax"]["ours_calls"] >= 1 > by_name["aten::_log_softmax"]["floor_calls"]


def test_padding(run: Run) -> None:
    rows = run("padding")["rows"]
    assert [row["case"] for row in rows] == list(CASES)
    assert share(np.array([3, 1, 4]), [[0, 1], [2]]) == pytest.approx(2 / 10)
    for row in rows:
        assert all(0 <= row[name] < 100 for name in ("plain", "train", "budget", "val"))


@pytest.mark.slow
def test_generate(run: Run) -> None:
    rows = run("generate")["rows"]
    assert [row["case"] for row in rows] == ["smollm2_mbpp", "smollm2_cruxeval_output"]
    for row in rows:
        seconds = row["seconds"]
        check_ratio(row["over_plain"], seconds["plain"], seconds["ours"])
        check_ratio(row["over_singly"], seconds["singly"], seconds["together"])
        check_summary(row["together"], [row["samples"] * row["new_tokens"] / each for each in seconds["together"]])
        assert row["prompt_tokens"] + row["new_tokens"] == POSITIONS  # these prompts fill what a tiny model has


@pytest.mark.slow
def test_cache(run: Run) -> None:
    (row,) = run("cache", run=in_this_process)["rows"]
    seconds = row["seconds"]
    check_ratio(row["ratio"], seconds["first"], seconds["second"])
    for name in ("first", "second"):
        assert 0 < seconds[f"{name}_ready"][0] < seconds[name][0]
        check_summary(row[name], seconds[name])


@MORE
def test_options(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.compile", functools.partial(torch.compile, backend="eager"))  # the real one: minutes
    rows = run("options", "--cases", "minilm_rte")["rows"]
    assert [row["option"] for row in rows] == ["compile", "eager", "bfloat16", "bfloat16_eager", "adapted_encoder"]
    assert [row["operations"] for row in rows[:4]] == [None, None, 1, None]
    for row in rows:
        check_ratio(row["ratio"], row["seconds"]["plain"], row["seconds"][row["option"]])
    assert rows[4]["operations"] > 1  # a pass of the encoder beside the backbone's
    assert rows.pop()["difference"] is None
    for row in rows:
        assert row["difference"] < (0.2 if row["option"].startswith("bfloat16") else 1e-4)


def test_startup(run: Run) -> None:
    started: list[str] = []
    rows = run("startup", run=lambda arguments, additions: started.append(" ".join(arguments[:2])))["rows"]
    imports, *commands = rows
    assert sorted(set(started)) == ["lopa_lightning --help", "lopa_lightning fit", "tests.benchmarks.imports"]
    for row in commands:
        check_ratio(row["ratio"], row["seconds"], imports["seconds"])
        check_summary(row["seconds_each"], row["seconds"])


@MORE
def test_time_to_accuracy(run: Run) -> None:
    rows = {row["side"]: row for row in run("time_to_accuracy")["rows"]}
    assert list(rows) == ["ours, prompt tuning", "ours, LoPA", "(a) PEFT prompt tuning", "(b) PEFT LoRA r=8"]
    for row in rows.values():
        assert [seen for seen, _, _ in row["points"]] == [8]
        assert row["final"] == row["points"][-1][2]
        for name, title in (("prompt_tuning", "(a) PEFT prompt tuning"), ("lora", "(b) PEFT LoRA r=8")):
            best = max(accuracy for _, _, accuracy in row["points"])
            assert (row[f"examples_{name}"] is not None) == (best >= rows[title]["final"])


@contextmanager
def in_a_fork(*arguments: str) -> Iterator[SimpleNamespace]:
    """What the gateway's benchmark starts as a Python of its own, which would import everything."""
    first, code, *rest = arguments
    called: Any = functools.partial(exec, code, {}) if first == "-c" else functools.partial(lopa, rest)
    forked = multiprocessing.get_context("fork").Process(target=called)
    forked.start()
    try:
        yield SimpleNamespace(pid=forked.pid, poll=lambda: forked.exitcode)
    finally:
        forked.terminate()
        forked.join(60)


@pytest.mark.slow
def test_gateway(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.benchmarks.gateway.process", in_a_fork)
    rows = run("gateway")["rows"]
    ways = ["direct", "plain, through the gateway", "with a soft prompt, through it"]
    assert [(row["answer"], row["way"]) for row in rows] == [
        (kind, way) for kind in ("whole", "stream") for way in ways
    ]
    for row in rows:
        assert row["count"] == 8
        assert 0 < row["first"] <= row["p50"] <= row["p99"]
        assert row["way"] == "direct" or row["per_core"] > 0

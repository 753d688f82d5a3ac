"""FSDP2 on two processes: the run of DDP, with a backbone that no process holds whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything

from lopa_lightning import LoPALightningModule
from tests.modules.helpers import completions, reviews, trainer
from tests.processes import logs, on_two
from tests.sharded_run import ROWS, fit_all, made, written

Tiny = Callable[[str], str]
Ranks = tuple[Path, list[dict[str, Any]]]

KINDS = {
    "decoder": ["", "backbone.model.model.layers.0", "backbone.model.model.layers.1"],
    "encoder": [
        *("", "instance_encoder.model.encoder.layer.0", "instance_encoder.model.encoder.layer.1"),
        *("backbone.model.bert.encoder.layer.0", "backbone.model.bert.encoder.layer.1"),
    ],
    "adapted": [
        *("", "instance_encoder.model.encoder.layer.0", "instance_encoder.model.encoder.layer.1"),
        *("backbone.model.bert.encoder.layer.0", "backbone.model.bert.encoder.layer.1"),
    ],
    "lora": ["", "backbone.model.transformer.h.0", "backbone.model.transformer.h.1"],
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def models(tiny: Tiny) -> dict[str, str]:
    return {name: tiny(name) for name in ("bert", "bert_base", "gpt2", "llama")}


@pytest.fixture(scope="module")
def ranks(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    folder = tmp_path_factory.mktemp("fsdp")
    seed_everything(3)
    trainer(folder, 1).fit(made("head", models(tiny)), reviews(folder, rows=ROWS))
    saved = torch.load(folder / "last.ckpt", weights_only=True)
    torch.save(saved, folder / "single.ckpt")
    del saved["state_dict"]["net.readout.linear.bias"]
    torch.save(saved, folder / "lacking.ckpt")
    completions(folder / "completions")  # written once, before two processes would write it
    assert on_two(fit_all, folder, models(tiny), folder=folder) == [0, 0], logs(folder)
    return folder, [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


def farthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert set(one) == set(other)
    return max(float((value - other[name]).abs().max()) for name, value in one.items())


@each_kind
def test_ranks_end_alike_and_where_ddp_ends(ranks: Ranks, kind: str) -> None:
    first, second = (result[f"{kind}-fsdp"] for result in ranks[1])
    assert farthest(first["state"], second["state"]) == 0
    assert farthest(first["state"], ranks[1][0][f"{kind}-ddp"]["state"]) < 1e-6
    assert {value.dtype for value in first["state"].values()} == {torch.float32}


def test_accumulated_batches_are_those_of_ddp(ranks: Ranks) -> None:
    """Three batches in steps of two: the gradient of the last is scaled."""
    accumulated, of_ddp = (ranks[1][0][f"accumulated-{how}"] for how in ("fsdp", "ddp"))
    assert accumulated["step"] == 2
    assert farthest(accumulated["state"], of_ddp["state"]) < 1e-6


@each_kind
def test_validation_is_that_of_ddp(ranks: Ranks, kind: str) -> None:
    for result in ranks[1]:
        assert result[f"{kind}-fsdp"]["validated"] == pytest.approx(
            result[f"{kind}-ddp"]["validated"], rel=1e-5, abs=1e-5
        )


@each_kind
def test_every_layer_is_a_group_and_each_rank_holds_half(ranks: Ranks, kind: str) -> None:
    for result in ranks[1]:
        assert result[f"{kind}-fsdp"]["sharded"] == KINDS[kind]
        held, frozen, trained = result[f"{kind}-fsdp"]["sizes"]
        assert held == pytest.approx((frozen + trained) / 2, rel=0.01)
        assert result[f"{kind}-ddp"]["sizes"][0] == frozen + trained


@each_kind
def test_a_save_gathers_what_is_trained_and_nothing_frozen(ranks: Ranks, kind: str) -> None:
    for result in ranks[1]:
        _, frozen, trained = result[f"{kind}-fsdp"]["sizes"]
        (gathered,) = result[f"{kind}-fsdp"]["saves"]
        weights_and_moments = 3 * trained
        assert weights_and_moments <= gathered < weights_and_moments * 1.05 + 100
    assert frozen > 300


@each_kind
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_a_step_sends_what_lopa_plan_says(ranks: Ranks, kind: str, how: str) -> None:
    for result in ranks[1]:
        sent, small = result[f"{kind}-{how}"]["sent"]
        assert sent == pytest.approx(ranks[1][0][f"{kind}-{how}"]["planned"], rel=0.02, abs=64)
        assert small == 1  # whether a loss was none, and of how many things it is the mean


@each_kind
def test_a_frozen_part_in_bfloat16_stays_so(ranks: Ranks, kind: str) -> None:
    expected = {"decoder": ["torch.bfloat16"]}.get(kind, ["torch.float32"])
    assert ranks[1][0][f"{kind}-fsdp"]["dtypes"] == expected


@pytest.mark.parametrize(("before", "how"), [("ddp", "all"), ("stock", "stock")])
def test_a_run_goes_on_under_any_strategy(ranks: Ranks, before: str, how: str) -> None:
    folder, results = ranks
    for result in results:
        assert (result[f"{before}-2"]["step"], result[f"{how}-3"]["step"]) == (9, 12)  # after 6 on one process
        assert farthest(result[f"{how}-3"]["state"], result["ddp-3"]["state"]) < 1e-6
    paths = {name: next((folder / f"{name}-3").glob("*/last.ckpt")) for name in (how, "ddp")}
    saved, wanted = (torch.load(paths[name], weights_only=True) for name in (how, "ddp"))
    assert set(saved) == set(wanted)
    assert farthest(saved["state_dict"], wanted["state_dict"]) < 1e-6
    moments, expected = (each["optimizer_states"][0]["state"] for each in (saved, wanted))
    assert set(moments) == set(expected)
    for index, entry in expected.items():
        for name, value in entry.items():
            torch.testing.assert_close(moments[index][name], value, rtol=0, atol=1e-6)


def test_one_process_goes_on_from_fsdp_and_predicts_the_same(ranks: Ranks, tiny: Tiny, tmp_path: Path) -> None:
    folder, results = ranks
    last = folder / "all-3" / "head-fsdp" / "last.ckpt"
    loaded = LoPALightningModule.load_from_checkpoint(last)
    (alone,) = trainer(tmp_path).validate(loaded, reviews(folder, rows=ROWS), verbose=False)
    assert results[0]["all-3"]["validated"] == pytest.approx(alone, rel=1e-5, abs=1e-5)
    states = []
    for name in ("all-3/head-fsdp", "ddp-3/head-ddp"):
        seed_everything(3)
        (tmp_path / name).mkdir(parents=True)
        run, model = trainer(tmp_path / name, 4), made("head", models(tiny))
        run.fit(model, reviews(folder, rows=ROWS), ckpt_path=folder / name / "last.ckpt")
        assert run.global_step == 18
        states.append(model.state_dict())
    assert farthest(*states) < 1e-6


@pytest.mark.parametrize("how", ["fsdp", "stock"])
def test_a_checkpoint_that_lacks_a_tensor_is_refused(ranks: Ranks, how: str) -> None:
    for result in ranks[1]:
        assert "net.readout.linear.bias: missing in the checkpoint" in result["refused"][how]


def test_a_sharded_backbone_writes_what_a_whole_one_writes(ranks: Ranks, tiny: Tiny, tmp_path: Path) -> None:
    alone, both = written(tmp_path, tiny("llama")), [result["written"] for result in ranks[1]]
    assert not set(both[0]["sampled"]) & set(both[1]["sampled"])
    sampled = {**both[0]["sampled"], **both[1]["sampled"]}
    assert sampled == {row: alone["sampled"][row] for row in sampled}
    assert len(sampled) == 21 - both[0]["left"] - both[1]["left"]
    assert (both[0]["left"], both[1]["left"] > 1) == (1, True)
    assert len({len(text) for texts in alone["sampled"].values() for text in texts}) > 3
    for name in ("greedy", "beams"):
        assert [*both[0][name], *both[1][name]] == alone[name]
    assert all("must complete as many texts each, got [1, 2]" in each["uneven"] for each in both)

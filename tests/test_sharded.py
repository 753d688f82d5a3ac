"""FSDP2 on two processes: the run of DDP, with a backbone that no process holds whole."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import seed_everything
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lopa_lightning import LoPALightningModule
from lopa_lightning.callbacks.pictures import confusion_picture
from tests.data.image_files import LABELS, write_images
from tests.modules.helpers import completions, reviews, trainer
from tests.processes import logs, on_two
from tests.sharded_run import ROWS, fit_all, images, made, written
from tests.tiny_images import LAYERS, save_vision, vision_model

Tiny = Callable[[str], str]
Ranks = tuple[Path, list[dict[str, Any]]]

# By default FSDP2 runs through the command line alone, in tests/test_distributed.py.
pytestmark = [pytest.mark.distributed, pytest.mark.slow]

KINDS = {
    "decoder": ["", "backbone.model.model.layers.0", "backbone.model.model.layers.1"],
    "after": ["", "backbone.model.model.layers.0", "backbone.model.model.layers.1"],
    "encoder": [
        *("", "instance_encoder.model.encoder.layer.0", "instance_encoder.model.encoder.layer.1"),
        *("backbone.model.bert.encoder.layer.0", "backbone.model.bert.encoder.layer.1"),
    ],
    "adapted": [
        *("", "instance_encoder.model.encoder.layer.0", "instance_encoder.model.encoder.layer.1"),
        *("backbone.model.bert.encoder.layer.0", "backbone.model.bert.encoder.layer.1"),
    ],
    "copy": [
        *("", "instance_encoder.model.layers.0", "instance_encoder.model.layers.1"),
        *("backbone.model.model.layers.0", "backbone.model.model.layers.1"),
    ],
    "lora": ["", "backbone.model.transformer.h.0", "backbone.model.transformer.h.1"],
    "image": ["", *(f"backbone.model.layers.{layer}" for layer in range(LAYERS))],
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def models(tiny: Tiny, folder: Path | None = None) -> dict[str, str]:
    found = {name: tiny(name) for name in ("bert", "bert_base", "gpt2", "llama")}
    return found if folder is None else {**found, "vit": save_vision(vision_model("vit"), folder / "vit")}


@pytest.fixture(scope="module")
def ranks(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Ranks:
    tests = [test for test in request.session.items if isinstance(test, pytest.Function) and test.path == request.path]
    asked_for = {str(value) for test in tests if hasattr(test, "callspec") for value in test.callspec.params.values()}
    asked_for |= {"image"} if any("images" in test.name for test in tests) else set()
    folder = tmp_path_factory.mktemp("fsdp")
    seed_everything(3)
    trainer(folder, 1).fit(made("head", models(tiny)), reviews(folder, rows=ROWS))
    saved = torch.load(folder / "last.ckpt", weights_only=True)
    torch.save(saved, folder / "single.ckpt")
    del saved["state_dict"]["net.readout.linear.bias"]
    torch.save(saved, folder / "lacking.ckpt")
    completions(folder / "completions")  # written once, before two processes would write it
    write_images(str(folder / "images"), each=8)
    assert on_two(fit_all, folder, models(tiny, folder), asked_for, folder=folder) == [0, 0], logs(folder)
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
        uneven = 0.04 if kind == "image" else 0.01  # ViT's positions are one row, which is not split
        assert held == pytest.approx((frozen + trained) / 2, rel=uneven)
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


def test_images_are_learned_as_by_one_process_which_loads_the_checkpoint(
    ranks: Ranks, tiny: Tiny, tmp_path: Path
) -> None:
    folder, results = ranks
    paths = models(tiny, folder)  # whose weights are random
    seed_everything(3)
    alone, run = made("image", paths), trainer(tmp_path)
    run.fit(alone, images(folder, batch_size=8))
    assert (run.global_step, results[0]["image-fsdp"]["step"]) == (3, 3)
    assert farthest(results[0]["image-fsdp"]["state"], dict(alone.state_dict())) < 1e-6
    loaded = LoPALightningModule.load_from_checkpoint(folder / "image-fsdp" / "last.ckpt")
    (validated,) = trainer(tmp_path).validate(loaded, images(folder), verbose=False)
    assert results[0]["image-fsdp"]["validated"] == pytest.approx(validated, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_the_first_process_shows_images_of_its_own_and_the_confusion_of_all(ranks: Ranks, how: str) -> None:
    folder = ranks[0]
    events = EventAccumulator(str(folder / f"image-{how}")).Reload()
    assert {"val/images", "prompt/looks_at", "prompt/looked_at"} <= set(events.Tags()["images"])
    loaded = LoPALightningModule.load_from_checkpoint(folder / f"image-{how}" / "last.ckpt")
    counts = np.zeros((3, 3), np.int64)
    for row, label in enumerate(LABELS):
        for answer in loaded.predict(sorted((folder / "images" / "validation" / label).iterdir())):
            counts[row, LABELS.index(answer["label"])] += 1
    drawn = Image.open(io.BytesIO(events.Images("val/confusion")[-1].encoded_image_string))
    assert (np.asarray(drawn) == confusion_picture(counts, LABELS)).all()


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

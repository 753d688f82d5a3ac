"""Two processes on a CPU, with gloo."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch.distributed import run as torchrun

from lopa_lightning import LoPALightningModule, NoPrompt
from lopa_lightning.cli import main
from tests.data.image_files import write_images
from tests.distributed_run import INSTANCE_LOSSES, MATCHING, adapted, fit_and_evaluate, of_images
from tests.modules.helpers import causal, completions, reviews, trainer
from tests.modules.test_window import OPTIONS, SIZES, UNEQUAL, as_one_batch, rows_of
from tests.processes import forked, logs, on_two
from tests.tiny_images import save_vision, vision_model

Tiny = Callable[[str], str]
Ranks = tuple[Path, list[dict[str, Any]]]

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.distributed


def _half_right(backbone: str) -> list[dict[str, str]]:
    """Rows of which 0, 2 and 4 (and every second one after) have the completion that the backbone writes."""
    prompts = [f"the film {'was ' * (i % 4)}" for i in range(21)]
    model = causal(backbone, **MATCHING)
    model.learned = True  # as if
    texts = model.generate(prompts, batch_size=1)
    return [
        {"prompt": prompt, "completion": "another" if i % 2 else text}
        for i, (prompt, (text,)) in enumerate(zip(prompts, texts))
    ]


@pytest.fixture(scope="module")
def ranks(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    folder = tmp_path_factory.mktemp("ddp")
    reviews(folder, rows=21)  # written once, before two processes would write it
    (folder / "adapted").mkdir()
    reviews(folder / "adapted", rows=12)
    completions(folder / "completions")
    completions(folder / "unequal", UNEQUAL)
    save_vision(vision_model("vit"), folder / "photos" / "vit")
    write_images(str(folder / "photos" / "images"))
    (folder / "matching.json").write_text(json.dumps(_half_right(tiny("llama"))))
    completions(folder / "matching", json.loads((folder / "matching.json").read_text()))
    cache = folder / "cache"  # what others have encoded must be encoded here
    statuses = on_two(fit_and_evaluate, tiny("bert_base"), tiny("llama"), folder, folder=folder, cache=cache)
    assert statuses == [0, 0], logs(folder)
    return folder, [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


def arguments(overlay: str, backbone: str) -> list[str]:
    config, trainer_config = ROOT / "configs" / "own_csv.yaml", ROOT / "configs" / "trainer" / f"{overlay}.yaml"
    return [
        *("fit", "--config", str(config), "--config", str(trainer_config), f"--model.backbone.name={backbone}"),
        *("--data.data_files", '{"train": "train.csv", "validation": "validation.csv"}'),
        *("--data.labels", '["good", "bad"]', "--data.batch_size=4", "--trainer.max_epochs=1"),
        *("--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.log_every_n_steps=1"),
    ]


@pytest.mark.slow  # to the two forks of the other tests ``on_two`` gives the environment that it gives processes
def test_torchrun_ends_well_on_two_processes(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    reviews(tmp_path, rows=21)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(datasets.config.HF_DATASETS_CACHE))
    command = ["--standalone", "--nproc-per-node=2", "-m", "lopa_lightning", *arguments("ddp", tiny("bert_base"))]
    log = tmp_path / "log.txt"
    assert forked(lambda: torchrun.main(command), log) == 0, log.read_text()[-3000:]
    check_run(tmp_path, log.read_text())


# Above, DDP is that of Trainers in Python.
@pytest.mark.parametrize("overlay", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_the_command_line_ends_well(overlay: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    reviews(tmp_path, rows=21)
    assert on_two(main, arguments(overlay, tiny("bert_base")), folder=tmp_path) == [0, 0], logs(tmp_path)
    check_run(tmp_path, "".join((tmp_path / f"log{rank}.txt").read_text() for rank in (0, 1)))


def check_run(folder: Path, said: str) -> None:
    assert said.count("Best validation") == 1
    assert (folder / "runs" / "lopa" / "version_0" / "checkpoints" / "best.ckpt").is_file()


def test_ranks_end_with_equal_parameters(ranks: Ranks) -> None:
    first, second = (result["state"] for result in ranks[1])
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_frozen_tensors_are_left_out_of_what_ddp_sends(ranks: Ranks, tiny: Tiny) -> None:
    loaded = LoPALightningModule.load_from_checkpoint(ranks[0] / "last.ckpt")
    frozen = {name for name, p in loaded.named_parameters() if not p.requires_grad}
    for result in ranks[1]:
        assert frozen <= result["ignored"]
        assert not result["ignored"] & set(result["state"])


def test_one_process_encodes_each_text_and_training_is_as_if_all_had(ranks: Ranks) -> None:
    texts = set((ranks[0] / "train.csv").read_text().splitlines()[1:])  # the validation set has the same
    assert [result["encoded"] for result in ranks[1]] == [len(texts), 0]
    for result in ranks[1]:
        for name, value in result["plain_state"].items():
            torch.testing.assert_close(result["state"][name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("instance_loss", INSTANCE_LOSSES)
def test_an_adapted_encoder_on_two_processes_is_that_of_one(ranks: Ranks, tiny: Tiny, instance_loss: float) -> None:
    alone = adapted(tiny("bert_base"), ranks[0] / "adapted", 12, instance_loss)
    assert ("net.instance_readout.weight" in alone) == (instance_loss > 0)
    assert max(float(value.abs().max()) for name, value in alone.items() if "lora_B" in name) > 1e-5
    for result in ranks[1]:
        found = result["adapted"][instance_loss]
        assert set(found) == set(alone)
        for name, value in alone.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6)


def test_images_on_two_processes_are_learned_as_on_one(ranks: Ranks) -> None:
    photos = ranks[0] / "photos"
    alone, before = of_images(photos, 12), of_images(photos, 12, epochs=1)
    for result in ranks[1]:
        assert result["of_images"]["validated"] == pytest.approx(alone["validated"], abs=1e-5)
        assert set(result["of_images"]["state"]) == set(alone["state"])
        for name, value in alone["state"].items():
            torch.testing.assert_close(result["of_images"]["state"][name], value, rtol=0, atol=1e-6)
    name = "net.prompt_encoder.shared_prompt.weight"
    assert (alone["state"][name] - before["state"][name]).abs().max() > 1e-3


def test_each_example_is_evaluated_once(ranks: Ranks) -> None:
    seen = [set(result["seen"]) for result in ranks[1]]
    assert seen[0] | seen[1] == set(range(21))
    assert not seen[0] & seen[1]


def test_metrics_are_those_of_one_process(ranks: Ranks) -> None:
    folder, results = ranks
    model = LoPALightningModule.load_from_checkpoint(folder / "last.ckpt")
    (alone,) = trainer(folder).validate(model, reviews(folder, rows=21), verbose=False)
    for result in results:
        assert result["validated"] == pytest.approx(alone, rel=1e-5, abs=1e-5)


def test_every_token_of_a_completion_counts_once_over_the_processes(ranks: Ranks, tiny: Tiny) -> None:
    """The untrained module of the same seed, on one process: its batches hold other numbers of tokens."""
    folder, results = ranks
    assert results[0]["completed"] == results[1]["completed"]
    assert results[0]["completed"]["val/perplexity"] == pytest.approx(
        math.exp(results[0]["completed"]["val/loss"]), rel=1e-5
    )
    model = causal(tiny("llama"), prompt_encoder=NoPrompt, train_backbone=True)
    (alone,) = trainer(folder).validate(model, completions(folder / "completions"), verbose=False)
    assert results[0]["completed"] == pytest.approx(alone, rel=1e-5, abs=1e-5)


def test_exact_match_is_the_share_over_all_processes(ranks: Ranks) -> None:
    """Rows 0, 2 and 4 of the first five match, and the two processes have unequal numbers of the five."""
    assert [result["matched"] for result in ranks[1]] == [pytest.approx(3 / 5)] * 2


@pytest.mark.parametrize("number", range(len(SIZES)))
def test_a_step_of_all_processes_is_one_large_batch(ranks: Ranks, tiny: Tiny, number: int) -> None:
    """Accumulated completions: every labelled token counts once, whatever batch and process it is on."""
    folder, results = ranks
    first, second = (result["accumulated"][number] for result in results)
    model = causal(tiny("llama"), **OPTIONS)
    model.configure_model()
    model.load_state_dict(first["state"])
    data = completions(folder / "unequal", UNEQUAL)
    data.connect(model.input_spec)
    data.setup("fit")
    rows = {int(row["index"]): row for batch in data.train_dataloader() for row in rows_of(batch)}
    assert len(first["rows"]) > 1
    examples = sum(map(len, first["rows"]))
    for mine, others, *gradients in zip(
        first["rows"], second["rows"], first["gradients"], second["gradients"], strict=True
    ):
        share = len(mine) / (examples / len(first["rows"])) if "batch_tokens" in SIZES[number] else 1.0
        for name, value in as_one_batch(model, [rows[row] for row in [*mine, *others]]).items():
            for found in gradients:
                torch.testing.assert_close(found[name], value * share, rtol=1e-5, atol=1e-6)

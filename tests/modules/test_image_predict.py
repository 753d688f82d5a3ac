"""Runs on images from the command line, and answers for images in Python: in the view of training, or not at all."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lopa_lightning import ImageClassificationDataModule, ImageClassificationModule, LoPALightningModule, Task
from lopa_lightning.backbones.pretrained import PretrainedSpec
from lopa_lightning.cli import main
from lopa_lightning.errors import LoPAError
from lopa_lightning.modules import builder
from tests.data.image_files import LABELS, write_images
from tests.modules.helpers import trainer
from tests.tiny_images import save_vision, vision_model

METHODS = Path(__file__).parents[2] / "configs" / "methods"
RUN = """
model:
  class_path: lopa_lightning.ImageClassificationModule
  init_args:
    backbone: {name: vit}
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.01}}
data:
  class_path: lopa_lightning.ImageClassificationDataModule
  init_args: {path: images, view: crop_flip, batch_size: 6}
trainer: {max_epochs: 2, accelerator: cpu, devices: 1, enable_progress_bar: false, log_every_n_steps: 1}
"""
SIDES = "the (checkpoint|model) has {}, (this run|the data) {}"
RESIZED, CROPPED = SIDES.format(13, r"\[12, 12\]"), SIDES.format(True, False)
OTHER = rf"(view\.)?resize: {RESIZED}; (task\.view\.)?crop: {CROPPED}$"
VIT: dict[str, Any] = {"backbone": PretrainedSpec("vit")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, whose processor resizes to 12 x 12, images, and a configuration."""
    at = tmp_path_factory.mktemp("runs")
    save_vision(vision_model("vit"), at / "vit")
    write_images(str(at / "images"))
    (at / "run.yaml").write_text(RUN)
    return at


@pytest.fixture(autouse=True)
def _there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def fit(method: str, *more: str) -> Path:
    """Trains from the command line, and returns the run's folder."""
    config = ["--config", "run.yaml", "--config", str(METHODS / f"{method}.yaml")]
    main(["fit", *config, "--trainer.logger.name", method, *more])
    return Path(max(Path("runs", method).glob("version_*"), key=lambda run: run.stat().st_mtime))


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    """A checkpoint of VPT-deep, trained on crops."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return (folder / fit("vpt_deep") / "checkpoints" / "last.ckpt").absolute()


def data(**options: Any) -> ImageClassificationDataModule:
    return ImageClassificationDataModule(path="images", **{"view": "crop_flip", "batch_size": 5, **options})


def same(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    assert [row["label"] for row in found] == [row["label"] for row in wanted]
    for row, other in zip(found, wanted, strict=True):
        assert row["probabilities"] == pytest.approx(other["probabilities"], abs=1e-6)


# Shallow virtual tokens are shown as deep ones are.
@pytest.mark.slow
@pytest.mark.parametrize(
    "method", [pytest.param("vpt_shallow", marks=pytest.mark.slow), "vpt_deep", "lopa_vision_deep"]
)
def test_a_run_is_shown_in_tensorboard(method: str, trained: Path) -> None:
    run = trained.parents[1] if method == "vpt_deep" else fit(method)
    tags = EventAccumulator(str(run)).Reload().Tags()
    assert {"val/score", "val/loss", "gradient_norm/shared_prompt"} <= set(tags["scalars"])
    assert "prompt/cosines" in tags["images"]
    assert ("prompt/gate" in tags["histograms"]) == (method == "lopa_vision_deep")


def test_a_checkpoint_alone_predicts_as_a_trainer_does_with_the_data_of_training(trained: Path) -> None:
    loaded = LoPALightningModule.load_from_checkpoint(trained)
    assert (loaded.processing.resize, loaded.processing.crop) == (13, True)
    run = trainer(trained.parent, callbacks=[])
    batches = run.predict(loaded, data()) or []
    rows = sorted((row for batch in batches for row in loaded.prediction_rows(batch)), key=lambda row: row["index"])
    wanted = [{key: value for key, value in row.items() if key != "index"} for row in rows]
    paths = [path for label in LABELS for path in sorted(Path("images", "test", label).glob("*.png"))]
    assert len(wanted) == len(paths) == 12
    same(loaded.predict(paths), wanted)
    same(loaded.predict([str(path) for path in paths], batch_size=5), wanted)
    same(loaded.predict([np.asarray(Image.open(path)) for path in paths]), wanted)
    opened = [Image.open(path) for path in paths]
    same(loaded.predict([opened[0], *opened, paths[1].read_bytes()]), [wanted[0], *wanted, wanted[1]])
    for one in (paths[7], str(paths[7]), Image.open(paths[7]), np.asarray(Image.open(paths[7])), iter(paths[7:8])):
        same(loaded.predict(one), wanted[7:8])
    assert loaded.predict([]) == []
    # Seen otherwise, the images are others.
    loaded.processing = replace(loaded.processing, resize=(12, 12), crop=False)
    assert loaded.predict(paths[0])[0]["probabilities"] != pytest.approx(wanted[0]["probabilities"], abs=1e-4)


@pytest.mark.slow
def test_an_instance_encoder_with_another_processing_reads_its_own_view(folder: Path) -> None:
    save_vision(vision_model("clip"), folder / "clip", image_mean=[0.1, 0.2, 0.3], resample=3)
    encoder = ["--model.instance_encoder.name", "clip", "--model.instance_encoder.pooling", "cls"]
    run = fit("lopa_vision_deep", *encoder, "--trainer.max_epochs", "1")
    loaded = LoPALightningModule.load_from_checkpoint(run / "checkpoints" / "last.ckpt")
    batches = trainer(folder, callbacks=[]).predict(loaded, data()) or []
    rows = sorted((row for batch in batches for row in loaded.prediction_rows(batch)), key=lambda row: row["index"])
    same(loaded.predict([path for label in LABELS for path in sorted(Path("images", "test", label).iterdir())]), rows)


def test_the_command_answers_for_an_image(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = LoPALightningModule.load_from_checkpoint(trained).predict("images/test/eel/2.png")
    capsys.readouterr()
    main(["predict", "--ckpt_path", str(trained), "--file", "images/test/eel/2.png"])
    (found,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert found.pop("input") == "images/test/eel/2.png"
    same([found], wanted)
    monkeypatch.delattr(builder, "load_model")  # what follows is refused before weights are read
    with pytest.raises(SystemExit):
        main(["predict", "--ckpt_path", str(trained), "--file", "images/test/eel/2.png", "none.png"])
    assert "none.png" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["predict", "--ckpt_path", str(trained), "--text", "a cat"])
    assert "the model reads images: give images, or a folder of them, as --file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["predict", "--ckpt_path", str(trained), "--file", "images/test", "--encoding", "latin-1"])
    assert "--encoding is for a file of texts, and the model reads images" in capsys.readouterr().err


def _cut(path: str) -> str:
    Path(path).write_bytes(Path("images/test/eel/2.png").read_bytes()[:-60])
    return path


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("images", "message"),
    [
        (lambda: [Path("images/test/eel/2.png"), "none.png"], r"^image 'none.png' cannot be read: No such file"),
        (lambda: "images", r"^image 'images' cannot be read: Is a directory"),
        (lambda: ["run.yaml"], r"^image 'run.yaml' is no image of the formats"),
        (lambda: ["images/test/eel/2.png", _cut("cut.png")], r"^image 'cut.png' cannot be read: "),
        (lambda: Image.open(_cut("cut.png")), r"^image 0 \(counted from 0\) cannot be read: "),
        (
            lambda: np.zeros((2, 8, 8, 3), np.uint8),
            r"^image 0 \(counted from 0\) must be uint8 \[H, W\] or .*2, 8, 8, 3",
        ),
        (lambda: [np.zeros((8, 8, 3))], r"^image 0 \(counted from 0\) must be uint8 .*, got float64"),
        (lambda: [None], r"^image 0 \(counted from 0\) must be a path, a PIL image or an array, got None"),
        (lambda: 7, r"^images must be paths, PIL images or arrays, or a list of them; got 7$"),
    ],
)
def test_what_is_no_image_is_named(trained: Path, images: Callable[[], Any], message: str) -> None:
    loaded = LoPALightningModule.load_from_checkpoint(trained)
    with pytest.raises(LoPAError, match=message):
        loaded.predict(images())


def test_initial_values_do_not_answer(trained: Path) -> None:
    module = ImageClassificationModule(backbone=PretrainedSpec("vit"), task=Task(list(LABELS)))
    with pytest.raises(LoPAError, match="nothing was trained or loaded, so predict would answer"):
        module.predict("images/test/eel/2.png")


# Another view


@pytest.mark.parametrize(
    "stage", ["predict", "fit", *(pytest.param(stage, marks=pytest.mark.slow) for stage in ("validate", "test"))]
)
def test_a_checkpoint_is_not_used_with_another_view(
    stage: str, trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageClassificationModule, "configure_model", lambda self: pytest.fail("weights were read"))
    config = ["--config", "run.yaml", "--config", str(METHODS / "vpt_deep.yaml"), "--ckpt_path", str(trained)]
    with pytest.raises(SystemExit):
        main([stage, *config, "--data.view", "resize"])
    assert re.search(r"task\." + OTHER, capsys.readouterr().err.strip().splitlines()[-1])


def test_nor_is_a_loaded_module_and_none_in_python(trained: Path) -> None:
    loaded, run = LoPALightningModule.load_from_checkpoint(trained), trainer(trained.parent, callbacks=[])
    for ask in (run.validate, run.test, run.predict, run.fit):
        with pytest.raises(LoPAError, match=r"^the data's view of images is not the model's: " + OTHER):
            ask(loaded, data(view="model"))
    new = ImageClassificationModule(prompt_encoder=loaded.make_prompt_encoder, **{"placement": "every_layer", **VIT})
    with pytest.raises(LoPAError, match=r"task\." + OTHER):
        run.fit(new, data(view="model"), ckpt_path=trained)


def test_a_view_is_what_is_done_and_not_its_name() -> None:
    module, run = ImageClassificationModule(**VIT), trainer(Path("two_names"))
    assert module.processing is None
    run.fit(module, data(view="resize"))
    # Both resize to 12 x 12.
    (found,) = run.validate(ImageClassificationModule(**VIT), data(view="model"), "two_names/last.ckpt", verbose=False)
    assert found["val/loss"] == pytest.approx(float(run.callback_metrics["val/loss"]))
    given = ImageClassificationModule(processing=replace(module.evaluated, mean=(0.0, 0.0, 0.0)), **VIT)
    with pytest.raises(LoPAError, match=r"the data's view .*: mean: the model has \[0.0, 0.0, 0.0\], the data \[0.4, "):
        trainer(Path("given")).fit(given, data(view="resize"))

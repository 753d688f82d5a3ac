"""Pictures of images in TensorBoard: their pixels, the attention over them, and what becomes of the run."""

from __future__ import annotations

import contextlib
import functools
import io
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lopa_lightning import (
    ImageClassificationDataModule,
    ImageClassificationModule,
    LoPA,
    NoPrompt,
    PretrainedSpec,
    PromptTuning,
    Task,
    VisualPromptTuning,
)
from lopa_lightning.backbones.image_spec import load_processing
from lopa_lightning.backbones.vision import VisionBackbone
from lopa_lightning.callbacks import PromptMonitor, image_monitor
from lopa_lightning.callbacks.advice import Advice
from lopa_lightning.callbacks.attention import patch_attention
from lopa_lightning.callbacks.image_monitor import answer_of, shown_rows
from lopa_lightning.callbacks.pictures import BLACK, GREEN, RED, Tile, confusion_picture, highlighted, sheet
from tests.data.image_files import LABELS, colours, write_images
from tests.modules.helpers import trainer
from tests.tiny_images import LAYERS, MODELS, PATCH, PATCHES, SIDE, save_vision, vision_model

M, GAP = 3, 8
TILE = 128
SCALE = TILE // SIDE  # each pixel is drawn so often, each way
VPT = functools.partial(VisualPromptTuning, num_virtual_tokens=M, dropout=0.3)


def test_a_tile_has_the_images_own_pixels_and_a_frame_around_them() -> None:
    small, large = colours(SIDE, SIDE), colours(128, 256)
    drawn = sheet([[Tile(small, ["a", "b"], RED), Tile(large, ["a"])]])
    assert (drawn[GAP : GAP + SIDE * SCALE, GAP : GAP + SIDE * SCALE] == small.repeat(SCALE, 0).repeat(SCALE, 1)).all()
    mean = large.reshape(128, 2, 64, 2, 3).mean((1, 3))  # two by two pixels are one
    assert np.abs(drawn[GAP : GAP + TILE, 2 * GAP + TILE : 2 * GAP + TILE + 64] - mean).max() <= 1
    assert tuple(drawn[GAP - 2, GAP + 50]) == RED
    assert (drawn[GAP - 2, 2 * GAP + TILE :] == 255).all()


def test_a_cell_of_the_confusion_matrix_is_its_share_of_the_row() -> None:
    counts = np.zeros((100, 100), np.int64)
    counts[3, [3, 7]] = 3, 1
    drawn = confusion_picture(counts, [f"class {number}" for number in range(100)])
    cells = drawn[GAP + 15 : -GAP : 8, GAP : GAP + 800 : 8].astype(float)  # cells of 8 pixels have no text
    expected = np.full((100, 100, 3), 255.0)
    expected[3, 3], expected[3, 7] = (
        0.25 * 255 + 0.75 * np.array([20, 70, 160]),
        0.75 * 255 + 0.25 * np.array([20, 70, 160]),
    )
    assert np.abs(cells - expected).max() <= 0.5
    assert (
        confusion_picture(np.eye(3, dtype=np.int64), ["a\nb", "", "x" * 99]).std() > 0
    )  # names that are hard to write


@pytest.mark.parametrize(
    ("task", "row", "label", "expected"),
    [
        (Task(["a", "b"]), {"label": "b", "probabilities": {"a": 0.2, "b": 0.8}}, 1, ("b", "80% b", GREEN)),
        (Task(["a", "b"]), {"label": "b", "probabilities": {"a": 0.2, "b": 0.8}}, 0, ("a", "80% b", RED)),
        (
            Task(["a", "b", "c"], multi_label=True),
            {"labels": ["a", "c"], "probabilities": {"a": 0.9, "b": 0.2, "c": 0.6}},
            [1, 0, 1],
            ("a, c", "90% a, 60% c", GREEN),
        ),
        (Task([]), {"value": 1.5}, 2.0, ("2", "1.5", BLACK)),
    ],
)
def test_an_answer_is_written_with_its_probability(task: Task, row: Any, label: Any, expected: Any) -> None:
    gold, said, colour = expected
    assert answer_of(task, row, label) == ([f"label: {gold}", f"model: {said}"], colour)


@pytest.mark.parametrize(("batches", "size"), [(1, 100), (3, 5), (11, 32), (8, 1), (100, 7)])
def test_eight_images_are_spread_over_the_batches(batches: int, size: int) -> None:
    found = [(index, row) for index in range(batches) for row in shown_rows(index, batches, size)]
    assert len(found) == 8
    places = np.array([index * size + row for index, row in found])
    assert np.diff(places).min() >= batches * size // 16
    assert shown_rows(0, float("inf"), 3) == [0, 1, 2]


def backbone(kind: str, placement: str, folder: Path) -> VisionBackbone:
    model = vision_model(kind)
    return VisionBackbone(model, load_processing(PretrainedSpec(save_vision(model, folder))), placement)


@pytest.mark.parametrize("placement", ["before", "every_layer"])
@pytest.mark.parametrize("kind", MODELS)
def test_attention_is_read_and_the_model_left_as_it_was(kind: str, placement: str, tmp_path: Path) -> None:
    made = backbone(kind, placement, tmp_path)
    prompt, pixels = torch.randn(2, M, made.prompt_dim), torch.from_numpy(colours(SIDE, SIDE)).permute(2, 0, 1)
    batch = {"pixels": torch.stack([pixels, 255 - pixels])}
    before, projected = made(prompt, batch).hidden, dict[str, torch.Tensor]()
    hooks = [
        part.register_forward_hook(lambda _, args, out, name=name: projected.update({name: out}))
        for name, part in made.named_modules()
        if name.endswith((".q_proj", ".k_proj"))
    ]
    with patch_attention(made, M) as found:
        made.body(pixel_values=torch.zeros(2, 3, SIDE, SIDE))  # as an instance encoder does before
        torch.testing.assert_close(made(prompt, batch).hidden, before)
    for hook in hooks:
        hook.remove()
    assert made.body.config._attn_implementation == "sdpa"
    assert torch.equal(made(prompt, batch).hidden, before)
    assert not any(
        part._forward_hooks for layer in made.layers() for part in layer.modules() if "Bias" not in str(type(part))
    )
    assert list(found) == list(range(LAYERS))
    first = before.shape[1] - PATCHES
    for layer, (to_patches, to_virtual) in found.items():
        assert (to_patches.shape, to_virtual.shape) == ((2, M, PATCHES), (2, PATCHES))
        if kind not in ("vit", "clip", "siglip"):  # others turn, or bias, what is multiplied
            assert 0 < to_patches.sum(-1).max() <= 1 + 1e-6
            continue
        query, key = (
            next(out for name, out in projected.items() if f".{layer}." in name and name.endswith(part))
            .unflatten(-1, (2, -1))
            .transpose(1, 2)
            for part in ("q_proj", "k_proj")
        )
        weights = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1).mean(1)
        torch.testing.assert_close(to_patches, weights[:, first - M : first, first:])
        torch.testing.assert_close(to_virtual, weights[:, first:, first - M : first].sum(-1))


def test_a_failure_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    made = backbone("vit", "before", tmp_path)
    with pytest.raises(RuntimeError, match="as if"), patch_attention(made, M):
        raise RuntimeError("as if")
    assert made.body.config._attn_implementation == "sdpa"
    assert not any(part._forward_hooks for part in made.modules())


# Runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp("pictures")
    save_vision(vision_model("vit"), at / "vit")
    write_images(str(at / "images"))
    return at


def fit(folder: Path, run: Path, shown: bool = True, **options: Any) -> tuple[Any, Any, Any]:
    """Runs two epochs; returns what they trained, the data, and what TensorBoard has of them."""
    seed_everything(3)
    settings: dict[str, Any] = {"prompt_encoder": VPT, "placement": "every_layer", **options}
    made = ImageClassificationModule(backbone=PretrainedSpec(str(folder / "vit")), **settings)
    data = ImageClassificationDataModule(path=str(folder / "images"), batch_size=4, eval_batch_size=5)
    logger = TensorBoardLogger(run, name="", version="") if shown else False
    trainer(run, 2, logger=logger, callbacks=[PromptMonitor()], enable_checkpointing=False).fit(made, data)
    return made, data, EventAccumulator(str(run)).Reload() if shown else None


def pictures(events: Any, tag: str) -> list[np.ndarray]:
    found = [Image.open(io.BytesIO(event.encoded_image_string)) for event in events.Images(tag)]
    return [np.asarray(image).astype(int) for image in found]


def test_a_run_shows_images_answers_attention_and_confusion(folder: Path, tmp_path: Path) -> None:
    made, data, events = fit(folder, tmp_path)
    attention = {f"prompt/{name}" for name in ("looks_at", "looked_at", "looks_at_by_token")}
    assert set(events.Tags()["images"]) == {"val/images", "val/confusion", "prompt/cosines", *attention}
    paths = [path for label in LABELS for path in sorted((folder / "images" / "validation" / label).iterdir())]
    batches = [batch["index"].tolist() for batch in data.val_dataloader()[0]]
    assert sorted(map(len, batches)) == [2, 5, 5]
    kept = [paths[batch[row]] for number, batch in enumerate(batches) for row in shown_rows(number, 3, len(batch))]
    answers = made.predict(kept)
    grids = pictures(events, "val/images")
    assert len(grids) == 2  # at each of two validations, and the same ones
    for grid, is_last in zip(grids, (False, True)):
        for number, (path, answer) in enumerate(zip(kept, answers)):
            left, top = GAP + number % 4 * (TILE + GAP), GAP + number // 4 * (SIDE * SCALE + GAP + 30)
            seen = np.asarray(Image.open(path).resize((SIDE, SIDE), Image.Resampling.BILINEAR))
            assert (grid[top : top + SIDE * SCALE : SCALE, left : left + SIDE * SCALE : SCALE] == seen).all()
            assert not is_last or tuple(grid[top - 2, left + 9]) == (
                GREEN if answer["label"] == path.parent.name else RED
            )

    net = made.net.eval()
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(p).resize((SIDE, SIDE), 2))) for p in kept[:4]])
    with torch.no_grad(), patch_attention(net.backbone, M) as found:
        net({"pixels": pixels.permute(0, 3, 1, 2), "index": torch.arange(4)})
    looks_at = pictures(events, "prompt/looks_at")[-1]
    for row, column in ((0, 1), (2, 3)):  # the second column of all is the first layer
        layer = (0, 1, 2)[column - 1]
        weights = found[layer].to_patches[row].mean(0).view(SIDE // PATCH, -1).numpy()
        left, top = GAP + column * (TILE + GAP), GAP + row * (SIDE * SCALE + GAP + 30)
        drawn = looks_at[top : top + SIDE * SCALE : SCALE, left : left + SIDE * SCALE : SCALE]
        assert np.abs(drawn - highlighted(pixels[row].numpy(), weights, (PATCH, PATCH)).astype(int)).max() <= 1


def test_the_confusion_matrix_counts_all_of_the_validation_set(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = []
    monkeypatch.setattr(
        image_monitor, "confusion_picture", lambda counts, labels: counted.append(counts) or np.zeros((1, 1, 3))
    )
    made, *_ = fit(folder, tmp_path, prompt_encoder=NoPrompt, placement="before")
    expected = np.zeros((3, 3), np.int64)
    for row, label in enumerate(LABELS):
        for answer in made.predict(sorted((folder / "images" / "validation" / label).iterdir())):
            expected[row, LABELS.index(answer["label"])] += 1
    assert len(counted) == 2
    assert (counted[-1] == expected).all()


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    "options", [{}, {"prompt_encoder": functools.partial(LoPA, num_virtual_tokens=M, rank=2, hidden_dim=4)}]
)
def test_a_run_is_the_same_with_and_without_pictures(folder: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    states = [fit(folder, tmp_path / str(shown), shown, **options)[0].state_dict() for shown in (True, False)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_what_cannot_be_drawn_is_said_once_and_the_run_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    def broken(*_: Any) -> None:
        raise OSError("no font")

    monkeypatch.setattr(image_monitor, "sheet", broken)
    fit(folder, tmp_path)
    said = [str(each.message) for each in recwarn if "not shown in TensorBoard" in str(each.message)]
    assert said == ["validation images are not shown in TensorBoard: no font"]


def test_a_model_without_attention_weights_is_named_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr("transformers.ViTModel.set_attn_implementation", lambda self, name: None)
    *_, events = fit(
        folder, tmp_path, prompt_encoder=functools.partial(PromptTuning, num_virtual_tokens=2), placement="before"
    )
    said = [str(each.message) for each in recwarn if "attention weights" in str(each.message)]
    assert said == ["ViTModel gives no attention weights, so that no picture shows them"]
    assert {"val/images", "val/confusion"} <= set(events.Tags()["images"])
    assert "prompt/looks_at" not in events.Tags()["images"]


def test_of_a_long_run_not_every_validation_is_drawn() -> None:
    monitor = image_monitor.ImageMonitor(Advice())
    module = types.SimpleNamespace(net=types.SimpleNamespace(backbone=VisionBackbone.__new__(VisionBackbone)))
    drawn = []
    for step in range(1, 101):
        run = types.SimpleNamespace(is_global_zero=True, num_val_batches=[9], global_step=step)
        monitor.keep(run, module, {"index": torch.zeros(0)}, 0)
        before = monitor._drawn
        with contextlib.suppress(AttributeError):  # of what is drawn, nothing is there
            monitor.draw(run, module, None)
        drawn += [step] * (monitor._drawn - before)
    assert drawn == [*range(1, 21), 22, 25, 28, 31, 35, 39, 43, 48, 53, 59, 65, 72, 80, 88, 97]

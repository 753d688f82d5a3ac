"""Shows in TensorBoard what an image model answers, and where virtual tokens and patches attend to each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix

from lopa_lightning.backbones.sharding import is_sharded
from lopa_lightning.backbones.vision import VisionBackbone, patch_size
from lopa_lightning.callbacks.advice import Advice
from lopa_lightning.callbacks.attention import PatchAttention, patch_attention
from lopa_lightning.callbacks.pictures import (
    BLACK,
    GREEN,
    RED,
    Colour,
    Pixels,
    Tile,
    confusion_picture,
    highlighted,
    sheet,
)
from lopa_lightning.errors import one_line
from lopa_lightning.task import Task

_IMAGES = 8  # that are shown, and read once more at each validation
_COLUMNS = 4
_ATTENDED = 3  # of them, with attention
_LAYERS = 4  # whose attention is shown
_TOKENS = 4  # virtual tokens that are shown one by one
_MOST_CLASSES = 1000  # of a confusion matrix
_ALWAYS = 20  # validations that are drawn; of those after them, each at which the run has grown by a tenth


class ImageMonitor:
    """Draws a few images of the validation set with their answers, their attention, and the confusion matrix.

    The images are spread evenly over the first process's batches of the first set, and are the same ones at every
    validation. They are read once more at its end, by the first process alone unless processes share the model. Of a
    long run the first 20 validations are drawn, and then each that is at a step a tenth above the last one drawn.

    A picture that cannot be drawn is warned of, once, and ends no run; a failed pass does where processes share the
    model, since the others would wait for it.

    Args:
        advice: Gives warnings.
    """

    def __init__(self, advice: Advice) -> None:
        self._advice = advice
        self._rows: list[dict[str, Tensor]] = []
        self._counts: dict[str, NDArray[np.int64]] = {}
        self._has_attention = True
        self._drawn, self._last_step, self._is_due = 0, 0, False

    def keep(self, trainer: Any, pl_module: Any, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Keeps the images of a validation batch that are to be shown.

        Args:
            trainer: With the number of batches.
            pl_module: The module.
            batch: Of the first set.
            batch_idx: Its number.
        """
        if batch_idx == 0:
            self._rows = []
            is_due = self._drawn < _ALWAYS or trainer.global_step >= 1.1 * self._last_step  # alike in all processes
            self._is_due = is_due and isinstance(pl_module.net.backbone, VisionBackbone)
        if not self._is_due:
            return
        if trainer.is_global_zero or is_sharded(pl_module.net):
            for row in shown_rows(batch_idx, trainer.num_val_batches[0], len(batch["index"])):
                tensors = {name: values for name, values in batch.items() if isinstance(values, Tensor)}
                self._rows.append({name: values[row : row + 1].clone() for name, values in tensors.items()})

    def count(self, pl_module: Any) -> None:
        """Takes the confusion matrices before the module computes its metrics; every process must call it."""
        self._counts = {}
        if not self._is_due:
            return
        for name, scores in pl_module.scores.items():
            found = [m for m in (scores.metrics or {}).values() if isinstance(m, MulticlassConfusionMatrix)]
            if name.startswith("val") and found and found[0].num_classes <= _MOST_CLASSES:
                with found[0].sync_context():
                    self._counts[name] = found[0].confmat.cpu().numpy().copy()

    def draw(self, trainer: Any, pl_module: Any, board: Any) -> None:
        """Draws all of it; where processes share the model, every one must call it.

        Args:
            trainer: With the step.
            pl_module: In eval mode.
            board: TensorBoard's writer.
        """
        if not self._is_due:
            return
        self._drawn, self._last_step = self._drawn + 1, trainer.global_step
        try:
            answered = self._answered(trainer, pl_module)
        except Exception as error:
            if is_sharded(pl_module.net):
                raise
            self._warn(error)
            return
        if not trainer.is_global_zero:
            return
        try:
            pictures = {
                f"{name}/confusion": confusion_picture(counts, pl_module.task.labels)
                for name, counts in self._counts.items()
            }
            if answered is not None:
                pictures |= _pictures(pl_module, *answered)
            for name, picture in pictures.items():
                board.add_image(name, picture, trainer.global_step, dataformats="HWC")
        except Exception as error:
            self._warn(error)

    def _warn(self, error: Exception) -> None:
        self._advice.give("pictures", f"validation images are not shown in TensorBoard: {one_line(error)}")

    def _answered(
        self, trainer: Any, pl_module: Any
    ) -> tuple[dict[str, Tensor], Tensor, dict[int, PatchAttention]] | None:
        """Returns the kept images as a batch, the module's outputs for them, and the attention of each layer."""
        rows, self._rows = self._rows, []
        if not rows:
            return None
        batch = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        net, attention = pl_module.net, dict[int, PatchAttention]()
        m = net.prompt_encoder.num_virtual_tokens
        with trainer.precision_plugin.val_step_context():
            if not m or not self._has_attention:
                return batch, pl_module(batch), attention
            with patch_attention(net.backbone, m) as attention:
                outputs = pl_module(batch)
        if len(attention) < len(net.backbone.layers()):
            self._has_attention = False
            name = type(net.backbone.body).__name__
            self._advice.give("attention", f"{name} gives no attention weights, so that no picture shows them")
            attention = {}
        return batch, outputs, attention


def shown_rows(batch_idx: int, batches: float, size: int) -> list[int]:
    """Returns which images of a batch are shown, of all batches as many as are to be shown, evenly spread.

    Args:
        batch_idx: The batch's number.
        batches: How many there are; of infinitely many the first is taken.
        size: Of the batch.

    Example:
        >>> [shown_rows(index, 3, 6) for index in range(3)]
        [[0, 2, 4], [0, 2, 4], [0, 3]]
    """
    if batches == float("inf"):
        batches = 1
    count = sum(number * int(batches) // _IMAGES == batch_idx for number in range(_IMAGES))
    return sorted({number * size // count for number in range(count)})


def answer_of(task: Task, row: dict[str, Any], label: Any) -> tuple[list[str], Colour]:
    """Returns an image's label and the module's answer, each as a line, and the colour of right or wrong.

    Args:
        task: With the labels' names.
        row: The module's record of a prediction.
        label: A class, 1 for each label of several, or a number.

    Example:
        >>> answer_of(Task(["eel", "owl"]), {"label": "owl", "probabilities": {"eel": 0.1, "owl": 0.9}}, 0)
        (['label: eel', 'model: 90% owl'], (200, 30, 30))
    """
    if "value" in row:
        return [f"label: {label:.4g}", f"model: {row['value']:.4g}"], BLACK
    right = [name for name, is_one in zip(task.labels, label) if is_one] if task.multi_label else [task.labels[label]]
    found = row["labels"] if task.multi_label else [row["label"]]
    said = ", ".join(f"{row['probabilities'][name]:.0%} {name}" for name in found)
    return [f"label: {', '.join(right)}", f"model: {said}"], GREEN if found == right else RED


def _pictures(
    pl_module: Any, batch: dict[str, Tensor], outputs: Tensor, attention: dict[int, PatchAttention]
) -> dict[str, Pixels]:
    """Returns the pictures of images by name."""
    images = [image.permute(1, 2, 0).to(torch.uint8).cpu().numpy() for image in batch["pixels"]]
    rows = pl_module.prediction_rows({"index": batch["index"], **pl_module.predict_outputs(outputs)})
    answers = [answer_of(pl_module.task, row, label) for row, label in zip(rows, batch["labels"].tolist())]
    tiles = [Tile(image, *answer) for image, answer in zip(images, answers)]
    grid = [tiles[start : start + _COLUMNS] for start in range(0, len(tiles), _COLUMNS)]
    drawn = {"val/images": sheet(grid)}
    if attention:
        drawn |= attention_pictures(tiles[:_ATTENDED], attention, pl_module.net.backbone)
    return drawn


def attention_pictures(
    tiles: Sequence[Tile], attention: dict[int, PatchAttention], backbone: VisionBackbone
) -> dict[str, Pixels]:
    """Draws the attention between virtual tokens and patches over images, by name.

    ``prompt/looks_at`` has the mean over virtual tokens in some layers, ``prompt/looks_at_by_token`` some virtual
    tokens of the first image, and ``prompt/looked_at`` the weight of all virtual tokens together for each patch.

    Args:
        tiles: The images.
        attention: Of each layer.
        backbone: Whose patches they are.
    """
    height, width = patch_size(backbone.body)
    columns = backbone.processing.size[1] // width

    def shown(image: int, weights: Tensor, *lines: str) -> Tile:
        picture = highlighted(tiles[image].picture, weights.view(-1, columns).cpu().numpy(), (height, width))
        return Tile(picture, [*lines])

    last = max(attention)
    layers = sorted({number * last // (_LAYERS - 1) for number in range(_LAYERS)})
    looks_at, looked_at = ([[tile] for tile in tiles] for _ in range(2))
    for image in range(len(tiles)):
        for number in layers:
            to_patches, to_virtual = (each[image] for each in attention[number])
            mean, name = to_patches.mean(0), f"layer {number + 1}"
            looks_at[image].append(shown(image, mean, name, f"{float(mean.sum()):.0%} on patches"))
            share = f"{float(to_virtual.mean()):.0%} on virtual tokens"
            looked_at[image].append(shown(image, to_virtual, name, share))
    by_token = [
        [
            shown(0, weights, f"layer {number + 1}", f"virtual token {token}")
            for token, weights in enumerate(attention[number].to_patches[0, :_TOKENS])
        ]
        for number in layers
    ]
    pictures = {"looks_at": looks_at, "looked_at": looked_at, "looks_at_by_token": by_token}
    return {f"prompt/{name}": sheet(rows) for name, rows in pictures.items()}

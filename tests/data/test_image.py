"""Folders of images, and Parquet, become batches: labels, views, refusals, the cache, and runs that are resumed."""

from __future__ import annotations

import functools
import json
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from lightning.pytorch import seed_everything
from PIL import Image
from torch import Tensor
from torch.utils.data import SequentialSampler

from lopa_lightning import ClassificationModule, ImageClassificationDataModule, PretrainedSpec
from lopa_lightning.backbones.base import InputKind
from lopa_lightning.backbones.image_spec import ImageSpec
from lopa_lightning.data.pixels import processed, read_image
from lopa_lightning.data.text_classification import TextClassificationDataModule
from lopa_lightning.errors import LoPAError
from tests.data.conftest import SpecOf
from tests.data.image_files import LABELS, colours, saved, write_images
from tests.data.test_pixels import CLIP, VIT
from tests.modules.helpers import LoPATiny, trainer
from tests.refusals import Refused
from tests.test_resume import Keep, equal
from tests.test_third_input import NumbersBackbone, embed

Tiny = Callable[[str], str]

SPEC = ImageSpec(processing=CLIP)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def prepared(stage: str = "fit", spec: Any = SPEC, **options: Any) -> ImageClassificationDataModule:
    data = ImageClassificationDataModule(**options)
    data.connect(spec)
    data.setup(stage)
    return data


def batches(loader: Any) -> dict[str, Tensor]:
    """All batches in one, in the order of the index."""
    found = list(loader)
    whole = {name: torch.cat([batch[name] for batch in found]) for name in found[0]}
    return {name: values[whole["index"].argsort()] for name, values in whole.items()}


def wanted(paths: list[Path], processing: Any = CLIP) -> Tensor:
    return torch.from_numpy(np.stack([processed(read_image(path), processing) for path in paths]))


def files_of(folder: str, split: str) -> list[Path]:
    return sorted(Path(folder, split).rglob("*.png"))


# Where images and labels come from


def test_a_folder_of_images() -> None:
    data = prepared(path=write_images("images"), batch_size=5)
    assert data.task is not None
    assert data.task.labels == list(LABELS)
    train, val = batches(data.train_dataloader()), batches(data.val_dataloader()[0])
    assert set(train) == {"pixels", "labels", "index"}
    assert train["pixels"].dtype == torch.uint8
    assert train["index"].tolist() == list(range(12))
    for batch, split in ((train, "train"), (val, "validation")):
        assert batch["labels"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
        assert torch.equal(batch["pixels"], wanted(files_of("images", split)))
    assert [len(batch["index"]) for batch in data.train_dataloader()].count(5) == 2


def test_labels_in_another_order_and_a_part_of_the_rows() -> None:
    folder = write_images("images")
    data = prepared(path=folder, labels=["eel", "cat", "dog"], shots_per_label=2, validation_from_train=0.25)
    train = batches(data.train_dataloader())
    assert len(train["labels"]) == 4  # six are drawn, of which a quarter is for validation
    colour = train["pixels"].float().mean((2, 3)).argmax(1)  # red cats, green dogs, blue eels
    assert torch.equal(colour, torch.tensor([2, 0, 1])[train["labels"]])


def parquet(name: str, images: list[Any], labels: list[Any] | None, label_type: Any = None) -> dict[str, Any]:
    columns = {"picture": images, **({} if labels is None else {"kind": labels})}
    table = pa.table(columns)
    if label_type is not None:
        features = Features({"picture": Value("binary"), "kind": label_type})
        Dataset.from_dict(columns, features=features).to_parquet(name)
    else:
        pq.write_table(table, name)
    return {"data_files": {name.split(".")[0]: name}, "image_column": "picture", "label_column": "kind"}


@pytest.mark.parametrize("is_struct", [False, True])
def test_parquet_with_the_content_of_files(is_struct: bool) -> None:
    arrays = [colours(8, n) for n in (9, 8, 11)]
    content: list[Any] = [saved(Image.fromarray(array)) for array in arrays]
    images = [{"bytes": each, "path": f"{n}.png"} for n, each in enumerate(content)] if is_struct else content
    options = parquet("test.parquet", images, [7, 5, 7])
    data = prepared("test", **options, labels=["five", "seven"], label_values=[5, 7])
    batch = batches(data.test_dataloader()[0])
    assert batch["labels"].tolist() == [1, 0, 1]
    assert batch["pixels"].tolist() == [processed(Image.fromarray(array), CLIP).tolist() for array in arrays]
    named = data.named(0, [{"index": 1, "label": "five"}])
    assert named == [{"index": 1, **({"file": "1.png"} if is_struct else {}), "label": "five"}]


def test_class_names_of_the_data_and_images_without_labels() -> None:
    content = [saved(Image.fromarray(colours(8, 8)))] * 2
    options = parquet("test.parquet", content, [1, -1], ClassLabel(names=["no", "yes"]))
    data = ImageClassificationDataModule(**options)
    assert data.task is not None
    assert data.task.labels == ["no", "yes"]
    data.connect(SPEC)
    with pytest.raises(LoPAError, match=r"test \(test\): column 'kind' has labels '-1' beside the allowed 'no', 'yes'"):
        data.setup("test")
    data.setup("predict")
    assert set(batches(data.predict_dataloader()[0])) == {"pixels", "index"}


def test_several_labels_of_an_image() -> None:
    content = [saved(Image.fromarray(colours(8, 8)))] * 3
    options = parquet("test.parquet", content, [[1, 0], [], [1]], datasets.List(ClassLabel(names=["a", "b"])))
    data = prepared("test", **options, multi_label=True)
    assert batches(data.test_dataloader()[0])["labels"].tolist() == [[1, 1], [0, 0], [0, 1]]
    with pytest.raises(LoPAError, match=r"must hold one label in each row \(multi_label: true takes lists\), got"):
        prepared("test", **options, labels=["a", "b"])


# Views


def test_an_image_resized_as_a_whole() -> None:
    folder = write_images("images")
    batch = batches(prepared(path=folder, view="resize").train_dataloader())
    assert torch.equal(batch["pixels"], wanted(files_of(folder, "train"), replace(CLIP, resize=(8, 8), crop=False)))


def drawn(paths: list[Path], seed: int, epoch: int) -> list[Any]:
    """The views of an epoch, by plain numpy."""
    views = []
    for index, path in enumerate(paths):
        image = read_image(path)  # at least as high as wide
        random = np.random.default_rng([seed, epoch, index])
        height = int(9 * image.height / image.width)  # 256 / 224 of 8
        values = np.asarray(image.resize((9, height), CLIP.resample)).transpose(2, 0, 1)
        top, left = random.integers(height - 7), random.integers(2)
        part = values[:, top : top + 8, left : left + 8]
        views.append((part[:, :, ::-1] if random.random() < 0.5 else part).tolist())
    return views


@pytest.mark.parametrize("workers", [0, 2])
def test_another_part_in_each_epoch_and_the_middle_to_evaluate(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    folder = write_images("images")
    data = prepared(path=folder, view="crop_flip", batch_size=5, num_workers=workers)
    loader: Any = data.train_dataloader()
    for epoch in (0, 1, 2):
        loader.sampler.set_epoch(epoch)
        views = batches(loader)["pixels"].tolist()
        assert views == drawn(files_of(folder, "train"), 5, epoch)
    val = batches(data.val_dataloader()[0])
    assert torch.equal(val["pixels"], wanted(files_of(folder, "validation"), replace(CLIP, resize=9)))
    assert data.processing == replace(CLIP, resize=9, crop=True)


def test_with_a_sampler_that_knows_no_epoch_views_stay_the_same() -> None:
    data = prepared(path=write_images("images"), view="crop_flip")
    rows = data.train_dataloader().dataset
    table = rows.__getitems__(list(SequentialSampler(range(12))))  # type: ignore[attr-defined]
    assert data.collate()(table)["pixels"].tolist() == drawn(files_of("images", "train"), 0, 0)


def test_another_encoder_reads_the_image_as_its_own_processor_makes_it() -> None:
    folder = write_images("images")
    for view in ("model", "crop_flip"):
        data = prepared(spec=ImageSpec(processing=CLIP, instance_processing=VIT), path=folder, view=view)
        batch = batches(data.train_dataloader())
        assert torch.equal(batch["instance_pixels"], wanted(files_of(folder, "train"), VIT))
        assert batch["pixels"].shape == (12, 3, 8, 8)


# The cache


def test_each_image_is_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    folder, reads = write_images("images"), []
    monkeypatch.setattr(
        "lopa_lightning.data.image_rows.read_image", lambda source: [read_image(source), reads.append(1)][0]
    )
    first = batches(prepared(path=folder).train_dataloader())
    assert len(reads) == 24
    again = prepared(spec=ImageSpec(processing=replace(CLIP, mean=(0, 0, 0))), path=folder)  # where the model is
    assert torch.equal(batches(again.train_dataloader())["pixels"], first["pixels"])
    assert len(reads) == 24
    checksum = again.train_dataloader().dataset.checksum  # type: ignore[attr-defined]
    path = files_of(folder, "train")[3]
    Image.fromarray(colours(9, 9)).save(path)
    os.utime(path, (9, 9))
    changed = prepared(path=folder)
    assert torch.equal(batches(changed.train_dataloader())["pixels"], wanted(files_of(folder, "train")))
    assert changed.train_dataloader().dataset.checksum != checksum  # type: ignore[attr-defined]
    prepared(path=folder, view="resize")
    assert len(reads) == 24 * 3


# Refusals


def test_a_broken_file_is_named_before_training(refused: Refused) -> None:
    path = Path(write_images("images"), "train", "dog", "1.png").resolve()
    path.write_bytes(path.read_bytes()[:-40])
    with refused(f"train (train): image {str(path)!r} cannot be read:", rows=True):
        prepared(path="images")
    missing = parquet("test.parquet", [{"bytes": None, "path": "nowhere.png"}], [0])
    with refused("test (test): image 'nowhere.png' cannot be read: No such file or directory", rows=True):
        prepared("test", **missing, labels=["0", "1"])


def test_a_broken_row_is_counted_in_the_whole_split() -> None:
    content: list[Any] = [saved(Image.fromarray(colours(8, n))) for n in range(5, 25)]
    content[13] = b"no image"
    options = parquet("train.parquet", content, [n % 2 for n in range(20)])
    with pytest.raises(
        LoPAError, match=r"\(train\): the image in row 14 \(counted from 1\) is no image of the formats"
    ):
        prepared(**options, labels=["0", "1"], validation_fraction=0.5)
    content[13] = None
    options = parquet("train.parquet", content, [n % 2 for n in range(20)])
    with pytest.raises(LoPAError, match=r"\(train\): the image in row 14 \(counted from 1\) is missing"):
        prepared(**options, labels=["0", "1"], validation_fraction=0.5)


def one_image(*paths: str) -> None:
    for path in paths:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(colours(9, 9)).save(path)


# datasets looks for names of splits anywhere in a path.
@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (
            ["train/bus/1.png", "train/train/1.png", "test/bus/2.png", "test/train/2.png"],
            r"/test/train/2.png' would be in the splits train and test",
        ),
        (
            ["train/swab/1.png", "train/test strip/1.png", "test/swab/2.png"],
            r"/train/test strip/1.png' would be in the splits",
        ),
        (["train/a/1.png", "train_old/a/2.png", "test/a/3.png"], r"train would have the images of train, train_old"),
    ],
)
def test_the_first_folder_alone_says_which_split_an_image_is_in(paths: list[str], message: str) -> None:
    one_image(*(f"images/{path}" for path in paths))
    os.symlink("images", "link")
    for path in ("images", "link"):
        with pytest.raises(LoPAError, match=message):
            ImageClassificationDataModule(path=path).raw()


def test_data_that_nobody_names_is_asked_for() -> None:
    with pytest.raises(LoPAError, match="give either path or data_files, got path=None and data_files=None"):
        ImageClassificationDataModule()


def test_images_that_are_not_read_are_counted() -> None:
    write_images("images")
    for number in range(2):
        Image.fromarray(colours(9, 9)).save(f"images/train/cat/{number}.mpo", "MPO")
    with pytest.warns(UserWarning, match=r"2 images in '.*images' are in no split that is read, such as '.*cat/0.mpo'"):
        ImageClassificationDataModule(path="images").raw()


def test_folders_in_which_no_name_is_a_splits_have_one() -> None:
    one_image("flat/cat/1.png", "flat/dog/1.png", "below/data/train/cat/1.png", "below/data/test/cat/2.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert ImageClassificationDataModule(path="flat").raw().num_rows == {"train": 2}
        assert ImageClassificationDataModule(path="below").raw().num_rows == {"train": 1, "test": 1}
        one_image("files/train_1.png", "files/train_2.png", "files/test_1.png")
        assert ImageClassificationDataModule(path="files").raw().num_rows == {"train": 2, "test": 1}
        one_image("twice/train/1.png")  # a row each for two labels
        Path("twice/train/metadata.csv").write_text("file_name,label\n1.png,a\n1.png,b\n")
        assert ImageClassificationDataModule(path="twice").raw().num_rows == {"train": 2}


def test_columns_that_hold_no_images_or_no_labels(text_spec: SpecOf) -> None:
    content = [saved(Image.fromarray(colours(8, 8)))] * 2
    options = parquet("test.parquet", content, ["a", "b"])
    with pytest.raises(LoPAError, match="nothing in the data names those of column 'kind'; there are columns picture"):
        _ = ImageClassificationDataModule(**options).task
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"image_column": "image"}, "no column 'image' with images; there are picture, kind"),
        ({"image_column": "kind"}, r"image '.*/a' cannot be read: No such file"),
        (
            {"image_column": "kind", "data_files": None, "path": os.getcwd()},
            "column 'kind' must hold images, got Value.'string'.*; names of files go into the metadata.csv",
        ),
        ({"label_column": "image"}, "no column 'image' with labels; there are picture, kind"),
        ({"labels": ["a", "c"]}, "column 'kind' has labels 'b' beside the allowed 'a', 'c'"),
    ]
    for change, message in wrong:
        with pytest.raises(LoPAError, match=message):
            prepared("test", **{**options, "labels": ["a", "b"], **change})
    with pytest.raises(LoPAError, match="gives images, and the module reads another kind of input"):
        prepared("test", text_spec(), **options, labels=["a", "b"])
    text = TextClassificationDataModule(data_files=options["data_files"], text_columns=["kind"], labels=["a", "b"])
    text.connect(SPEC)
    with pytest.raises(LoPAError, match="gives texts, and the module reads another kind of input"):
        text.setup("predict")


def test_lists_of_files() -> None:
    """Names go from the folder of their list on, classes by their number."""
    write_images("all/images")
    train, test = (files_of("all/images", split) for split in ("train", "test"))
    labels = [LABELS.index(path.parent.name) for path in train]
    for name, header, separator in (("list.txt", "", " "), ("list.csv", "image,label\n", ",")):
        rows = [f"{path.relative_to('all')}{separator}{label}\n" for path, label in zip(train, labels)]
        Path("all", name).write_text(header + "".join(rows))
        Path("all", f"test_{name}").write_text(header + f"{test[0].absolute()}{separator}0\n")
        reader = {} if header else {"sep": " ", "names": ["image", "label"]}
        files: dict[str, Any] = {"train": f"all/{name}", "validation": [f"all/test_{name}"]}
        data = prepared(data_files=files, reader=reader, labels=3)
        assert data.task is not None
        assert data.task.labels == ["0", "1", "2"]
        batch = batches(data.train_dataloader())
        assert batch["labels"].tolist() == labels
        assert torch.equal(batch["pixels"], wanted(train))
        assert torch.equal(batches(data.val_dataloader()[0])["pixels"], wanted(test[:1]))
    Path("list.csv").write_text("image,label\nall/no.png,0\n")
    with pytest.raises(LoPAError, match=r"train \(train\): image '/.*/all/no.png' cannot be read: No such file"):
        prepared(data_files={**files, "train": "list.csv"}, labels=3)
    with pytest.raises(LoPAError, match=r"files that name images must be in one folder, got all/list\.csv, list\.csv"):
        prepared(data_files={**files, "train": ["all/list.csv", "list.csv"]}, labels=3)
    with pytest.raises(LoPAError, match=r"a \.txt must be a table: say in reader how, such as .sep: ' ', names: "):
        prepared(data_files={"train": "all/list.txt"}, reader={"sep": " "}, labels=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"view": "random"}, "view must be one of model, resize, crop_flip, got 'random'"),
        ({"labels": []}, "labels must name the classes, got none"),
        ({"labels": 1}, "labels must be at least 2, got 1"),
        ({"labels": ["a"]}, "labels must be at least two different names"),
        ({"labels": "ab"}, "labels must be a list, got 'ab'"),
        ({"label_values": [1, 2]}, "label_values needs labels, which they stand for"),
        ({"labels": ["a", "b"], "label_values": [1]}, "there must be one label value for each label"),
        ({"shots_per_label": 2, "max_train_examples": 3}, "give max_train_examples or shots_per_label, not both"),
        ({"shots_per_label": 0}, "shots_per_label must be at least 1, got 0"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(LoPAError, match=message):
        ImageClassificationDataModule(path="images", **options)


# Runs


class PixelsBackbone(NumbersBackbone):
    """Each quarter of an image, of 4 x 4 pixels, is two tokens."""

    input_keys = ("pixels",)

    def forward(self, prompt: Tensor, batch: Mapping[str, Tensor], offset: Tensor | None = None) -> Any:
        return super().forward(prompt, {"numbers": numbers(batch["pixels"])}, offset)


def numbers(pixels: Tensor) -> Tensor:
    return torch.nn.functional.avg_pool2d(pixels.float() / 255, 4)[:, :2].flatten(1)


@dataclass(frozen=True)
class PixelsKind(InputKind):
    def backbone(self, model: Any, **settings: Any) -> PixelsBackbone:
        return PixelsBackbone(model)

    def input_spec(self, backbone: Any, num_virtual_tokens: int, encoder: Any, vectors: Any) -> ImageSpec:
        return replace(SPEC, virtual_tokens=num_virtual_tokens, instance_vectors=vectors)

    def instance_states(self, model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        values = numbers(batch["instance_pixels" if "instance_pixels" in batch else "pixels"])
        return model(inputs_embeds=embed(model, values)).last_hidden_state, torch.ones_like(values).long()


class PixelsModule(ClassificationModule):
    def input_kind(self, backbone: PretrainedSpec) -> PixelsKind:
        return PixelsKind(backbone, self.objective)


def fit(backbone: str, folder: Path, data: Any, resume: Any = None, callbacks: Any = (), **options: Any) -> Any:
    seed_everything(5)
    module = PixelsModule(
        backbone=PretrainedSpec(backbone),
        objective="head",
        prompt_encoder=functools.partial(LoPATiny, init="normal"),
        optimizer=functools.partial(torch.optim.AdamW, lr=1e-2),
    )
    run = trainer(folder, callbacks=list(callbacks), **{"epochs": 2, **options})
    run.fit(module, data, ckpt_path=resume)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 1])  # 0: tests/test_resume.py, of texts
def test_a_run_resumed_within_an_epoch_sees_the_same_views(tiny: Tiny, tmp_path: Path, workers: int) -> None:
    folder, keep = write_images("images"), Keep(5, tmp_path / "mid.ckpt")

    def data() -> ImageClassificationDataModule:
        return ImageClassificationDataModule(path=folder, view="crop_flip", batch_size=4, num_workers=workers)

    whole = fit(tiny("bert_base"), tmp_path, data(), callbacks=[keep])
    parts = fit(tiny("bert_base"), tmp_path, data(), resume=keep.path)
    assert equal(whole.state_dict(), parts.state_dict())
    plain = fit(tiny("bert_base"), tmp_path, ImageClassificationDataModule(path=folder, batch_size=4))
    assert not equal(whole.state_dict(), plain.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("view", ["model", "crop_flip"])
def test_kept_vectors_are_those_of_the_view_that_does_not_change(tiny: Tiny, tmp_path: Path, view: Any) -> None:
    data = ImageClassificationDataModule(path=write_images("images"), view=view, batch_size=5)
    module = fit(tiny("bert_base"), tmp_path, data, callbacks=[])
    batch = batches(data.train_dataloader())
    assert set(batch) == {"pixels", "labels", "index", "instance"}
    images = wanted(files_of("images", "train"), data.processing)
    encoder = module.input_spec.instance_vectors.encoder
    torch.testing.assert_close(batch["instance"], encoder({"pixels": images}).detach())


def test_a_run_without_kept_vectors_reads_the_same_view_as_one_with(tiny: Tiny, tmp_path: Path) -> None:
    data = ImageClassificationDataModule(path=write_images("images"), view="crop_flip", batch_size=12)
    fit(tiny("bert_base"), tmp_path, data, callbacks=[], limit_train_batches=1, epochs=1, num_sanity_val_steps=0)
    batch = batches(data.train_dataloader())
    if "instance" not in batch:
        assert torch.equal(batch["instance_pixels"], wanted(files_of("images", "train"), data.processing))


def test_predictions_name_their_files(tiny: Tiny, tmp_path: Path) -> None:
    from lopa_lightning.callbacks import PredictionWriter

    data = ImageClassificationDataModule(path=write_images("images"))
    module = fit(tiny("bert_base"), tmp_path, data)
    run = trainer(tmp_path, callbacks=[PredictionWriter(folder="out")])
    run.predict(module, data)
    rows = [json.loads(line) for line in Path("out/predictions.jsonl").read_text().splitlines()]
    assert [Path(row["file"]).resolve() for row in rows] == [path.resolve() for path in files_of("images", "test")]
    assert [row["index"] for row in rows] == list(range(12))
    assert all(row["label"] in LABELS for row in rows)
    # Only some rows of a Parquet file name one.
    images = pa.array([{"bytes": saved(Image.fromarray(colours(9, 9))), "path": path} for path in (None, "b.png")])
    pq.write_table(pa.table({"image": images}), "some.parquet")
    some = ImageClassificationDataModule(data_files={"predict": "some.parquet"})
    trainer(tmp_path, callbacks=[PredictionWriter(folder="csv", format="csv")]).predict(module, some)
    assert Path("csv/predictions.csv").read_text().splitlines()[2].endswith(",b.png")
    # Images of no class, as a flat folder: the model knows the labels.
    flat = Path("new/images")
    flat.mkdir(parents=True)
    for i in range(2):
        Image.fromarray(colours(9, 9 + i)).save(flat / f"{i}.png")
    new = ImageClassificationDataModule(path="new", splits={"predict": "train"})
    assert len(run.predict(module, new, return_predictions=True)) == 1


@pytest.mark.slow
@pytest.mark.real
def test_clothes(real_data: Callable[[str], str]) -> None:
    folder = real_data("images/clothing10")
    processing = replace(CLIP, size=(224, 224), resize=224)
    data = prepared("validate", ImageSpec(processing=processing), path=folder)
    assert data.task is not None
    assert data.task.labels[:3] == ["dress", "hat", "longsleeve"]
    batch = next(iter(data.val_dataloader()[0]))
    paths = sorted(Path(folder, "validation").rglob("*.jpg"))
    assert {len(data.datasets["val"][0]), len(paths)} == {341}
    names = data.raw()["validation"].cast_column("image", datasets.Image(decode=False))["image"]
    for pixels, label, index in zip(batch["pixels"], batch["labels"], batch["index"]):
        path = Path(names[int(index)]["path"])
        assert torch.equal(pixels, wanted([path], processing)[0])
        assert path.parent.name == data.task.labels[int(label)]

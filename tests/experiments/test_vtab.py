"""VTAB-1k and FGVC: every task with a stand-in for its data, and the comparison by Visual Prompt Tuning's protocol."""

from __future__ import annotations

import re
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import yaml
from PIL import Image

from lopa_lightning import ImageClassificationDataModule
from lopa_lightning.backbones.image_spec import ImageSpec
from lopa_lightning.cli import main
from lopa_lightning.experiments.compare import Comparing, Comparison, check, configs_of
from lopa_lightning.experiments.runs import Run, Runs, parsed
from tests.data.image_files import saved
from tests.data.test_pixels import VIT
from tests.tiny_images import WIDTH, save_vision, vision_model

ROOT = Path(__file__).parents[2]
PLANS = {"vtab": "vtab1k", "fgvc": "fgvc"}
TASKS = [path for kind in PLANS for path in sorted((ROOT / "configs" / kind).glob("*.yaml"))]
TASKS = [path for path in TASKS if path.stem not in ("base", "vpt_shallow", "vpt_deep")]
CLASSES = {  # of the benchmarks' papers; of NABirds' 555 that have folders, five
    "cifar": 100, "caltech101": 102, "dtd": 47, "oxford_flowers102": 102, "oxford_iiit_pet": 37, "svhn": 10,
    "sun397": 397, "patch_camelyon": 2, "eurosat": 10, "resisc45": 45, "diabetic_retinopathy": 5, "clevr_count": 8,
    "clevr_dist": 6, "dmlab": 6, "kitti": 4, "dsprites_loc": 16, "dsprites_ori": 16, "smallnorb_azi": 18,
    "smallnorb_ele": 9, "cub": 200, "nabirds": 5, "oxford_flowers": 102, "stanford_dogs": 120, "stanford_cars": 196,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")


def image(number: int) -> Image.Image:
    return Image.fromarray(np.full((8, 9, 3), 5 * number, np.uint8))


def write_lists(task: str, train: Sequence[int], val: Sequence[int], test: Sequence[int]) -> None:
    """A folder as in vtab-1k, with images of those classes."""
    folder, number = Path("vtab-1k", task), 0
    lines: dict[str, list[str]] = {}
    for split, labels in (("train800", train), ("val200", val), ("test", test)):
        images = folder / "images" / ("test" if split == "test" else "train800val200")
        images.mkdir(parents=True, exist_ok=True)
        for label in labels:
            image(number).save(images / f"{number:06d}.jpg")
            lines.setdefault(split, []).append(f"images/{images.name}/{number:06d}.jpg {label}")
            number += 1
    lines["train800val200"] = lines["train800"] + lines["val200"]
    for split, each in lines.items():
        (folder / f"{split}.txt").write_text("\n".join(each) + "\n")


def write_parquet(path: str, classes: int) -> None:
    """Files as the hub's, in a folder that goes by the data set's id."""
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[f"kind {n}" for n in range(classes)])}
    )
    for split, labels in (("train", [0, 1, classes - 1, 1]), ("test", [classes - 1, 0, 1])):
        Path(path, "data").mkdir(parents=True, exist_ok=True)
        rows = {"image": [{"bytes": saved(image(n)), "path": None} for n in range(len(labels))], "label": labels}
        data = datasets.Dataset.from_dict(rows, features=features)
        data.to_parquet(Path(path, "data", f"{split}-00000-of-00001.parquet"))


def write_nabirds(classes: int) -> None:
    """NABirds' own files, of which the documented command makes a folder of images."""
    files, split = [], []
    for number, label in enumerate([*range(classes), 0, 1, classes - 1]):
        path = Path("nabirds", "images", f"{label:04d}", f"{number:04x}.jpg")
        path.parent.mkdir(parents=True, exist_ok=True)
        image(number).save(path)
        files.append(f"{number:04x}-5a {path.relative_to('nabirds/images')}")
        split.append(f"{number:04x}-5a {int(number < classes)}")
    Path("nabirds/images.txt").write_text("\n".join(files) + "\n")
    Path("nabirds/train_test_split.txt").write_text("\n".join(split) + "\n")
    (command,) = re.findall(r"^join .*$", (ROOT / "configs" / "README.md").read_text(), re.MULTILINE)
    subprocess.run(["bash", "-c", command], check=True)


def merged(*paths: Path) -> dict[str, Any]:
    """What a task and its overlay say together; the comparison of a task of each kind is resolved as a whole."""

    def put(over: dict[str, Any], under: dict[str, Any]) -> dict[str, Any]:
        both = {key: put(over[key], under[key]) for key in over.keys() & under.keys() if isinstance(over[key], dict)}
        return {**under, **over, **both}

    config: dict[str, Any] = {}
    for path in paths:
        config = put(yaml.safe_load(path.read_text()), config)
    return config


@pytest.mark.sampled(8)
@pytest.mark.parametrize("task", TASKS, ids=lambda path: path.stem)
def test_a_task_reads_its_splits_and_classes(task: Path) -> None:
    kind, classes = task.parent.name, CLASSES[task.stem]
    config = merged(task, Path(f"configs/{kind}/base.yaml"))
    data, trainer = config["data"]["init_args"], config["trainer"]
    sizes = {"train": 4, "val": 3}
    if kind == "vtab":
        write_lists(task.stem, [0, classes - 1, 1], [1], [classes - 1, 0, 1])
    elif task.stem == "nabirds":
        write_nabirds(classes)
        sizes["train"] = classes
    else:
        write_parquet(data["path"], classes)

    read = ImageClassificationDataModule(**data)
    assert read.task is not None
    assert len(read.task.labels) == classes
    read.connect(ImageSpec(processing=VIT))
    read.setup("fit")
    assert {role: len(sets[0]) for role, sets in read.datasets.items()} == sizes
    (batch,) = read.val_dataloader()[0]
    order = batch["index"].argsort()
    assert batch["labels"][order].tolist() == ([0, 1, classes - 1] if task.stem == "nabirds" else [classes - 1, 0, 1])
    first = 4 if kind == "vtab" else classes if task.stem == "nabirds" else 0
    assert abs(int(batch["pixels"][order][0].float().mean()) - 5 * first) <= 1

    assert trainer["max_epochs"] == trainer["check_val_every_n_epoch"] == 100  # scored once, at the end
    assert config["model"]["init_args"]["lr_scheduler"] == {"class_path": "lopa_lightning.CosineDecay"}


@pytest.mark.parametrize("kind", PLANS)
def test_a_plan_has_every_task(kind: str) -> None:
    plan, _ = parsed(Comparison, "lopa compare", [f"--config=configs/compare/{PLANS[kind]}.yaml"])
    check(plan)
    assert sorted(plan.tasks) == sorted(f"configs/{kind}/{path.name}" for path in TASKS if path.parent.name == kind)
    if kind == "vtab":  # as published: 0.56 million trained parameters on average beside the heads
        mean = statistics.mean(12 * 768 * m for m in plan.virtual_tokens["vpt_deep"].values())
        assert mean == pytest.approx(0.56e6, rel=0.01)
        assert plan.virtual_tokens["lopa_vision_deep"] == plan.virtual_tokens["vpt_deep"]


@pytest.mark.slow
def test_the_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the plan, two tasks are resolved and one is run, for few epochs and in this process."""

    def make(self: Runs, runs: Sequence[Run]) -> None:
        for run in runs:
            run.prepare()
            main(["fit", "--config", str(run.folder / "config.yaml")])
            self._end(run, run.result(0))

    monkeypatch.setattr(Runs, "make", make)
    arguments = [
        "--config=configs/compare/vtab1k.yaml",
        "--tasks=[configs/vtab/kitti.yaml, configs/vtab/svhn.yaml]",
        "--methods=[configs/vtab/vpt_shallow.yaml]",
        "--seeds=[42]",
        "--rate_multipliers=[1, 0.5]",
        "--max_epochs=2",
        "--",
        f"--model.backbone.name={save_vision(vision_model('vit'), Path('vit'))}",
        *(f"--trainer.{option}" for option in ("check_val_every_n_epoch=2", "accelerator=cpu", "logger=false")),
        "--monitor.enabled=false",
    ]
    comparison, options = parsed(Comparison, "lopa compare", arguments)
    with pytest.warns(UserWarning, match="virtual_tokens has no effect for lopa_vision.*; compared are vpt_shallow"):
        configs = configs_of(comparison, options)
    encoders = {names: config["model"]["init_args"]["prompt_encoder"] for names, config in configs.items()}
    assert {names: encoder["init_args"]["num_virtual_tokens"] for names, encoder in encoders.items()} == {
        ("kitti", "vpt_shallow"): 100,
        ("svhn", "vpt_shallow"): 200,
    }

    # Each split has another share of its most frequent class, which shows in the metrics.
    write_lists("kitti", [n % 4 for n in range(8)], [0, 0, 0, 1], [n % 2 for n in range(6)])
    comparing = Comparing(comparison, {("kitti", "vpt_shallow"): configs["kitti", "vpt_shallow"]})
    comparing.run()
    found = {path.name: result for path, result in comparing.runs.results.items()}
    assert {*found} == {"select-1", "select-0.5", "seed-42"}
    for name, result in found.items():
        is_selection = name.startswith("select")
        assert result.metrics["val/majority_share"] == (0.75 if is_selection else 0.5)
        assert len(result.history) == 1  # scored once, at the end
        assert result.figures["trained"] == 100 * WIDTH + (WIDTH + 1) * 4
        written = yaml.safe_load((comparing.runs.folder / "kitti" / "vpt_shallow" / name / "config.yaml").read_text())
        train = {"train": "train800"} if is_selection else {}
        assert written["data"]["init_args"]["splits"] == {**train, "val": "val200" if is_selection else "test"}

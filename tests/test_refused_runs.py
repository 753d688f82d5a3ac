"""On the command line: a checkpoint of another run is refused before weights are read, and leaves nothing behind."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import PreTrainedModel

from lopa_lightning.cli import main
from lopa_lightning.modules.builder import Builder
from tests.modules.helpers import causal, module, write_reviews
from tests.refusals import assert_refusal

Tiny = Callable[[str], str]


@pytest.fixture(scope="module")
def run(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, a config and the checkpoint of a short run."""
    folder = tmp_path_factory.mktemp("run")
    files = {split: write_reviews(folder / f"{split}.csv", 8) for split in ("train", "validation", "test")}
    init = {"num_virtual_tokens": 3, "rank": 2, "hidden_dim": 8}
    config: dict[str, Any] = {
        "model": {
            "class_path": "lopa_lightning.ClassificationModule",
            "init_args": {
                "backbone": {"name": tiny("bert")},
                "prompt_encoder": {"class_path": "lopa_lightning.LoPA", "init_args": init},
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
            },
        },
        "data": {
            "class_path": "lopa_lightning.TextClassificationDataModule",
            "init_args": {
                **{"data_files": files, "labels": ["good", "bad"], "words": ["great", "terrible"]},
                "template": ["{text} . It was {mask} ."],
            },
        },
        "trainer": {"max_steps": 1, "accelerator": "cpu", "enable_progress_bar": False},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["lopa"])
        main(["fit", "--config", "config.yaml"])
    (last,) = folder.rglob("last.ckpt")
    shutil.move(last, folder / "last.ckpt")
    shutil.rmtree(folder / "runs")
    return folder


LOPA = "--model.prompt_encoder.init_args"
OTHERS = [
    ([f"{LOPA}.num_virtual_tokens=4"], "num_virtual_tokens: the checkpoint has 3, this run 4"),
    (["--model.prompt_encoder=lopa_lightning.PromptTuning"], "prompt_encoder.class_path: the checkpoint has"),
    (["--model.placement=after_first"], "task.placement: the checkpoint has 'before', this run 'after_first'"),
    (["--model.objective=head"], "task.objective: the checkpoint has 'masked_lm', this run 'head'"),
    (
        ["--data.labels=[good, awful]", "--data.label_values=[good, bad]"],
        "task.labels: the checkpoint has ['good', 'bad']",
    ),
    (["--data.template=['{text} {mask}']"], "task.template: the checkpoint has ['{text} . It was {mask} .']"),
    (["--model.instance_encoder.pooling=cls"], "instance_encoder.pooling: the checkpoint has 'mean', this run 'cls'"),
    (["--model.train_backbone=true"], "backbone_training: the checkpoint has None, this run 'all'"),
    (["--model.optimizer=torch.optim.SGD"], "the checkpoint holds the state of optimizer AdamW, this run has SGD"),
]
RUNS = [*(("fit", *other) for other in OTHERS), ("validate", *OTHERS[0]), ("test", *OTHERS[1]), ("predict", *OTHERS[3])]


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("subcommand", "arguments", "message"), RUNS, ids=[f"{name} {arguments[0][2:]}" for name, arguments, _ in RUNS]
)
def test_a_checkpoint_of_another_run(
    subcommand: str,
    arguments: list[str],
    message: str,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    reached: list[Any] = []
    monkeypatch.chdir(run)
    monkeypatch.setattr(sys, "argv", ["lopa"])
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(lambda *_, **__: reached.append(1)))
    monkeypatch.setattr("datasets.Dataset.map", lambda *_, **__: reached.append(2))
    before = set(run.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        main([subcommand, "--config", "config.yaml", "--ckpt_path", "last.ckpt", *arguments])
    assert stop.value.code == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert_refusal(errors[0], message)
    assert len(errors) == 1
    assert reached == []
    assert set(run.rglob("*")) == before


@pytest.mark.parametrize("options", [{}, {"adapter": {"peft_type": "LORA", "r": 2}}, {"train_backbone": True}], ids=str)
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_all_but_the_weights_is_known_before_they_are_read(kind: str, options: dict[str, Any], tiny: Tiny) -> None:
    make: Any = module if kind == "bert" else causal
    builder: Builder = make(tiny(kind), **options).builder
    known, loaded = builder.identity(), builder.load().identity
    for part in ("backbone", "instance_encoder"):
        assert len(loaded[part].pop("weights", "0" * 16)) == 16
    assert known == loaded


def test_a_checkpoint_that_fits_goes_on(run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lopa"])
    common = ["fit", "--config", str(run / "config.yaml"), "--ckpt_path", str(run / "last.ckpt")]
    main([*common, "--trainer.max_steps=2", f"{LOPA}.dropout=0.2"])
    (last,) = tmp_path.rglob("last.ckpt")
    assert torch.load(last, weights_only=True)["global_step"] == 2

"""Every method's YAML: it trains, saves exactly what it trained, and predicts the same after loading."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from lopa_lightning import ClassificationModule, GLUEDataModule
from lopa_lightning.cli import LoPACLI
from lopa_lightning.errors import LoPAError
from tests.mini_glue import write_mini_glue

Tiny = Callable[[str], str]

ROOT = Path(__file__).parent.parent
METHODS = sorted((ROOT / "configs" / "methods").glob("*.yaml"))
RTE = ROOT / "configs" / "glue_rte.yaml"
CPU_SMALL = ROOT / "configs" / "cpu_small.yaml"
LAYER = "net.backbone.model.roberta.encoder.layer"
HEADS = [
    f"{head}.{layer}.{kind}" for head in ("row_head", "column_head") for layer in (1, 3) for kind in ("weight", "bias")
]
PROMPT = "net.prompt_encoder."
SAVED: dict[str, set[str] | None] = {
    "lopa": {f"{PROMPT}{name}" for name in ("shared_prompt.weight", *HEADS)},
    "lopa_instance_only": {f"{PROMPT}{name}" for name in HEADS},
    "prompt_tuning": {f"{PROMPT}shared_prompt.weight"},
    "p_tuning_v2": {f"{PROMPT}shared_prompt.weight"},
    "lora": {
        f"{LAYER}.{layer}.attention.self.{part}.lora_{side}.default.weight"
        for layer in (0, 1)
        for part in ("query", "value")
        for side in "AB"
    },
    "ia3": {
        f"{LAYER}.{layer}.{part}.ia3_l.default"
        for layer in (0, 1)
        for part in ("attention.self.key", "attention.self.value", "attention.output.dense", "output.dense")
    },
    "head_only": {"net.readout.linear.weight", "net.readout.linear.bias"},
}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lopa"])


@pytest.fixture(scope="module")
def mini_glue(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_mini_glue(tmp_path_factory.mktemp("glue"))


def fitted(method: Path, *arguments: str) -> LoPACLI:
    configs = [argument for path in (RTE, method) for argument in ("--config", str(path))]
    return LoPACLI(args=["fit", *configs, "--trainer.enable_progress_bar=false", "--trainer.logger=false", *arguments])


def outputs(module: ClassificationModule, data: GLUEDataModule) -> torch.Tensor:
    module.eval()
    with torch.no_grad():
        return torch.cat([module(batch) for batch in data.val_dataloader()[0]])


@pytest.mark.parametrize("method", METHODS, ids=lambda path: path.stem)
def test_a_method_trains_saves_what_it_trained_and_loads(method: Path, tiny: Tiny, mini_glue: str) -> None:
    cli = fitted(
        method,
        f"--model.backbone.name={tiny('roberta')}",
        f"--data.path={mini_glue}",
        *("--data.max_length=40", "--data.batch_size=4", "--trainer.max_epochs=2", "--trainer.accelerator=cpu"),
        *("--checkpoint.dirpath=kept", "--last_checkpoint.dirpath=kept"),
    )
    trained = {name for name, parameter in cli.model.named_parameters() if parameter.requires_grad}
    saved = torch.load("kept/last.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == trained
    if (expected := SAVED.get(method.stem)) is not None:
        assert trained == expected
    groups = cli.model.net.parameter_groups()
    assert sum(len(group) for group in groups.values()) == len(trained)

    again = ClassificationModule.load_from_checkpoint("kept/last.ckpt")
    torch.testing.assert_close(outputs(again, cli.datamodule), outputs(cli.model, cli.datamodule), rtol=0, atol=0)
    moved = [name for name, p in again.named_parameters() if name in trained and p.abs().sum() > 0]
    assert len(moved) >= len(trained) / 2  # not zeros read from nowhere


def test_full_fine_tuning_saves_everything(tiny: Tiny, mini_glue: str) -> None:
    cli = fitted(
        ROOT / "configs" / "methods" / "full.yaml",
        f"--model.backbone.name={tiny('roberta')}",
        *(f"--data.path={mini_glue}", "--data.max_length=40", "--trainer.max_steps=1"),
        "--last_checkpoint.dirpath=kept",
    )
    saved = torch.load("kept/last.ckpt", weights_only=True)["state_dict"]
    assert set(saved) == {f"net.backbone.{name}" for name, _ in cli.model.net.backbone.named_parameters()}


def test_lora_adds_as_many_numbers_as_its_paper_says(tiny: Tiny, mini_glue: str) -> None:
    cli = fitted(
        ROOT / "configs" / "methods" / "lora.yaml",
        f"--model.backbone.name={tiny('roberta')}",
        *(f"--data.path={mini_glue}", "--data.max_length=40", "--trainer.fast_dev_run=true"),
    )
    layers, matrices, width, rank = 2, 2, 32, 8
    assert sum(p.numel() for p in cli.model.parameters() if p.requires_grad) == layers * matrices * 2 * width * rank


def test_nothing_to_train_is_refused(tiny: Tiny, mini_glue: str) -> None:
    Path("none.yaml").write_text(
        yaml.safe_dump({"model": {"init_args": {"prompt_encoder": "lopa_lightning.NoPrompt"}}})
    )
    with pytest.raises(LoPAError, match="nothing is trained"):
        fitted(
            Path("none.yaml"),
            f"--model.backbone.name={tiny('roberta')}",
            *(f"--data.path={mini_glue}", "--data.max_length=40", "--model.learning_rates={}"),
        )

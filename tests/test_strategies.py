"""The overlays of configs/trainer, and the strategies that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy

from lopa_lightning.cli import LoPACLI
from lopa_lightning.errors import LoPAError
from lopa_lightning.experiments.resolve import Resolver
from lopa_lightning.strategies import FSDP2Strategy, check_strategy

ROOT = Path(__file__).parent.parent
OVERLAYS = sorted(path.stem for path in (ROOT / "configs" / "trainer").glob("*.yaml"))
ON_CPU = ("--trainer.accelerator=cpu", "--trainer.devices=2")


def built(*overlays: str, options: tuple[str, ...] = ()) -> Trainer:
    """What lopa fit would train with."""
    paths = [ROOT / "configs" / "glue_rte.yaml", *(ROOT / "configs" / "trainer" / f"{name}.yaml" for name in overlays)]
    configs = [part for path in paths for part in ("--config", str(path))]
    trainer: Trainer = Resolver(args=["fit", *configs, *options, "--trainer.logger=false"]).trainer
    return trainer


def test_there_is_one_for_each_place() -> None:
    assert OVERLAYS == ["cpu", "ddp", "fsdp", "gpu", "multinode"]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("overlays", "options", "strategy", "processes"),
    [
        (["cpu"], (), SingleDeviceStrategy, 1),
        (["ddp"], ON_CPU, DDPStrategy, 2),
        (["fsdp"], ON_CPU, FSDP2Strategy, 2),
        (["multinode"], ON_CPU, DDPStrategy, 4),
        (["fsdp", "multinode"], (*ON_CPU, "--trainer.num_nodes=3"), FSDP2Strategy, 6),
    ],
)
def test_an_overlay_builds_its_trainer(
    overlays: list[str], options: tuple[str, ...], strategy: type, processes: int
) -> None:
    trainer = built(*overlays, options=options)
    assert type(trainer.strategy) is strategy
    assert trainer.num_devices * trainer.num_nodes == processes


def test_the_gpus_overlay_asks_for_one_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [str(ROOT / "configs" / name) for name in ("glue_rte.yaml", "trainer/gpu.yaml")]
    with pytest.raises(SystemExit) as stop:
        LoPACLI(args=["fit", "--config", paths[0], "--config", paths[1], "--print_config"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "\n  accelerator: gpu\n" in shown
    assert "\n  precision: bf16-mixed\n" in shown


FSDPStrategy, DeepSpeedStrategy = (type(name, (DDPStrategy,), {}) for name in ("FSDPStrategy", "DeepSpeedStrategy"))


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (FSDPStrategy(), r"'FSDPStrategy' is FSDP1, .*; put configs/trainer/fsdp.yaml over the configuration"),
        (DeepSpeedStrategy(), r"'DeepSpeedStrategy' .*; put configs/trainer/fsdp.yaml"),
        (ModelParallelStrategy(), "save_distributed_checkpoint: true writes folders that no other strategy reads"),
    ],
)
def test_strategies_that_would_train_or_save_wrongly_are_refused(strategy: Any, message: str) -> None:
    with pytest.raises(LoPAError, match=message):
        check_strategy(strategy)


def test_others_are_not() -> None:
    check_strategy(FSDP2Strategy())
    check_strategy(SingleDeviceStrategy(torch.device("cpu")))

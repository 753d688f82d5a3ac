"""Callbacks under a Trainer's less common options."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger

from lopa_lightning.callbacks import PredictionWriter, PromptMonitor
from tests.modules.helpers import module, reviews, trainer


def test_a_run_that_logs_no_steps_and_a_try_that_writes_no_predictions(
    tiny: Callable[[str], str], tmp_path: Path
) -> None:
    model, data = module(tiny("bert_base"), objective="head"), reviews(tmp_path)
    logger = CSVLogger(tmp_path / "logs")
    trainer(tmp_path, callbacks=[PromptMonitor()], logger=logger, log_every_n_steps=0, limit_train_batches=2).fit(
        model, data
    )
    (logged,) = (tmp_path / "logs").rglob("metrics.csv")
    assert "val/score" in (columns := logged.read_text().splitlines()[0])
    assert "lr/" not in columns
    writer = PredictionWriter(str(tmp_path / "out"))
    trainer(tmp_path, callbacks=[writer], fast_dev_run=True).predict(model, data, return_predictions=False)
    assert not (tmp_path / "out").exists()

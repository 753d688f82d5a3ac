"""Models that are named by a hub id, from a cache as huggingface_hub lays it out: no server is asked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lopa_lightning.cli import main
from lopa_lightning.serving.bundle import Bundle
from tests.mini_glue import write_mini_glue
from tests.tiny import on_hub

Tiny = Callable[[str], str]

BACKBONE, ENCODER = "a" * 40, "b" * 40


def test_hub_ids_are_trained_with_answered_by_and_pinned_to_their_commits(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    on_hub(tiny("llama"), "someone/backbone", BACKBONE, tmp_path / "hub")
    on_hub(tiny("bert_base"), "someone/encoder", ENCODER, tmp_path / "hub")
    config = str(Path(__file__).parents[1] / "configs" / "glue_sst2.yaml")
    models = ["--model.backbone.name=someone/backbone", "--model.instance_encoder.name=someone/encoder"]
    (tmp_path / "glue").mkdir()
    data = [f"--data.path={write_mini_glue(tmp_path / 'glue')}", "--data.max_length=40"]
    data += ["--trainer.accelerator=cpu", "--trainer.max_steps=2"]
    main(["fit", "--config", config, *models, "--model.objective=causal_lm", *data])
    checkpoint = "runs/lopa/version_0/checkpoints/last.ckpt"
    capsys.readouterr()
    main(["predict", "--ckpt_path", checkpoint, "--text", "a film"])
    assert json.loads(capsys.readouterr().out)["label"] in ("negative", "positive")
    main(["export", checkpoint, "bundle"])
    model = Bundle.from_pretrained("bundle").config.module["init_args"]
    assert {key: model[key]["revision"] for key in ("backbone", "instance_encoder")} == {
        "backbone": BACKBONE,
        "instance_encoder": ENCODER,
    }

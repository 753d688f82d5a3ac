"""The configs of one's own completions and chats from the command line: fit, test with exact matches, predict."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lopa_lightning.cli import main

ROOT = Path(__file__).parent.parent
ROWS = {
    "own_completions": [{"prompt": "the film was" + " great" * (i % 3), "completion": "good"} for i in range(20)],
    "own_chats": [
        {
            "messages": [
                *([{"role": "system", "content": "Yes No"}] if i % 2 else []),
                {"role": "user", "content": "the film was" + " great" * (i % 3)},
                {"role": "assistant", "content": "good"},
            ]
        }
        for i in range(20)
    ],
}


@pytest.mark.sampled(1)
@pytest.mark.parametrize("config", ROWS)
def test_a_shipped_config_fits_tests_and_predicts(
    config: str, tiny: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for split in ("train", "test"):
        Path(f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[config]))
    arguments = [
        *("--config", str(ROOT / "configs" / f"{config}.yaml"), "--trainer.accelerator=cpu", "--trainer.logger=false"),
        *(f"--model.backbone.name={tiny('chat')}", f"--model.instance_encoder.name={tiny('bert_base')}"),
        *("--model.generation.max_new_tokens=8", "--trainer.enable_progress_bar=false"),
    ]
    main(["fit", *arguments, "--trainer.max_epochs=1", "--trainer.limit_train_batches=1"])
    main(["test", *arguments, "--ckpt_path=last", "--predictions.folder=out"])
    main(["predict", *arguments, "--ckpt_path=last", "--predictions.folder=out"])
    results, predictions = (
        [json.loads(line) for line in Path(f"out/{name}.jsonl").read_text().splitlines()]
        for name in ("results", "predictions")
    )
    assert [row["completion"] for row in results] == [text for row in predictions for text in row["completions"]]
    assert [row["passed"] for row in results] == [row["completion"].strip() == "good" for row in results]
    (last,) = Path().rglob("last.ckpt")
    task = torch.load(last, weights_only=True)["lopa_identity"]["task"]
    assert task["placement"] == "system"
    assert len(task["chat_template"]) == 16

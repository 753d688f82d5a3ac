"""The worked example of the data's README, from a file to an answer: its commands, word for word."""

from __future__ import annotations

import csv
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from lopa_lightning.cli import main
from tests.test_readme import ROOT, blocks

Tiny = Callable[[str], str]


def write_table(path: Path, rows: list[tuple[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "category"), *rows])


# The real table differs in its size: all of its texts are encoded.
@pytest.mark.slow
@pytest.mark.parametrize("source", ["stand-in", pytest.param("real", marks=[pytest.mark.real, pytest.mark.slow])])
def test_from_a_file_to_an_answer(
    source: str,
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With tiny models, and a few rows or the real ones."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    folder = Path("path/to/PolyAI/banking77")
    config = yaml.safe_load(Path("configs/banking77.yaml").read_text())
    labels = config["data"]["init_args"]["labels"]
    if source == "real":
        folder.parent.mkdir(parents=True)
        folder.symlink_to(request.getfixturevalue("real_data")("PolyAI/banking77"))
    else:
        for split in ("train", "test"):
            write_table(
                folder / f"{split}.csv", [(f"{split} {n} {label}", label) for label in labels for n in range(2)]
            )
    Path("new.csv").write_text("id,text\n5,Where is it?\n6,My card is gone\n")
    monkeypatch.setattr("lopa_lightning.serving.predict.best_device", lambda: "cpu")
    models = [f"--model.backbone.name={tiny('llama')}", f"--model.instance_encoder.name={tiny('bert_base')}"]
    small = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.accelerator=cpu"]
    (block,) = (block for block in blocks("bash", "lopa_lightning/data/README.md") if "banking77" in block)
    fit, test, *predict = [shlex.split(line.removeprefix("lopa ")) for line in block.splitlines()]
    main([*fit, *models, *small])
    assert re.search(r"val/accuracy +[01]\.\d+", capsys.readouterr().out)
    main([*test, "--trainer.limit_test_batches=1"])
    capsys.readouterr()
    for command in predict:
        main(command)
    (answer,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert answer["input"] == {"text": "The machine kept my card"}
    assert answer["label"] in labels
    answers = [json.loads(line) for line in Path("answers.jsonl").read_text().splitlines()]
    assert [row["input"] for row in answers] == [
        {"id": 5, "text": "Where is it?"},
        {"id": 6, "text": "My card is gone"},
    ]
    assert all(set(row["probabilities"]) == set(labels) for row in answers)

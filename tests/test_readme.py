"""The README's own code, commands and figures."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from torch.utils.data import DataLoader

from lopa_lightning import LoPALightningModule, PretrainedSpec
from lopa_lightning.cli import LoPACLI
from lopa_lightning.experiments import compare, sweep
from lopa_lightning.experiments.command import parsed
from lopa_lightning.experiments.plan import own_options
from tests.modules.helpers import LoPATiny, trainer, write_reviews

Tiny = Callable[[str], str]

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_a_new_task_in_one_class_trains_and_is_rebuilt(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = (block for block in blocks("python") if "class MultiLabelModule" in block)
    assert len(code.split("class MultiLabelModule")[1].strip().splitlines()) <= 20
    (tmp_path / "readme_task.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    from readme_task import MultiLabelModule  # type: ignore[import-not-found]

    torch.manual_seed(0)
    ids = torch.randint(5, 60, (64, 6))
    rows = [
        {
            "index": torch.tensor(i),
            "input_ids": row,
            "attention_mask": torch.ones(6, dtype=torch.long),
            "instance_input_ids": row,
            "instance_attention_mask": torch.ones(6, dtype=torch.long),
            "labels": torch.tensor([int(row[0] > 30), int(row[1] > 30), int(row[2] > 30)]),
        }
        for i, row in enumerate(ids)
    ]
    loader = DataLoader(rows, batch_size=16)  # type: ignore[arg-type]
    module = MultiLabelModule(
        num_labels=3, backbone=PretrainedSpec(tiny("llama")), prompt_encoder=LoPATiny, learning_rates={"head": 0.1}
    )
    run = trainer(tmp_path, epochs=15, callbacks=[], enable_checkpointing=False, num_sanity_val_steps=0)
    run.fit(module, loader, loader)
    assert run.callback_metrics["val/loss"] < 0.5  # of ln 2 = 0.69 for a guess
    run.save_checkpoint(tmp_path / "multi.ckpt")
    again = LoPALightningModule.load_from_checkpoint(tmp_path / "multi.ckpt")
    assert type(again) is MultiLabelModule
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in module.state_dict().items())


def test_the_python_example_runs(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = (block for block in blocks("python") if "Trainer(" in block)
    code = code.replace("sentence-transformers/all-MiniLM-L6-v2", tiny("bert_base"))
    code = code.replace("max_epochs=10", "max_epochs=1, accelerator='cpu', logger=False, enable_progress_bar=False")
    code = code.replace('"best.ckpt"', "next(__import__('pathlib').Path('checkpoints').glob('*.ckpt'))")
    monkeypatch.chdir(tmp_path)
    write_reviews(tmp_path / "train.csv", 40)
    text = (tmp_path / "train.csv").read_text()
    (tmp_path / "train.csv").write_text(text.replace(",good", ",positive").replace(",bad", ",negative"))
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


def test_its_commands_parse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "my.yaml").write_text((ROOT / "configs" / "own_csv.yaml").read_text())
    commands = [line.split("  #")[0] for block in blocks("bash") for line in block.splitlines() if "lopa " in line]
    assert len(commands) >= 7
    for command in commands:
        arguments = shlex.split(command.split("lopa ", 1)[1])
        if arguments[0] == "compare":
            compare.check(parsed(compare.Comparison, "lopa compare", arguments[1:])[0])
            continue
        if arguments[0] == "sweep":
            sweep.check(parsed(sweep.Sweep, "lopa sweep", arguments[1:])[0])
            continue
        if arguments[0] == "plan":
            arguments = ["fit", *own_options(arguments[1:])[1]]
        with pytest.raises(SystemExit) as stop:
            LoPACLI(args=[*arguments, "--print_config"])
        assert stop.value.code == 0, command


def test_ci_finds_the_test_command() -> None:
    assert re.search(r"^The tests:\n\n```bash\npip install .*pytest\n```", README, re.MULTILINE)


def test_every_config_that_it_names_is_there() -> None:
    for name in set(re.findall(r"configs/[\w./]+\.yaml", README)):
        assert yaml.safe_load((ROOT / name).read_text())

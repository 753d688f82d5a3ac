"""A run that is killed, and killed again, anywhere, ends bit for bit like one that was not."""

from __future__ import annotations

import functools
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint

from lopa_lightning import CosineDecay
from tests.killed import Kill, fit
from tests.modules.helpers import LoPATiny, module, reviews
from tests.processes import forked

ROOT = Path(__file__).parent.parent
Tiny = Callable[[str], str]
Schedulers = torch.optim.lr_scheduler

COSINE = "{'class_path': 'lopa_lightning.CosineDecay'}"
ROWS = 22  # six batches of 4
KILLS = [("step", 1, 1), ("save", 1, 3), ("validation", 1, 1), ("epoch", 1, 0)]
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def kills(number: int) -> list[Kill]:
    """Of a run: within a step and at one more place. Three runs in a row have one place and each signal."""
    sent = []
    for i in (0, 1 + number // 3 % 3):
        where, epoch, batch = KILLS[i]
        sent.append(Kill(where, SIGNALS[(number + i) % 3], epoch, batch))
    return sent


RUNS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "share": ({"warmup": 0.25}, {}, {}),
    "share of the YAMLs": ({"warmup": 0.06}, {}, {"every_n_train_steps": 1}),
    "steps and cosine": (
        {"warmup": 3, "lr_scheduler": functools.partial(Schedulers.CosineAnnealingLR, T_max=15)},
        {},
        {"every_n_train_steps": 2},
    ),
    "plateau, by epochs": (
        {"lr_scheduler": functools.partial(Schedulers.ReduceLROnPlateau, patience=0, threshold=0.5, factor=0.5)},
        {},
        {"early_stopping": True},
    ),
    "plateau": (
        {"lr_scheduler": functools.partial(Schedulers.ReduceLROnPlateau, patience=0, threshold=0.5, factor=0.5)},
        {},
        {"every_n_train_steps": 1, "early_stopping": True},
    ),
    "limited, validated in a window and after one": (
        {"warmup": 0.25},
        {"batch_size": 3},
        {
            "limit_train_batches": 7,
            "val_check_interval": 3,
            "accumulate_grad_batches": 2,
            "early_stopping": True,
            "every_n_train_steps": 1,
        },
    ),
    "accumulated": ({"warmup": 0.1}, {"batch_size": 3}, {"accumulate_grad_batches": 3, "every_n_train_steps": 1}),
    "steps in all": ({"warmup": 0.25}, {}, {"max_steps": 16, "epochs": -1}),
    "by tokens, accumulated": (
        {"warmup": 0.25},
        {"batch_tokens": 56},
        {"accumulate_grad_batches": 2, "every_n_train_steps": 1},
    ),
    "cosine, and an optimizer by group": (
        {
            "warmup": 0.1,
            "lr_scheduler": functools.partial(CosineDecay, min_lr_rate=0.1),
            "optimizers": {"shared_prompt": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)},
        },
        {},
        {"accumulate_grad_batches": 2, "every_n_train_steps": 1},
    ),
    "overfit": ({"warmup": 0.25}, {}, {"overfit_batches": 4, "every_n_train_steps": 1}),
}


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return set(one) == set(other) and all(equal(value, other[key]) for key, value in one.items())
    if isinstance(one, list):
        return len(one) == len(other) and all(equal(*pair) for pair in zip(one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_every_schedule_that_is_shipped_is_among_the_runs() -> None:
    shipped = [yaml.safe_load(path.read_text()).get("model", {}) for path in (ROOT / "configs").rglob("*.yaml")]
    arguments = [model.get("init_args", {}) for model in shipped]
    assert len(arguments) > 20
    assert {str(given["lr_scheduler"]) for given in arguments if given.get("lr_scheduler")} == {COSINE}
    tried = {given.get("warmup", 0) for given, *_ in RUNS.values()}
    assert {given.get("warmup", 0) for given in arguments} <= tried


def test_every_signal_is_sent_at_every_place() -> None:
    sent = [(kill.where, kill.number) for number in range(len(RUNS)) for kill in kills(number)]
    assert set(sent) == {(where, number) for where, *_ in KILLS for number in SIGNALS}


# What the others add is resumed in tests/modules/test_schedule.py, test_window.py and test_optimizer_groups.py and in
# tests/test_resume.py.
BY_DEFAULT = ("share of the YAMLs",)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in BY_DEFAULT else [pytest.mark.slow]) for name in RUNS]
)
def test_it_ends_like_one_that_was_not_killed(tiny: Tiny, tmp_path: Path, name: str) -> None:
    modules, data, options = RUNS[name]
    backbone = tiny("bert_base")
    dropped = functools.partial(LoPATiny, dropout=0.3)
    reviews(tmp_path, rows=ROWS)

    def make() -> tuple[Any, Any]:
        return module(backbone, objective="head", prompt_encoder=dropped, **modules), reviews(tmp_path, ROWS, **data)

    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    fit(tmp_path / "whole", make, **options)  # here, so that the forks have all at hand that a first run imports
    whole = torch.load(tmp_path / "whole" / "result.pt", weights_only=True)

    def run(kill: Kill | None = None) -> tuple[int, str]:
        log = tmp_path / "log.txt"
        return forked(lambda: fit(tmp_path / "killed", make, kill, **options), log), log.read_text()

    for kill in kills(list(RUNS).index(name)):
        status, log = run(kill)
        assert status == (-kill.number if kill.number == signal.SIGKILL else 128 + kill.number), (vars(kill), log)
    status, log = run()
    assert status == 0, log
    killed = torch.load(tmp_path / "killed" / "result.pt", weights_only=True)
    for key in ("rows", "losses"):
        assert killed[key] == whole[key][len(whole[key]) - len(killed[key]) :], key
    for key in ("state", "optimizer", "schedulers", "best", "stopping", "steps"):
        assert equal(whole[key], killed[key]), (key, whole[key], killed[key])


def test_any_checkpoint_of_a_run_goes_on_like_the_run(tiny: Tiny, tmp_path: Path) -> None:
    """Saved after a validation, as the best one is: a plateau and early stopping have counted it, and do so once."""
    plateau, options = RUNS["plateau, by epochs"][0], {"early_stopping": True}

    def make() -> tuple[Any, Any]:
        return module(tiny("bert_base"), objective="head", **plateau), reviews(tmp_path, ROWS)

    for name in ("whole", "again"):
        (tmp_path / name).mkdir()
    each = ModelCheckpoint(tmp_path / "each", save_top_k=-1, save_on_train_epoch_end=False)
    fit(tmp_path / "whole", make, each, **options)
    shutil.copy(min((tmp_path / "each").iterdir()), tmp_path / "again" / "last.ckpt")
    fit(tmp_path / "again", make, **options)
    whole, again = (torch.load(tmp_path / name / "result.pt", weights_only=True) for name in ("whole", "again"))
    assert again["rows"] == whole["rows"][6:]
    for key in ("state", "optimizer", "schedulers", "stopping", "steps"):
        assert equal(whole[key], again[key]), (key, whole[key], again[key])


def test_what_max_steps_has_left_of_an_epoch_is_made_up_for(tiny: Tiny, tmp_path: Path) -> None:
    def make() -> tuple[Any, Any]:
        return module(tiny("bert_base"), objective="head"), reviews(tmp_path, ROWS)

    for name, limits in {"whole": [2], "parts": [8, 2]}.items():
        (tmp_path / name).mkdir()
        for limit in limits:
            options = {"max_steps": limit, "epochs": -1} if limit > 2 else {"epochs": limit}
            fit(tmp_path / name, make, **options)
    whole, parts = (torch.load(tmp_path / name / "result.pt", weights_only=True) for name in ("whole", "parts"))
    assert parts["rows"] == whole["rows"][8:]
    for key in ("state", "optimizer", "steps"):
        assert equal(whole[key], parts[key]), key

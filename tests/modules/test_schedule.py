"""Learning rates: warm-up, what follows it, and what a resumed run makes of both."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, ReduceLROnPlateau, SequentialLR, StepLR
from torch.utils.data import DataLoader, IterableDataset
from transformers import get_cosine_with_min_lr_schedule_with_warmup

from lopa_lightning import ClassificationModule, PretrainedSpec
from lopa_lightning.errors import LoPAError
from lopa_lightning.modules.schedule import CosineDecay, WarmUp
from tests.modules.helpers import module, reviews, trainer
from tests.refusals import Refused

Tiny = Callable[[str], str]

SGD = functools.partial(torch.optim.SGD, lr=1.0)
Step = functools.partial(StepLR, step_size=2, gamma=0.5)


class Rates(Callback):
    """The learning rate of each step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.seen.append(optimizer.param_groups[0]["lr"])


def optimizer() -> torch.optim.SGD:
    return torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)


def _linear(made: Any) -> LinearLR:
    return LinearLR(made, start_factor=1 / 4, total_iters=3)


TORCHS: dict[str, tuple[Callable[[Any], Any], Any, list[float]]] = {
    "warm-up": (_linear, None, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
    "warm-up and another": (
        lambda made: SequentialLR(made, [_linear(made), Step(made)], milestones=[3]),
        Step,
        [0.25, 0.5, 0.75, 1, 1, 0.5, 0.5, 0.25],
    ),
    "another": (Step, Step, [1, 1, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125]),
}


@pytest.mark.parametrize("done", [0, 2, 3, 4, 6])
@pytest.mark.parametrize("name", TORCHS)
def test_a_state_of_torchs_own_schedulers_is_continued(name: str, done: int) -> None:
    make, then, expected = TORCHS[name]
    before = optimizer()
    old = make(before)
    for _ in range(done):
        before.step()
        old.step()
    after = optimizer()
    new = WarmUp(after, None if then is None else then(after))
    after.load_state_dict(before.state_dict())
    new.load_state_dict(old.state_dict())
    rates = []
    for _ in range(done, len(expected)):
        rates.append(after.param_groups[0]["lr"])
        after.step()
        new.step()
    assert rates == pytest.approx(expected[done:])


def transformers_cosine(warmup: int, steps: int, least: float = 0.0) -> list[float]:
    """The rates of a run; those of our warm-up, of which the last is followed by the full rate, are other ones."""
    made = optimizer()
    its = get_cosine_with_min_lr_schedule_with_warmup(made, warmup, steps, min_lr_rate=least)
    rates = []
    for _ in range(steps):
        rates.append(made.param_groups[0]["lr"])
        made.step()
        its.step()
    return [(k + 1) / (warmup + 1) for k in range(warmup)] + rates[warmup:]


@pytest.mark.parametrize(
    ("warmup", "steps", "least"), [(0, 7, 0.0), (3, 13, 0.0), (2, 9, 0.25), (0, 1, 0.0), (5, 4, 0.5)]
)
def test_a_cosine_is_that_of_transformers_and_stays_at_its_end(warmup: int, steps: int, least: float) -> None:
    made = optimizer()
    scheduler = WarmUp(made, CosineDecay(made, least))
    assert made.param_groups[0]["lr"] == 1.0
    scheduler.begin(warmup, steps)
    rates = []
    for _ in range(steps + 3):
        rates.append(made.param_groups[0]["lr"])
        made.step()
        scheduler.step()
    assert rates[:steps] == pytest.approx(transformers_cosine(warmup, steps, least)[:steps], abs=1e-12)
    if warmup < steps:
        assert rates[steps:] == pytest.approx([least] * 3, abs=1e-12)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("options", "warmup", "steps"),
    [
        ({"epochs": 2}, 0, 10),
        ({"epochs": 3, "accumulate_grad_batches": 2}, 0.2, 9),
        ({"epochs": -1, "max_steps": 8}, 3, 8),
    ],
    ids=str,
)
def test_a_cosine_knows_the_steps_of_its_run(
    options: dict[str, Any], warmup: float, steps: int, tiny: Tiny, tmp_path: Path
) -> None:
    rates = Rates()
    model = module(tiny("bert_base"), objective="head", optimizer=SGD, warmup=warmup, lr_scheduler=CosineDecay)
    options = {"enable_checkpointing": False, "limit_val_batches": 0, "num_sanity_val_steps": 0, **options}
    trainer(tmp_path, callbacks=[rates], **options).fit(model, reviews(tmp_path))
    assert rates.seen == pytest.approx(transformers_cosine({0.2: 2}.get(warmup, int(warmup)), steps), abs=1e-12)


def test_a_cosine_does_not_go_on_in_a_longer_run(tiny: Tiny, tmp_path: Path) -> None:
    model = functools.partial(module, tiny("bert_base"), objective="head", warmup=2, lr_scheduler=CosineDecay)
    trainer(tmp_path).fit(model(), reviews(tmp_path))
    with pytest.raises(
        LoPAError, match="the checkpoint's CosineDecay ends after 5 steps, and this run has 10; start a"
    ):
        trainer(tmp_path, 2).fit(model(), reviews(tmp_path), ckpt_path=tmp_path / "last.ckpt")


class Endless(IterableDataset[Any]):
    """The examples of a data set, one after the other."""

    def __init__(self, examples: Any) -> None:
        self.examples = examples

    def __iter__(self) -> Any:
        return iter(self.examples)


def test_a_run_without_a_length_has_no_cosine(tiny: Tiny, tmp_path: Path, refused: Refused) -> None:
    data, run = reviews(tmp_path), trainer(tmp_path, -1)
    model = functools.partial(module, tiny("bert_base"), objective="head", lr_scheduler=CosineDecay)
    with refused("lr_scheduler: CosineDecay is over a run that has no end; give max_epochs or max_steps"):
        run.fit(model(), data)
    with refused("lr_scheduler: min_lr_rate must be from 0 to 1, got 1.5"):
        trainer(tmp_path).fit(model(lr_scheduler=functools.partial(CosineDecay, min_lr_rate=1.5)), data)


def test_a_run_over_data_without_a_length_has_no_cosine(tiny: Tiny, tmp_path: Path) -> None:
    data, run = reviews(tmp_path), trainer(tmp_path, limit_val_batches=0, num_sanity_val_steps=0, callbacks=[])
    loader = data.train_dataloader
    data.train_dataloader = lambda: DataLoader(Endless([*loader()]), batch_size=None)  # type: ignore[method-assign]
    with pytest.raises(LoPAError, match="the length of the run, which warmup or lr_scheduler need, is not known"):
        run.fit(module(tiny("bert_base"), objective="head", lr_scheduler=CosineDecay), data)


def test_a_run_that_goes_on_for_longer_keeps_the_steps_of_its_warmup(tiny: Tiny, tmp_path: Path) -> None:
    model = functools.partial(module, tiny("bert_base"), objective="head", warmup=0.4, optimizer=SGD)
    first, more = Rates(), Rates()
    saving = ModelCheckpoint(tmp_path, filename="last", save_on_train_epoch_end=True)
    run = trainer(tmp_path, max_steps=3, callbacks=[first, saving])
    run.fit(model(), reviews(tmp_path))
    run = trainer(tmp_path, epochs=2, callbacks=[more])
    run.fit(model(), reviews(tmp_path), ckpt_path=tmp_path / "last.ckpt")
    assert first.seen == [1 / 2, 1, 1]  # one step of the three
    assert more.seen == [1] * 7


def test_a_checkpoint_without_a_schedule_is_past_its_warmup(tiny: Tiny, tmp_path: Path) -> None:
    model = functools.partial(module, tiny("bert_base"), objective="head", optimizer=SGD)
    trainer(tmp_path).fit(model(), reviews(tmp_path))
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    torch.save({**saved, "lr_schedulers": []}, tmp_path / "old.ckpt")
    rates = Rates()
    with pytest.warns(UserWarning, match="keeps the checkpoint's optimizer settings: warmup"):
        trainer(tmp_path, 2, callbacks=[rates]).fit(model(warmup=4), reviews(tmp_path), ckpt_path=tmp_path / "old.ckpt")
    assert rates.seen == [1.0] * 5


def test_the_state_of_another_scheduler_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    model = functools.partial(module, tiny("bert_base"), objective="head")
    trainer(tmp_path).fit(model(lr_scheduler=Step), reviews(tmp_path))
    cosine = functools.partial(CosineAnnealingLR, T_max=9)
    for other, name in ((None, "None"), (cosine, "CosineAnnealingLR")):
        with pytest.raises(LoPAError, match=f"the state of lr_scheduler StepLR, this run has {name}; start a new run"):
            trainer(tmp_path, 2).fit(model(lr_scheduler=other), reviews(tmp_path), ckpt_path=tmp_path / "last.ckpt")


@pytest.mark.parametrize("options", [{"lr_scheduler": ReduceLROnPlateau}, {"callbacks": [EarlyStopping("val/loss")]}])
def test_without_validation_nothing_of_it_is_monitored(
    options: dict[str, Any], tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    monkeypatch.chdir(tmp_path)
    schedule = {"lr_scheduler": options.pop("lr_scheduler", None)}
    data, run = reviews(tmp_path), trainer(tmp_path, limit_val_batches=0, **options)
    with refused("monitor must be one of train/loss, got 'val/loss'"):
        run.fit(module(tiny("bert_base"), objective="head", **schedule), data)


class Unlike(ClassificationModule):
    """A module of others, which may log what it likes."""


def test_a_plateau_of_a_metric_that_a_module_of_others_did_not_log_is_named(tiny: Tiny, tmp_path: Path) -> None:
    from lightning.pytorch.cli import ReduceLROnPlateau as Monitoring

    plateau = functools.partial(Monitoring, monitor="val/los")
    model = Unlike(backbone=PretrainedSpec(tiny("bert_base")), objective="head", lr_scheduler=plateau)
    with pytest.raises(LoPAError, match=r"monitor must be one of .*val/loss.*, got 'val/los'"):
        trainer(tmp_path, max_steps=1, val_check_interval=1).fit(model, reviews(tmp_path))


@pytest.mark.parametrize(("options", "steps"), [({"val_check_interval": 2}, 2), ({"limit_val_batches": 0}, 1)])
def test_a_plateau_is_looked_for_after_each_validation_or_epoch(
    tiny: Tiny, tmp_path: Path, options: dict[str, Any], steps: int
) -> None:
    from lightning.pytorch.cli import ReduceLROnPlateau as Monitoring

    plateau = functools.partial(Monitoring, monitor="train/loss", patience=0, threshold=1e9, factor=0.5)
    model = module(tiny("bert_base"), objective="head", lr_scheduler=plateau, optimizer=SGD)
    run = trainer(tmp_path, enable_checkpointing=False, callbacks=[], **options)
    run.fit(model, reviews(tmp_path))
    scheduler = run.lr_scheduler_configs[0].scheduler
    assert isinstance(scheduler, ReduceLROnPlateau)
    assert scheduler.last_epoch == steps

"""An optimizer for each group: its steps are torch's own, and all that handles an optimizer handles it."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from lopa_lightning import ClassificationModule, LoPALightningModule
from lopa_lightning.errors import LoPAError
from lopa_lightning.experiments.sizes import Step, sizes
from lopa_lightning.modules.optimizer_groups import OptimizerByGroup, with_rates
from tests.modules.helpers import module, reviews, trainer
from tests.refusals import Refused

Tiny = Callable[[str], str]

MOMENTUM = functools.partial(SGD, lr=0.5, momentum=0.9, weight_decay=0.01)
ADAM = functools.partial(AdamW, lr=0.1)
SHAPES = {"shared_prompt": (3, 2), "low_rank": (4,), "head": (2, 2)}
VALUES = {name: torch.linspace(-1, 1, math.prod(shape)).view(shape) for name, shape in SHAPES.items()}


def copies() -> dict[str, list[nn.Parameter]]:
    return {name: [nn.Parameter(value.clone())] for name, value in VALUES.items()}


def by_group(groups: dict[str, list[nn.Parameter]], others: Any = None) -> OptimizerByGroup:
    return OptimizerByGroup(with_rates(groups, {"head": 0.03}), ADAM, others or {"shared_prompt": MOMENTUM})


def by_hand(groups: dict[str, list[nn.Parameter]]) -> list[torch.optim.Optimizer]:
    rest = [{"params": groups["low_rank"]}, {"params": groups["head"], "lr": 0.03}]
    return [MOMENTUM(groups["shared_prompt"]), ADAM(rest)]


def loss_of(groups: dict[str, list[nn.Parameter]]) -> Tensor:
    return torch.stack([(each.exp() * (number + 1)).sum() for number, (each,) in enumerate(groups.values())]).sum()


def assert_same(groups: dict[str, list[nn.Parameter]], others: dict[str, list[nn.Parameter]]) -> None:
    for name in groups:
        assert torch.equal(groups[name][0], others[name][0]), name


@pytest.mark.parametrize("scaled", [False, True])
def test_its_steps_are_those_of_torchs_own_also_after_a_state_was_loaded(scaled: bool) -> None:
    one, other = copies(), copies()
    optimizer, hand = by_group(one), by_hand(other)
    scalers = [torch.amp.GradScaler("cpu", init_scale=8.0, enabled=scaled) for _ in range(2)]
    for number in range(5):
        if number == 3:  # as a resumed run does
            state, loaded = optimizer.state_dict(), copies()
            for name, (each,) in loaded.items():
                each.data.copy_(one[name][0].detach())
            one, optimizer = loaded, by_group(loaded)
            optimizer.load_state_dict(state)
        for group in optimizer.param_groups:  # as a scheduler does
            group["lr"] *= 0.9
        for each in (group for part in hand for group in part.param_groups):
            each["lr"] *= 0.9
        for groups, parts, scaler in ((one, [optimizer], scalers[0]), (other, hand, scalers[1])):
            loss = loss_of(groups)
            if scaled and number == 1:  # the step is left out
                loss = loss * float("inf")
            scaler.scale(loss).backward()
            for part in parts:
                scaler.unscale_(part)
            nn.utils.clip_grad_norm_([each for group in groups.values() for each in group], 5.0)
            for part in parts:
                scaler.step(part)
                part.zero_grad()
            scaler.update()
        assert_same(one, other)
    assert not torch.equal(one["shared_prompt"][0], VALUES["shared_prompt"])


@pytest.mark.parametrize("name", ["Adagrad", "Adafactor", "RMSprop", "SGD", "NAdam"])
def test_any_of_torchs_goes_on_from_a_saved_state(name: str) -> None:
    def made(groups: dict[str, list[nn.Parameter]]) -> OptimizerByGroup:
        default = functools.partial(getattr(torch.optim, name), lr=0.1)
        return OptimizerByGroup(with_rates(groups, {}), default=default, others={"shared_prompt": MOMENTUM})

    one, other = copies(), copies()
    optimizer = made(one)
    loss_of(one).backward()
    optimizer.step()
    again = made(other)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    values = {key: param.detach().clone() for key, (param,) in one.items()}
    for groups, each in ((one, optimizer), (other, again)):
        for key, (param,) in groups.items():
            param.data.copy_(values[key])
            param.grad = torch.ones_like(param)
        each.step()
    assert_same(one, other)


def test_its_state_is_numbered_as_that_of_one_optimizer() -> None:
    groups = copies()
    optimizer = by_group(groups)
    assert optimizer.step(lambda: loss_of(groups).backward() or 3.0) == 3.0  # type: ignore[func-returns-value]
    saved = optimizer.state_dict()
    assert {index: set(entry) for index, entry in saved["state"].items()} == {
        0: {"momentum_buffer"},
        **{index: {"step", "exp_avg", "exp_avg_sq"} for index in (1, 2)},
    }
    assert [(group["name"], group["params"], group["lr"]) for group in saved["param_groups"]] == [
        ("shared_prompt", [0], 0.5),
        ("low_rank", [1], 0.1),
        ("head", [2], 0.03),
    ]


class Watched(Callback):
    """The initial values of a run, and the gradients of its steps."""

    def __init__(self) -> None:
        self.gradients: list[list[Tensor]] = []
        self.state: dict[str, Tensor] = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.state = copy.deepcopy(pl_module.state_dict())

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        parameters = [each for group in optimizer.param_groups for each in group["params"]]
        self.gradients.append([each.grad.clone() for each in parameters])


def two(model: str, **options: Any) -> ClassificationModule:
    given: dict[str, Any] = {"optimizer": ADAM, "optimizers": {"shared_prompt": MOMENTUM}, **options}
    return module(model, objective="head", learning_rates={"head": 0.03}, **given)


def test_two_steps_of_a_run_are_those_of_two_optimizers(tiny: Tiny, tmp_path: Path) -> None:
    model, watched = two(tiny("bert_base")), Watched()
    options: dict[str, Any] = {"limit_val_batches": 0, "num_sanity_val_steps": 0, "enable_checkpointing": False}
    run = trainer(tmp_path, max_steps=2, gradient_clip_val=0.5, callbacks=[watched], **options)
    run.fit(model, reviews(tmp_path))
    trained = copy.deepcopy(model.state_dict())
    model.load_state_dict(watched.state)
    groups = model._net().parameter_groups()
    hand = by_hand(groups)
    parameters = [each for group in groups.values() for each in group]
    for gradients in watched.gradients:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        nn.utils.clip_grad_norm_(parameters, 0.5)
        for part in hand:
            part.step()
    assert len(watched.gradients) == 2
    assert {name for name, value in model.state_dict().items() if not torch.equal(trained[name], value)} == set()
    # Sizes of the plan: a momentum of the prompt, and two moments of the rest.
    prompt, rest = groups["shared_prompt"], [*groups["low_rank"], *groups["head"]]
    numbers = sum(each.numel() for each in prompt) + 2 * sum(each.numel() for each in rest)
    assert sizes(model, Step(4, 12, 12, 4)).state_bytes == 4 * numbers


@pytest.mark.slow
def test_a_checkpoint_holds_them_and_goes_on_with_no_others(tiny: Tiny, tmp_path: Path) -> None:
    trainer(tmp_path).fit(two(tiny("bert_base")), reviews(tmp_path))
    path = tmp_path / "last.ckpt"
    saved = torch.load(path, weights_only=True)["hyper_parameters"]["optimizers"]
    given = {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.01}
    assert saved == {"shared_prompt": {"class_path": "torch.optim.SGD", "init_args": given}}
    (again,) = LoPALightningModule.load_from_checkpoint(path).group_optimizers.values()
    assert (again.func, again.keywords) == (SGD, given)
    for others, named in (
        (None, "optimizers.shared_prompt SGD, this run has None"),
        ({"shared_prompt": ADAM}, "optimizers.shared_prompt SGD, this run has AdamW"),
        ({"shared_prompt": MOMENTUM, "head": MOMENTUM}, "optimizers.head None, this run has SGD"),
    ):
        with pytest.raises(LoPAError, match=f"the checkpoint holds the state of {named}; start a new run"):
            trainer(tmp_path, 2).fit(two(tiny("bert_base"), optimizers=others), reviews(tmp_path), ckpt_path=path)
    slower = two(tiny("bert_base"), optimizers={"shared_prompt": functools.partial(MOMENTUM, lr=0.25)})
    with pytest.warns(UserWarning, match=r"keeps the checkpoint's optimizer settings: .*optimizers.shared_prompt.*lr"):
        trainer(tmp_path, 2).fit(slower, reviews(tmp_path), ckpt_path=path)


@pytest.mark.parametrize(
    ("optimizers", "message"),
    [
        ({"prompts": MOMENTUM}, "optimizers names prompts; the groups are backbone, head, instance_encoder, "),
        ({"head": functools.partial(SGD, momentum=-1)}, "optimizer: Invalid momentum value: -1"),
        ({"head": torch.optim.LBFGS}, "optimizer: TypeError: LBFGS.step() missing 1 required positional argument"),
    ],
)
def test_an_optimizer_that_cannot_serve_its_group(
    optimizers: Any, message: str, tiny: Tiny, tmp_path: Path, refused: Refused
) -> None:
    data, run = reviews(tmp_path), trainer(tmp_path)
    with refused(message):
        run.fit(two(tiny("bert_base"), optimizers=optimizers), data)


def test_one_for_a_group_that_is_not_trained_is_said() -> None:
    with pytest.warns(UserWarning, match="optimizers has no effect for backbone; trained are shared_prompt, low_rank"):
        by_group(copies(), {"backbone": MOMENTUM})

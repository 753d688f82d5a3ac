"""What LoPALightningModule trains, what it leaves alone, and what it refuses before weights are loaded."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback

from lopa_lightning import (
    ClassificationModule,
    InstanceEncoderSpec,
    LoPA,
    LoPALightningModule,
    PretrainedSpec,
    PromptTuning,
)
from lopa_lightning.errors import LoPAError
from lopa_lightning.modules.resume import ResumePoint
from tests.modules.helpers import LoPATiny, module, reviews, trainer

Tiny = Callable[[str], str]


class StartValues(Callback):
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.values = {name: p.detach().clone() for name, p in pl_module.named_parameters()}


class Modes(Callback):
    """Which modules were in training mode during training."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.training = {name for name, part in pl_module.named_modules() if part.training}


def test_training_changes_every_trained_tensor_and_nothing_frozen(tiny: Tiny, tmp_path: Path) -> None:
    model, start = module(tiny("bert")), StartValues()
    trainer(tmp_path, callbacks=[start], enable_checkpointing=False).fit(model, reviews(tmp_path))
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, start.values[name])}
    assert changed == {f"net.prompt_encoder.{name}" for name, _ in model.net.prompt_encoder.named_parameters()}
    assert changed == set(model.state_dict())


@pytest.mark.parametrize("dropout", [False, True])
def test_the_backbone_stays_in_eval_mode_unless_its_dropout_is_asked_for(
    tiny: Tiny, tmp_path: Path, dropout: bool
) -> None:
    model, modes = module(tiny("bert"), frozen_dropout=dropout), Modes()
    trainer(tmp_path, callbacks=[modes], enable_checkpointing=False).fit(model, reviews(tmp_path))
    assert any(name.startswith("net.prompt_encoder") for name in modes.training)
    assert any(name.startswith("net.backbone.model") for name in modes.training) == dropout


def test_the_instance_encoder_is_in_memory_beside_the_backbone_only_where_nothing_is_kept(
    tiny: Tiny, tmp_path: Path
) -> None:
    data, sizes = reviews(tmp_path), []
    for encoder in ({}, {"name": tiny("bert")}, {"name": tiny("bert"), "cache": False}):
        model = module(tiny("bert"), instance_encoder=InstanceEncoderSpec(**encoder))
        trainer(tmp_path, enable_checkpointing=False, callbacks=[]).fit(model, data)
        sizes.append(sum(p.numel() for p in model.net.instance_encoder.parameters()))
        assert not model.builder.instance_vectors or not model.builder.instance_vectors.encoder._unregistered
    assert sizes == [0, 0, sum(p.numel() for p in model.net.backbone.body.parameters())]


def test_an_instance_encoder_can_be_trained_too(tiny: Tiny, tmp_path: Path) -> None:
    model = module(tiny("bert"), instance_encoder=InstanceEncoderSpec(tiny("bert_base"), trainable=True))
    start = StartValues()
    trainer(tmp_path, callbacks=[start], enable_checkpointing=False).fit(model, reviews(tmp_path))
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, start.values[name])}
    assert any(name.startswith("net.instance_encoder.model.encoder.layer.0") for name in changed)
    assert not any(name.startswith("net.backbone") for name in changed)
    assert {name for name in model.state_dict() if "instance_encoder" in name} >= {
        name for name in changed if "instance_encoder" in name
    }


def test_prompt_tuning_loads_no_instance_encoder_and_reads_no_instance(tiny: Tiny, tmp_path: Path) -> None:
    model = module(tiny("bert"), prompt_encoder=functools.partial(PromptTuning, num_virtual_tokens=3))
    data = reviews(tmp_path)
    trainer(tmp_path, fast_dev_run=True).fit(model, data)
    assert model.net.instance_encoder is None
    assert "instance_input_ids" not in next(iter(data.train_dataloader()))


def test_learning_rates_by_group(tiny: Tiny, tmp_path: Path) -> None:
    model = module(
        tiny("bert"),
        objective="head",
        optimizer=functools.partial(torch.optim.SGD, lr=0.5),
        learning_rates={"shared_prompt": 0.25, "head": 0.125},
    )
    run = trainer(tmp_path, fast_dev_run=True)
    run.fit(model, reviews(tmp_path))
    groups = {group["name"]: group for group in run.optimizers[0].param_groups}
    assert {name: group["lr"] for name, group in groups.items()} == {
        "shared_prompt": 0.25,
        "low_rank": 0.5,
        "head": 0.125,
    }
    optimised = [p for group in groups.values() for p in group["params"]]
    assert {id(p) for p in optimised} == {id(p) for p in model.parameters() if p.requires_grad}


def test_a_learning_rate_for_no_group_is_refused_before_weights_are_loaded(tiny: Tiny, tmp_path: Path) -> None:
    model = module(tiny("bert"), learning_rates={"low_rnak": 1e-3})
    groups = "backbone, head, instance_encoder, instance_readout, low_rank, shared_prompt"
    with pytest.raises(LoPAError, match=f"low_rnak; the groups are {groups}"):
        trainer(tmp_path).fit(model, reviews(tmp_path))
    assert model.net is None


class Resaved(ClassificationModule):
    """Calls what a Lightning module of another kind needs to call."""

    def __init__(self, margin: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.save_hyperparameters()


def test_a_subclass_may_save_its_arguments_again_and_a_user_may_freeze_a_group(tiny: Tiny, tmp_path: Path) -> None:
    data = reviews(tmp_path)
    model = Resaved(1.0, backbone=PretrainedSpec(tiny("bert")), prompt_encoder=LoPATiny, task=data.task)
    model.configure_model()
    frozen = model.net.prompt_encoder.shared_prompt.weight
    frozen.requires_grad_(False).fill_(0.5)
    trainer(tmp_path).fit(model, data)
    again = LoPALightningModule.load_from_checkpoint(tmp_path / "last.ckpt")
    assert again.hparams["margin"] == 1.0
    assert again.net.prompt_encoder.shared_prompt.weight.unique().tolist() == [0.5]
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


class WithOwnParameter(ClassificationModule):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.temperature = torch.nn.Parameter(torch.ones(()))


class WithoutGroup(PromptTuning):
    def __init__(self, embedding_dim: int, instance_dim: int) -> None:
        super().__init__(embedding_dim, instance_dim)
        self.shift = torch.nn.Parameter(torch.zeros(embedding_dim))


@pytest.mark.parametrize(
    ("kind", "method", "named"),
    [
        (WithOwnParameter, LoPATiny, "temperature"),
        (ClassificationModule, WithoutGroup, "net.prompt_encoder.shift"),
    ],
)
def test_a_parameter_that_no_optimizer_would_be_given_is_refused(
    tiny: Tiny, tmp_path: Path, kind: type[ClassificationModule], method: Any, named: str
) -> None:
    model = kind(backbone=PretrainedSpec(tiny("bert")), prompt_encoder=method)
    with pytest.raises(LoPAError, match=f"^{named} would not be trained and saved: parameter_groups of a prompt"):
        trainer(tmp_path).fit(model, reviews(tmp_path))
    assert model.net is None


class WithStatistics(PromptTuning):
    def __init__(self, embedding_dim: int, instance_dim: int) -> None:
        super().__init__(embedding_dim, instance_dim)
        self.register_buffer("scale", torch.randn(embedding_dim))
        self.register_buffer("made_anew", torch.ones(embedding_dim), persistent=False)


class WithFrozen(ClassificationModule):
    def configure_readout(self, backbone: Any) -> Any:
        readout = super().configure_readout(backbone)
        readout.fixed = torch.nn.Parameter(torch.randn(3), requires_grad=False)
        return readout


@pytest.mark.parametrize(
    ("kind", "method", "named"),
    [(ClassificationModule, WithStatistics, "net.prompt_encoder.scale"), (WithFrozen, LoPATiny, "net.readout.fixed")],
)
def test_what_a_checkpoint_would_not_bring_back_is_refused(
    tiny: Tiny, tmp_path: Path, kind: type[ClassificationModule], method: Any, named: str
) -> None:
    model = kind(backbone=PretrainedSpec(tiny("bert")), prompt_encoder=method)
    with pytest.raises(LoPAError, match=f"^{named} would not be saved: .* buffers with persistent=False"):
        trainer(tmp_path).fit(model, reviews(tmp_path))
    assert model.net is None


def test_a_rate_of_zero_keeps_a_group_as_it_is(tiny: Tiny, tmp_path: Path) -> None:
    model, start = module(tiny("bert"), learning_rates={"shared_prompt": 0.0}), StartValues()
    trainer(tmp_path, callbacks=[start], enable_checkpointing=False).fit(model, reviews(tmp_path))
    name = "net.prompt_encoder.shared_prompt.weight"
    assert torch.equal(model.state_dict()[name], start.values[name])


def test_a_plateau_scheduler_follows_the_validation_loss(tiny: Tiny, tmp_path: Path) -> None:
    plateau = functools.partial(torch.optim.lr_scheduler.ReduceLROnPlateau, patience=0, threshold=1e9)
    model = module(tiny("bert"), lr_scheduler=plateau, optimizer=functools.partial(torch.optim.SGD, lr=1.0))
    run = trainer(tmp_path, epochs=4)
    run.fit(model, reviews(tmp_path))
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-4)


class CutShort(Callback):
    """Ends an evaluation after its first batch."""

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        raise RuntimeError("cut short")

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        raise RuntimeError("cut short")


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_an_evaluation_that_was_cut_short_leaves_nothing(stage: str, tiny: Tiny, tmp_path: Path) -> None:
    model, data = module(tiny("bert")), reviews(tmp_path, eval_batch_size=3)
    model.learned = True
    options: Any = {"enable_checkpointing": False}
    (wanted,) = getattr(trainer(tmp_path, callbacks=[], **options), stage)(model, data)
    with pytest.raises(RuntimeError, match="cut short"):
        getattr(trainer(tmp_path, callbacks=[CutShort()], **options), stage)(model, data)
    (found,) = getattr(trainer(tmp_path, callbacks=[], **options), stage)(model, data)
    assert found == wanted


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("trained", ["backbone", "instance_encoder", "copy of the backbone"])
def test_weights_that_training_rounds_are_warned_of(tiny: Tiny, tmp_path: Path, dtype: Any, trained: str) -> None:
    path = tiny("bert_base")
    options: dict[str, Any] = {"objective": "head", "instance_encoder": InstanceEncoderSpec(path)}
    if trained == "instance_encoder":
        options["instance_encoder"] = InstanceEncoderSpec(path, trainable=True, dtype=dtype)
        model = module(path, **options)
    elif trained != "backbone":
        options["instance_encoder"] = InstanceEncoderSpec(trainable=True)
        model = ClassificationModule(backbone=PretrainedSpec(path, dtype=dtype), prompt_encoder=LoPATiny, **options)
    else:
        model = ClassificationModule(
            backbone=PretrainedSpec(path, dtype=dtype), prompt_encoder=LoPATiny, train_backbone=1, **options
        )
    run = trainer(tmp_path, callbacks=[], enable_checkpointing=False, limit_train_batches=1)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run.fit(model, reviews(tmp_path))
    warned = [str(each.message) for each in said if "is trained in" in str(each.message)]
    group, owner = {"copy of the backbone": ("instance_encoder", "backbone")}.get(trained, (trained, trained))
    text = f"{group} is trained in bfloat16, which rounds it after each step: small changes are lost; {owner}.dtype"
    assert warned == [f"{text}: float32 keeps them"] * (dtype == "bfloat16")


@pytest.mark.parametrize(("precision", "objective"), [("bf16-mixed", "masked_lm"), ("bf16-true", "head")])
def test_low_precision_runs(tiny: Tiny, tmp_path: Path, precision: Any, objective: Any) -> None:
    model, run = module(tiny("bert"), objective=objective), trainer(tmp_path, precision=precision)
    with warnings.catch_warnings(record=True) as said:
        run.fit(model, reviews(tmp_path))
    assert any("rounds what is trained" in str(each.message) for each in said) == (precision == "bf16-true")
    assert torch.isfinite(run.callback_metrics["val/loss"])
    scores: Any = model.scores["val"]
    run.precision_plugin.convert_module(model)  # as it was while it ran
    for loss in [1.0] * 300 + [3.0] * 300:  # in bfloat16 neither the sum nor the count would grow any more
        scores.loss.update(torch.tensor(loss), 4)
    assert float(scores.loss.compute()) == 2.0


def test_runs_of_one_program_do_not_begin_alike(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")  # restored in the end
    seed_everything(1)
    drawn = []
    for _ in range(3):
        model = module(tiny("bert"), instance_encoder=InstanceEncoderSpec(cache=False))
        trainer(tmp_path, fast_dev_run=True).fit(model, reviews(tmp_path))
        drawn.append(float(torch.rand(())))
    assert len({*drawn}) == 3
    seed_everything(1)
    trainer(tmp_path, fast_dev_run=True).fit(module(tiny("bert")), reviews(tmp_path))
    assert float(torch.rand(())) == drawn[0]


class Misspelt(ClassificationModule):
    def configure_readout(self, backbone: Any) -> Any:
        return self.redout


def test_what_a_users_code_misspells_is_named(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(AttributeError, match="'Misspelt' object has no attribute 'redout'"):
        trainer(tmp_path).fit(Misspelt(backbone=PretrainedSpec(tiny("bert"))), reviews(tmp_path))


@pytest.mark.parametrize(
    ("option", "kind"), [("backbone", "PretrainedSpec"), ("instance_encoder", "InstanceEncoderSpec")]
)
def test_a_model_is_named_by_a_spec(option: str, kind: str) -> None:
    given: Any = {"backbone": PretrainedSpec("any"), option: "some/model"}
    with pytest.raises(LoPAError, match=rf"^{option} must be a {kind}, such as {kind}\('some/model'\)$"):
        ClassificationModule(**given)


def test_a_backbone_in_bfloat16_goes_with_prompts_in_float32(tiny: Tiny, tmp_path: Path) -> None:
    model = ClassificationModule(
        backbone=PretrainedSpec(tiny("bert"), dtype="bfloat16"), prompt_encoder=LoPATiny, objective="masked_lm"
    )
    trainer(tmp_path).fit(model, reviews(tmp_path))
    assert {p.dtype for p in model.net.backbone.parameters()} == {torch.bfloat16}
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}


def test_a_rate_for_a_group_that_is_not_trained_is_said(tiny: Tiny, tmp_path: Path) -> None:
    model = module(tiny("bert"), learning_rates={"instance_encoder": 1e-2, "head": 1e-2})
    with pytest.warns(UserWarning, match="no effect for instance_encoder; trained are shared_prompt, low_rank"):
        trainer(tmp_path, fast_dev_run=True).fit(model, reviews(tmp_path))


def test_warmup_rises_linearly_to_the_optimizers_rate_and_stays(tiny: Tiny, tmp_path: Path) -> None:
    rates: list[float] = []

    class Rates(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
            rates.append(optimizer.param_groups[0]["lr"])

    model = module(tiny("bert"), warmup=0.4, optimizer=functools.partial(torch.optim.SGD, lr=1.0))
    trainer(tmp_path, epochs=2, callbacks=[Rates()], enable_checkpointing=False).fit(model, reviews(tmp_path))
    assert rates == pytest.approx([1 / 5, 2 / 5, 3 / 5, 4 / 5, 1, 1, 1, 1, 1, 1])


def test_warmup_precedes_another_schedule(tiny: Tiny, tmp_path: Path) -> None:
    model = module(
        tiny("bert"),
        warmup=2,
        optimizer=functools.partial(torch.optim.SGD, lr=1.0),
        lr_scheduler=functools.partial(torch.optim.lr_scheduler.StepLR, step_size=2, gamma=0.1),
    )
    rates: list[float] = []

    class Rates(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
            rates.append(optimizer.param_groups[0]["lr"])

    trainer(tmp_path, epochs=2, callbacks=[Rates()], enable_checkpointing=False).fit(model, reviews(tmp_path))
    assert rates == pytest.approx([1 / 3, 2 / 3, 1, 1, 0.1, 0.1, 0.01, 0.01, 1e-3, 1e-3])


def test_instance_vectors_in_the_batch_replace_the_encoder(tiny: Tiny, tmp_path: Path) -> None:
    model, data = module(tiny("bert")), reviews(tmp_path)
    trainer(tmp_path, fast_dev_run=True).fit(model, data)
    model.eval()
    batch = next(iter(data.val_dataloader()[0]))
    with torch.no_grad():
        cached = {**batch, "instance": model.net.encode_instance(batch)}
        without_ids = {key: value for key, value in cached.items() if not key.startswith("instance_")}
        torch.testing.assert_close(model(without_ids), model(batch), rtol=0, atol=0)
        other = {**without_ids, "instance": without_ids["instance"].flip(0) * 3}
        assert not torch.allclose(model(other), model(batch), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "maskd_lm"}, "objective must be one of masked_lm, causal_lm, head, got 'maskd_lm'"),
        ({"learning_rates": {"low_rank": -1.0}}, "learning_rates must be at least 0 and finite"),
        ({"warmup": -5}, "warmup must be a number of steps, or a share of the run below 1; got -5"),
        ({"prompt_encoder": functools.partial(LoPATiny, rank=0)}, "rank must be at least 1, got 0"),
        (
            {"prompt_encoder": functools.partial(LoPATiny, num_virtual_tokens=64)},
            "64 virtual tokens leave no room for text in the 64 positions",
        ),
    ],
)
def test_wrong_options_end_in_one_clear_error(
    tiny: Tiny, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(LoPAError, match=message):
        trainer(tmp_path).fit(module(tiny("bert"), **options), reviews(tmp_path))


def test_a_share_of_an_endless_run_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(LoPAError, match=r"warmup 0\.1 is a share of a run that has no end"):
        trainer(tmp_path, epochs=-1).fit(module(tiny("bert"), warmup=0.1), reviews(tmp_path))


def test_processes_that_are_spawned_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    model = module(tiny("bert"))
    model._trainer = trainer(tmp_path, strategy="ddp_spawn")
    with pytest.raises(LoPAError, match="use strategy: ddp"):
        model.setup("fit")


def test_masked_lm_with_a_model_without_mask_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(LoPAError, match="no mask token; use objective: causal_lm or head"):
        trainer(tmp_path).fit(module(tiny("gpt2")), reviews(tmp_path))


def test_what_a_checkpoint_could_not_hold_is_refused_at_once(tiny: Tiny) -> None:
    with pytest.raises(TypeError, match="cannot be stored in a checkpoint"):
        module(tiny("bert"), prompt_encoder=lambda d, e: LoPA(d, e))


def test_a_model_not_loaded_yet_says_so(tiny: Tiny) -> None:
    with pytest.raises(RuntimeError, match="call configure_model"):
        module(tiny("bert"))({})


def test_a_seeded_step_draws_the_same_dropout_whatever_came_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    trainer: Any = SimpleNamespace(current_epoch=2, global_rank=1)
    draws = []
    for noise in (0, 3):
        torch.rand(noise)
        ResumePoint().on_train_batch_start(trainer, None, {}, 5)
        draws.append(torch.rand(4))
    ResumePoint().on_train_batch_start(trainer, None, {}, 6)
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], torch.rand(4))

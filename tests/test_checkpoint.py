"""What a checkpoint holds, how large it is, and what it may be loaded into."""

from __future__ import annotations

import functools
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import seed_everything
from transformers import AutoModelForMaskedLM

from lopa_lightning import (
    ClassificationModule,
    InstanceEncoderSpec,
    LoPA,
    LoPALightningModule,
    PretrainedSpec,
    PromptTuning,
)
from lopa_lightning.checkpoint import IDENTITY_KEY, fingerprint
from lopa_lightning.errors import LoPAError
from lopa_lightning.plain import plain
from tests.modules.helpers import LoPATiny, module, reviews, trainer
from tests.tiny import save_tiny

Tiny = Callable[[str], str]

PROMPT_KEYS = {
    "shared_prompt.weight",
    *(
        f"{head}.{layer}.{part}"
        for head in ("row_head", "column_head")
        for layer in (1, 3)
        for part in ("weight", "bias")
    ),
}


def fitted(model: Any, folder: Path, epochs: int = 1, **kwargs: Any) -> Path:
    trainer(folder, epochs).fit(model, reviews(folder, **kwargs))
    return folder / "last.ckpt"


@pytest.fixture(scope="module")
def once(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return fitted(module(tiny("bert")), tmp_path_factory.mktemp("fitted"))


@pytest.fixture
def path(once: Path, tmp_path: Path) -> Path:
    """A checkpoint of the plain module, of a run on :func:`reviews` in the same folder; a test may change it."""
    reviews(tmp_path)
    return Path(shutil.copy(once, tmp_path / "last.ckpt"))


def test_it_holds_exactly_the_trained_tensors(path: Path) -> None:
    saved = torch.load(path, weights_only=True)
    assert set(saved["state_dict"]) == {f"net.prompt_encoder.{key}" for key in PROMPT_KEYS}
    moments = saved["optimizer_states"][0]["state"]
    assert sum(state["exp_avg"].numel() for state in moments.values()) == sum(
        t.numel() for t in saved["state_dict"].values()
    )


def test_with_a_head_it_holds_the_head_too(tiny: Tiny, tmp_path: Path) -> None:
    saved = torch.load(fitted(module(tiny("bert_base"), objective="head"), tmp_path), weights_only=True)
    assert {key for key in saved["state_dict"] if "prompt_encoder" not in key} == {
        "net.readout.linear.weight",
        "net.readout.linear.bias",
    }


@pytest.mark.parametrize("hidden_dim", [8, 512])
def test_its_size_is_weights_and_two_moments_and_little_else(tiny: Tiny, tmp_path: Path, hidden_dim: int) -> None:
    model = module(tiny("bert"), prompt_encoder=functools.partial(LoPA, hidden_dim=hidden_dim))
    path = fitted(model, tmp_path)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert path.stat().st_size <= 3.1 * 4 * trained + 64 * 1024


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_module_is_rebuilt_from_the_checkpoint_alone(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    model = module(tiny(kind), instance_encoder=InstanceEncoderSpec(tiny("bert_base"), "cls", normalize=True))
    path = fitted(model, tmp_path)
    batch = next(iter(_val_loader(model, tmp_path)))
    loaded = LoPALightningModule.load_from_checkpoint(path)
    assert type(loaded) is type(model)
    assert loaded.hparams == model.hparams
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(batch), model.eval()(batch), rtol=0, atol=0)


def _val_loader(model: Any, folder: Path) -> Any:
    data = reviews(folder)
    data.connect(model.input_spec)
    data.setup("validate")
    return data.val_dataloader()[0]


def test_a_module_rebuilt_from_a_checkpoint_can_be_trained_and_saved_again(tiny: Tiny, tmp_path: Path) -> None:
    for run in ("first", "second"):
        (tmp_path / run).mkdir()
    loaded = LoPALightningModule.load_from_checkpoint(fitted(module(tiny("bert")), tmp_path / "first"))
    again = LoPALightningModule.load_from_checkpoint(fitted(loaded, tmp_path / "second"))
    assert again.hparams == loaded.hparams


@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=pytest.mark.slow), 0.3])
def test_one_epoch_and_a_resumed_one_equal_two_bit_for_bit(tiny: Tiny, tmp_path: Path, dropout: float) -> None:
    make = functools.partial(LoPATiny, dropout=dropout)
    options: dict[str, Any] = {"prompt_encoder": make, "warmup": 3, "objective": "head"}
    states, backbone = {}, tiny("bert_base")
    for name, runs in {"whole": [2], "parts": [1, 2]}.items():
        path = None
        for epochs in runs:
            folder = tmp_path / f"{name}-{epochs}"
            folder.mkdir()
            seed_everything(5)
            model = module(backbone, **options)
            trainer(folder, epochs).fit(model, reviews(folder, rows=22), ckpt_path=path)
            path = folder / "last.ckpt"
        states[name] = torch.load(path, weights_only=True)
    whole, parts = states["whole"], states["parts"]
    assert whole["global_step"] == parts["global_step"] == 12
    for key, value in whole["state_dict"].items():
        assert torch.equal(value, parts["state_dict"][key]), key
    for index, moments in whole["optimizer_states"][0]["state"].items():
        assert torch.equal(moments["exp_avg_sq"], parts["optimizer_states"][0]["state"][index]["exp_avg_sq"])
    assert whole["lr_schedulers"] == parts["lr_schedulers"]


def _other_backbone(tiny: Tiny, folder: Path) -> dict[str, Any]:
    """The same architecture with one weight changed by a little."""
    model = AutoModelForMaskedLM.from_pretrained(tiny("bert"))
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[0, 0] += 0.1
    model.save_pretrained(folder / "other")
    module(tiny("bert")).input_spec.tokenizer.save_pretrained(folder / "other")
    return {"model": str(folder / "other")}


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_other_backbone, r"backbone: the checkpoint was made with .*bert.* this run has .*other"),
        (
            {"prompt_encoder": functools.partial(LoPATiny, num_virtual_tokens=5)},
            "num_virtual_tokens: the checkpoint has 3, this run 5",
        ),
        ({"prompt_encoder": functools.partial(LoPATiny, rank=1)}, "rank: the checkpoint has 2, this run 1"),
        ({"prompt_encoder": PromptTuning}, "class_path: the checkpoint has 'lopa', this run 'prompt_tuning'"),
        (
            {"instance_encoder": InstanceEncoderSpec(pooling="max")},
            "pooling: the checkpoint has 'mean', this run 'max'",
        ),
        ({"placement": "after_first"}, "placement: the checkpoint has 'before', this run 'after_first'"),
        ({"objective": "head"}, "objective: the checkpoint has 'masked_lm', this run 'head'"),
    ],
)
def test_what_it_does_not_fit_is_refused_with_what_differs(
    tiny: Tiny, tmp_path: Path, path: Path, change: Any, message: str
) -> None:
    options = change(tiny, tmp_path) if callable(change) else dict(change)
    other = module(options.pop("model", tiny("bert")), **options)
    with pytest.raises(LoPAError, match=message):
        trainer(tmp_path).validate(other, reviews(tmp_path), ckpt_path=path, verbose=False)


def test_what_shapes_training_alone_may_differ(tiny: Tiny, tmp_path: Path, path: Path) -> None:
    other = module(tiny("bert"), prompt_encoder=functools.partial(LoPATiny, dropout=0.5, init="normal"), warmup=2)
    trainer(tmp_path).validate(other, reviews(tmp_path), ckpt_path=path, verbose=False)
    assert torch.equal(
        other.net.prompt_encoder.shared_prompt.weight,
        torch.load(path)["state_dict"]["net.prompt_encoder.shared_prompt.weight"],
    )


@pytest.mark.parametrize("damage", ["missing", "unexpected", "shape", "foreign"])
def test_loading_is_strict(path: Path, damage: str) -> None:
    saved = torch.load(path, weights_only=True)
    key = "net.prompt_encoder.row_head.1.bias"
    if damage == "missing":
        del saved["state_dict"][key]
    elif damage == "unexpected":
        saved["state_dict"]["net.backbone.model.cls.predictions.bias"] = torch.zeros(3)
    elif damage == "shape":
        saved["state_dict"][key] = torch.zeros(9)
    else:
        del saved[IDENTITY_KEY]
    torch.save(saved, path)
    message = {
        "missing": f"{key}: missing in the checkpoint",
        "unexpected": "net.backbone.model.cls.predictions.bias: not trained here",
        "shape": r"row_head.1.bias: the checkpoint has \(9,\), this run \(8,\)",
        "foreign": "no checkpoint of LoPA Lightning",
    }[damage]
    with pytest.raises(LoPAError, match=message):
        LoPALightningModule.load_from_checkpoint(path)


class Payload:
    ran = False

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return exec, ("import tests.test_checkpoint as t; t.Payload.ran = True",)


def test_no_pickled_code_runs_from_a_checkpoint(tiny: Tiny, tmp_path: Path, path: Path) -> None:
    torch.save({**torch.load(path, weights_only=True), "payload": Payload()}, path)
    for weights_only in (None, False):
        with pytest.raises(LoPAError, match=r"cannot be read as a checkpoint: it holds '__builtin__.exec'"):
            LoPALightningModule.load_from_checkpoint(path, weights_only=weights_only)
    with pytest.raises(LoPAError, match=r"cannot be read as a checkpoint: it holds '__builtin__.exec'"):
        trainer(tmp_path).validate(module(tiny("bert")), reviews(tmp_path), ckpt_path=path)
    assert not Payload.ran


def test_a_model_is_the_same_under_any_name_and_in_bfloat16(tiny: Tiny, tmp_path: Path) -> None:
    model = AutoModelForMaskedLM.from_pretrained(tiny("bert"))
    model.save_pretrained(tmp_path / "copy", max_shard_size="20KB")
    copy = AutoModelForMaskedLM.from_pretrained(tmp_path / "copy")
    half = AutoModelForMaskedLM.from_pretrained(tiny("bert"), dtype=torch.bfloat16, attn_implementation="eager")
    assert fingerprint(model) == fingerprint(copy) == fingerprint(half)


def test_models_of_other_size_or_weights_are_not_the_same(tiny: Tiny, tmp_path: Path) -> None:
    first = AutoModelForMaskedLM.from_pretrained(tiny("bert"))
    other = AutoModelForMaskedLM.from_pretrained(save_tiny("roberta", tmp_path))
    assert fingerprint(first)["config"] != fingerprint(other)["config"]
    with torch.no_grad():
        first.bert.pooler = None
        before = fingerprint(first)
        first.cls.predictions.bias[0] += 1
    assert fingerprint(first)["config"] == before["config"]
    assert fingerprint(first)["weights"] != before["weights"]


class OwnSignature(ClassificationModule):
    def __init__(self, name: str, m: int = 3) -> None:
        super().__init__(
            objective="head",
            backbone=PretrainedSpec(name),
            prompt_encoder=functools.partial(LoPATiny, num_virtual_tokens=m),
        )


def test_a_subclass_with_arguments_of_its_own_is_rebuilt_with_its_task(tiny: Tiny, tmp_path: Path) -> None:
    path = fitted(OwnSignature(tiny("bert_base"), m=2), tmp_path)
    again = LoPALightningModule.load_from_checkpoint(path)
    assert type(again) is OwnSignature
    assert again.task.labels == ["good", "bad"]
    assert again.net.prompt_encoder.num_virtual_tokens == 2


def test_a_backbone_that_has_moved_is_named_anew(tiny: Tiny, tmp_path: Path, path: Path) -> None:
    moved = shutil.copytree(tiny("bert"), tmp_path / "moved")
    again = LoPALightningModule.load_from_checkpoint(path, backbone=PretrainedSpec(str(moved)))
    assert again.hparams["backbone"]["name"] == str(moved)
    with pytest.raises(LoPAError, match="ClassificationModule takes no backbnoe; it takes adapter, backbone, "):
        LoPALightningModule.load_from_checkpoint(path, backbnoe=PretrainedSpec(str(moved)))


def test_a_config_may_say_more_or_less_than_it_did(tiny: Tiny, tmp_path: Path, path: Path) -> None:
    moved = shutil.copytree(tiny("bert"), tmp_path / "moved")
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps({**config, "a_new_setting": 1, "id2label": {"0": "no", "1": "yes"}}))
    trainer(tmp_path).validate(module(str(moved)), reviews(tmp_path), ckpt_path=path, verbose=False)
    (moved / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    with pytest.raises(LoPAError, match=r"backbone\.config\.hidden_act: the checkpoint has 'gelu', this run 'relu'"):
        trainer(tmp_path).validate(module(str(moved)), reviews(tmp_path), ckpt_path=path, verbose=False)


def test_another_template_is_refused_where_words_are_read(tiny: Tiny, tmp_path: Path, path: Path) -> None:
    other = reviews(tmp_path, template=("{text} {mask}",))
    with pytest.raises(LoPAError, match="template: the checkpoint has"):
        trainer(tmp_path).validate(module(tiny("bert")), other, ckpt_path=path, verbose=False)


def test_going_on_with_other_rates_warns_and_with_another_optimizer_is_refused(
    tiny: Tiny, tmp_path: Path, path: Path
) -> None:
    faster = module(tiny("bert"), optimizer=functools.partial(torch.optim.AdamW, lr=0.5))
    with pytest.warns(
        UserWarning,
        match=r"optimizer settings: optimizer.init_args.lr: .* 0.01, this run 0.5",
    ):
        trainer(tmp_path, 2).fit(faster, reviews(tmp_path), ckpt_path=path)
    other = module(tiny("bert"), optimizer=functools.partial(torch.optim.SGD, lr=0.5))
    with pytest.raises(LoPAError, match="holds the state of optimizer AdamW, this run has SGD"):
        trainer(tmp_path, 2).fit(other, reviews(tmp_path), ckpt_path=path)


def test_an_optimizer_is_the_same_under_its_other_path(tiny: Tiny, tmp_path: Path, path: Path) -> None:
    saved = torch.load(path, weights_only=True)
    saved["hyper_parameters"]["optimizer"]["class_path"] = "torch.optim.AdamW"  # as a config writes it
    torch.save(saved, path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="a resumed run keeps")
        trainer(tmp_path, 2).fit(module(tiny("bert")), reviews(tmp_path), ckpt_path=path)


def test_going_on_within_an_epoch_from_an_unknown_place_warns(tiny: Tiny, tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=3)
    run.fit(module(tiny("bert")), reviews(tmp_path))
    run.save_checkpoint(tmp_path / "mid.ckpt")
    saved = torch.load(tmp_path / "mid.ckpt", weights_only=True)
    del saved["loops"]["fit_loop"]["state_dict"]["combined_loader"]  # as other data modules leave it
    torch.save(saved, tmp_path / "mid.ckpt")
    with pytest.warns(UserWarning, match="saved within an epoch, after 3 batches"):
        trainer(tmp_path, 2).fit(module(tiny("bert")), reviews(tmp_path), ckpt_path=tmp_path / "mid.ckpt")


def test_plain_data_has_no_tuples_paths_or_objects() -> None:
    value = {"a": (1, 2), "b": InstanceEncoderSpec(), "c": functools.partial(LoPA, rank=1), 3: None}
    described = plain(value)
    assert described["a"] == [1, 2]
    assert described["b"]["pooling"] == "mean"
    assert described["c"]["class_path"] == "lopa"
    assert described["c"]["init_args"]["rank"] == 1
    assert described["3"] is None
    assert [type(v) for v in plain([np.float64(0.5), np.int64(3), np.str_("a"), True])] == [float, int, str, bool]

    class Local(LoPA):
        pass

    for value in (object(), Local):
        with pytest.raises(TypeError, match="cannot be stored"):
            plain({"x": value})

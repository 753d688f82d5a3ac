"""Settings that cannot be right are refused before weights are read and, where none is needed to know, before rows."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.cli import ReduceLROnPlateau
from transformers import AutoTokenizer

from lopa_lightning import (
    IDPG,
    CausalLMModule,
    DePT,
    InstanceEncoderSpec,
    LoPA,
    PretrainedSpec,
    PromptTuning,
    PTuning,
)
from lopa_lightning.backbones.generation import generation_config
from lopa_lightning.callbacks import BestCheckpoint
from lopa_lightning.errors import LoPAError
from tests.modules.helpers import causal, completions, module, reviews, trainer
from tests.refusals import Refused

Tiny = Callable[[str], str]

HUGE, NAN, INF = 10**30, float("nan"), float("inf")
LOGGED = "monitor must be one of train/loss, val/loss, val/score, val/accuracy, val/majority_share, got "


@pytest.fixture(autouse=True)
def _in_a_folder_with_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    reviews(Path("data"))


def fit(model: str, data: dict[str, Any] | None = None, callbacks: list[Any] | None = None, **options: Any) -> None:
    folder = Path("data")
    run = trainer(folder, callbacks=callbacks or [])
    run.fit(module(model, **options), datamodule=reviews(folder, **(data or {})))


@pytest.mark.sampled(12)
@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        *(
            (LoPA, {"dropout": value}, f"dropout must be from 0 to 1, got {value}")
            for value in (-0.1, 1.1, NAN, INF, -INF)
        ),
        (IDPG, {"dropout": -1}, "dropout must be from 0 to 1, got -1"),
        *((LoPA, {"rank": value}, f"rank must be at most 32, got {value}") for value in (33, 10**6, HUGE)),
        *((DePT, {"rank": value}, f"rank must be at most 32, got {value}") for value in (33, 10**6)),
        *(
            (LoPA, {name: value}, f"{name} must be {allowed}")
            for name in ("rank", "hidden_dim", "num_virtual_tokens")
            for value, allowed in (
                (0, "at least 1"),
                (-1, "at least 1"),
                (2.5, "a whole number"),
                (True, "a whole number"),
            )
        ),
        (LoPA, {"hidden_dim": 10**9}, "hidden_dim must be at most 1000000, got 1000000000"),
        (LoPA, {"hidden_dim": HUGE}, f"hidden_dim must be at most 1000000, got {HUGE}"),
        (PTuning, {"input_dim": HUGE}, f"input_dim must be at most 1000000, got {HUGE}"),
        (PTuning, {"encoder": "lstm", "num_layers": 10**6}, "num_layers must be at most 100, got 1000000"),
        (DePT, {"max_length": HUGE}, f"max_length must be at most 1000000, got {HUGE}"),
        (PromptTuning, {"num_virtual_tokens": HUGE}, f"num_virtual_tokens must be at most 1000000, got {HUGE}"),
        *(
            (PromptTuning, {"init_std": value}, f"init_std must be a finite number from 0, got {value}")
            for value in (-1, NAN, INF)
        ),
        (PromptTuning, {"init": "text", "init_text": " \n"}, "init_text ' \\n' has no tokens"),
        (IDPG, {"phm": 10**6}, "phm must divide a layer's widths, got 1000000"),
        (LoPA, {"num_virtual_tokens": 64}, "64 virtual tokens leave no room for text in the 64 positions"),
        (LoPA, {"num_virtual_tokens": 10**6}, "1000000 virtual tokens leave no room for text in the 64 positions"),
    ],
    ids=lambda value: ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_a_size_of_a_method(method: Any, options: dict[str, Any], message: str, tiny: Tiny, refused: Refused) -> None:
    with refused(message):
        fit_checked(tiny("bert"), functools.partial(method, **options))


def fit_checked(model: str, method: Any) -> None:
    """Builds what is known before rows and weights, as a Trainer asks for it."""
    module(model, prompt_encoder=method).input_spec  # noqa: B018


@pytest.mark.sampled(10)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rates": {"low_rnk": 1e-3}}, "learning_rates names low_rnk; the groups are backbone, head"),
        (
            {"placement": "behind"},
            "placement must be one of before, after_first, after, every_layer, system, user, got 'behind'",
        ),
        ({"head_pooling": "sum"}, "head_pooling must be one of cls, mean, last, max, got 'sum'"),
        ({"objective": "mlm"}, "objective must be one of masked_lm, causal_lm, head, got 'mlm'"),
        ({"adapter": {"peft_type": "LORAA"}}, "adapter.peft_type must be one of"),
        ({"adapter": {"peft_type": "LORA", "r": 0}}, "adapter {'peft_type': 'LORA', 'r': 0}: `r` should be a positive"),
        ({"adapter": {"peft_type": "LORA", "target_modules": ["nope"]}}, "Target modules {'nope'} not found"),
        ({"adapter": {"peft_type": "LORA", "rr": 8}}, "unexpected keyword argument 'rr'"),
        ({"adapter": {"peft_type": "LORA", "lora_dropout": 2.0}}, "between 0 and 1, but got 2.0"),
        (
            {"instance_encoder": InstanceEncoderSpec(adapter={"peft_type": "LORA", "target_modules": ["nope"]})},
            "instance_encoder.adapter {'peft_type': 'LORA', 'target_modules': ['nope']}: Target modules {'nope'} not",
        ),
        (
            {"instance_encoder": InstanceEncoderSpec(adapter={"r": 8})},
            "instance_encoder.adapter.peft_type must be one of",
        ),
        (
            {"data": {"metrics": ["acuracy"]}},
            "metrics of classification must be of accuracy, f1, matthews; got ac",
        ),
        (
            {"data": {"metrics": ["pearson"]}},
            "metrics of classification must be of accuracy, f1, matthews; got pe",
        ),
        ({"data": {"words": ["great", "unthinkable"]}}, "label word 'unthinkable' must be one token of the backbone"),
        ({"data": {"words": ["great", "great good"]}}, "label word 'great good' must be one token of the backbone"),
        ({"data": {"words": ["great", ""]}}, "label word '' must be one token of the backbone, but it is []"),
        ({"data": {"words": None}}, "objective 'masked_lm' needs label words, one for each of ['good', 'bad']"),
        ({"data": {"template": ("{text}",)}}, "needs a template with {mask}, got ['{text}']"),
        ({"data": {"template": ("{txt} {mask}",)}}, "no column txt; there are text, label"),
        ({"data": {"max_length": 2}}, "leaves no room for text in 2: those of max_length"),
        ({"instance_encoder": InstanceEncoderSpec("no/such")}, "no model found for 'no/such'"),
        ({"callbacks": [EMAWeightAveraging()]}, "EMAWeightAveraging write checkpoints that cannot be loaded here"),
        ({"callbacks": [StochasticWeightAveraging(1e-2)]}, "StochasticWeightAveraging averages a copy that has no"),
        *(
            ({"callbacks": [ModelCheckpoint(monitor=name)]}, f"{LOGGED}{name!r}")
            for name in ("val/scor", "val_loss", "val/f1", "score", "valid/loss", "train/los", "lr")
        ),
        ({"callbacks": [EarlyStopping("val/los")]}, f"{LOGGED}'val/los'"),
        ({"lr_scheduler": functools.partial(ReduceLROnPlateau, monitor="val/scor")}, f"{LOGGED}'val/scor'"),
    ],
    ids=lambda value: value[:50] if isinstance(value, str) else "",
)
def test_a_setting_that_is_known_without_rows(
    options: dict[str, Any], message: str, tiny: Tiny, refused: Refused
) -> None:
    model = tiny("bert")
    with refused(message):
        fit(model, **options)


@pytest.mark.parametrize("name", ["train/loss", "val/loss", "val/accuracy", "val/majority_share", "lr/low_rank"])
def test_what_is_logged_may_be_monitored(name: str, tiny: Tiny, tmp_path: Path) -> None:
    mode: Any = "max" if name == "val/accuracy" else "min"
    run = trainer(tmp_path, callbacks=[ModelCheckpoint(monitor=name, mode=mode)])
    run.strategy.connect(one := module(tiny("bert")))
    run._data_connector.attach_data(one, datamodule=reviews(tmp_path))
    one.setup("fit")


@pytest.mark.parametrize(
    ("callback", "what"),
    [
        (BestCheckpoint(monitor="val/loss", mode="max"), "checkpoint monitors val/loss, whose best value is the min"),
        (ModelCheckpoint(monitor="val/accuracy"), "checkpoint monitors val/accuracy, whose best value is the max"),
        (EarlyStopping("val/score"), "EarlyStopping monitors val/score, whose best value is the max"),
    ],
)
def test_the_worst_of_what_is_monitored_is_not_taken_for_the_best(
    callback: Any, what: str, tiny: Tiny, tmp_path: Path
) -> None:
    run = trainer(tmp_path, callbacks=[callback])
    run.strategy.connect(one := module(tiny("bert")))
    run._data_connector.attach_data(one, datamodule=reviews(tmp_path))
    with pytest.raises(LoPAError, match=f"{what}; give mode: (min|max), got {callback.mode}"):
        one.setup("fit")


def test_a_scheduler_lowers_the_rate_by_what_got_worse(tiny: Tiny, tmp_path: Path) -> None:
    plateau = functools.partial(ReduceLROnPlateau, monitor="val/score")
    run = trainer(tmp_path, callbacks=[])
    run.strategy.connect(one := module(tiny("bert"), lr_scheduler=plateau))
    run._data_connector.attach_data(one, datamodule=reviews(tmp_path))
    with pytest.raises(LoPAError, match=r"lr_scheduler monitors val/score, whose best value is the max; .*, got min"):
        one.setup("fit")


@pytest.mark.parametrize("rates", [{"shared_prompt": 3e-2, "low_rank": 1e-3}, {}])
def test_a_scheduler_of_one_rate_for_all_groups_is_refused_where_they_have_their_own(
    rates: dict[str, float], tiny: Tiny, tmp_path: Path
) -> None:
    one_cycle = functools.partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=10)
    run = trainer(tmp_path, callbacks=[])
    run.strategy.connect(one := module(tiny("bert"), lr_scheduler=one_cycle, learning_rates=rates))
    run._data_connector.attach_data(one, datamodule=reviews(tmp_path))
    if not rates:
        one.setup("fit")
        return
    with pytest.raises(LoPAError, match=r"OneCycleLR sets the rates of all groups to max_lr 0.1, not"):
        one.setup("fit")


def test_callbacks_of_others_may_log_what_they_like(tiny: Tiny, tmp_path: Path) -> None:
    class Own(Callback):
        pass

    of_own = [ModelCheckpoint(monitor="val/own"), EarlyStopping("brier/score", mode="min"), Own()]
    run = trainer(tmp_path, callbacks=of_own)
    run.strategy.connect(one := module(tiny("bert")))
    run._data_connector.attach_data(one, datamodule=reviews(tmp_path))
    one.setup("fit")


@pytest.mark.parametrize(
    ("kind", "objective", "message"),
    [
        ("bert_base", "masked_lm", "was saved as BertModel and has no weights for cls.predictions.bias"),
        ("llama", "masked_lm", "has no mask token; use objective: causal_lm or head"),
        ("bert", "causal_lm", "'bert' reads in both directions; use objective: masked_lm or head"),
    ],
)
def test_a_backbone_without_the_head_that_is_asked_for(
    kind: str, objective: str, message: str, tiny: Tiny, refused: Refused
) -> None:
    model = tiny(kind)
    with refused(message):
        fit(model, objective=objective)


@pytest.mark.parametrize("options", [{"batch_tokens": 10}, {"batch_tokens": 22}])
def test_a_batch_that_has_no_room_for_the_longest_text(options: dict[str, Any], tiny: Tiny, refused: Refused) -> None:
    model = tiny("bert")
    with refused(f"batch_tokens is {options['batch_tokens']}, and one of the examples has", rows=True):
        fit(model, data=options)


@pytest.mark.sampled(5)
@pytest.mark.parametrize(
    ("generation", "message"),
    [
        ({"max_new_token": 3}, "generation has no max_new_token; see transformers' GenerationConfig"),
        ({"num_return_sequences": 2}, "generation cannot set num_return_sequences"),
        *(({name: 0}, f"{name}") for name in ("max_new_tokens", "num_beams")),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be a whole number, at least 1; got 2.5"),
        ({"max_new_tokens": None}, "max_new_tokens must be a whole number, at least 1; got None"),
        ({"max_new_tokens": "many"}, "generation {'max_new_tokens': 'many'}"),
        ({"num_beams": 2.5}, "num_beams must be a whole number, at least 1; got 2.5"),
        ({"do_sample": True, "temperature": -1.0}, "`temperature` (=-1.0) has to be a strictly positive float"),
        ({"do_sample": True, "temperature": 0.0}, "`temperature` (=0.0) has to be a strictly positive float"),
        ({"do_sample": True, "top_p": 2.0}, "`top_p` has to be a float > 0 and < 1, but is 2.0"),
        ({"do_sample": True, "top_k": -1}, "`top_k` has to be a strictly positive integer, but is -1"),
        ({"do_sample": True, "min_p": 2.0}, "`min_p` has to be a float in the [0, 1] interval, but is 2.0"),
        ({"repetition_penalty": -1.0}, "`penalty` has to be a strictly positive float, but is -1.0"),
        ({"max_new_tokens": 61}, "max_new_tokens 61 leaves no room for a prompt in the 61 positions"),
    ],
    ids=lambda value: ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_a_setting_of_generation(generation: dict[str, Any], message: str, tiny: Tiny, refused: Refused) -> None:
    model, data = tiny("llama"), completions(Path("data"))
    with refused(message):
        trainer(Path("data"), callbacks=[]).test(causal(model, generation=generation), datamodule=data)


@pytest.mark.parametrize(
    ("given", "said"),
    [({"temperature": 0.2, "top_p": 0.9}, True), ({"temperature": 0.0, "top_k": 1}, False), ({"top_p": 1.0}, False)],
)
def test_settings_of_sampling_without_sampling_are_said(given: dict[str, Any], said: bool, tiny: Tiny) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny("llama"))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        assert not generation_config(given, tokenizer, None).do_sample
    wanted = ["generation has temperature, top_p without do_sample: true, and is greedy"] * said
    assert [str(each.message) for each in found] == wanted


@pytest.mark.parametrize(
    "generation", [{"do_sample": True, "temperature": 1, "top_k": 0, "top_p": 1.0}, {"num_beams": 2, "min_p": 0.0}]
)
def test_a_setting_of_generation_that_switches_something_off_is_none(generation: dict[str, Any], tiny: Tiny) -> None:
    run, data = trainer(Path(), callbacks=[]), completions(Path("data"))
    run.strategy.connect(one := causal(tiny("llama"), generation={"max_new_tokens": 3, **generation}))
    run._data_connector.attach_data(one, datamodule=data)
    one.setup("test")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop": "ab"}, "stop must be a list, got 'ab'"),
        ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
        ({"exact_match": True}, "exact_match must be a number of rows, or all; got True"),
        ({"exact_match": -1}, "exact_match must be a number of rows, or all; got -1"),
        ({"exact_match": "some"}, "exact_match must be a number of rows, or all; got 'some'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_argument_of_a_causal_module(options: dict[str, Any], message: str, refused: Refused) -> None:
    with refused(message):
        CausalLMModule(backbone=PretrainedSpec("x"), **options)


@pytest.mark.parametrize("text", ["", None, 5, {"a": 1}, ["a"], b"a"], ids=repr)
def test_a_text_to_complete_that_is_none(text: Any, tiny: Tiny, refused: Refused) -> None:
    one = causal(tiny("llama"))
    fault = "a text to complete must not be empty; text 1 is"
    if text != "":
        must = "a text, or a chat: a list of {role, content} whose last message asks"
        fault = f"a prompt must be {must}; prompt 1 is {text!r}"
    with refused(fault):
        one.generate(["the film", text])


def test_no_text_and_no_list_in_place_of_texts(tiny: Tiny, refused: Refused) -> None:
    with refused("texts must be a text, a chat (a list of messages), or a list of either; got 5"):
        causal(tiny("llama")).generate(5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float99"}, "dtype must be one of auto, float32, bfloat16, float16, got 'float99'"),
        (
            {"quantization": "int3"},
            "quantization must be a quantization_config of transformers with quant_method bitsan",
        ),
    ],
)
def test_an_argument_of_a_frozen_model(options: dict[str, Any], message: str) -> None:
    with pytest.raises(LoPAError, match=message):
        PretrainedSpec("x", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype must be one of auto, float32, bfloat16, float16, got 'int8'"),
        ({"pooling": "sum"}, "pooling must be one of cls, mean, last, max, got 'sum'"),
        ({"max_length": 0}, "instance_encoder.max_length must be at least 1, got 0"),
    ],
)
def test_an_argument_of_an_instance_encoder(options: dict[str, Any], message: str) -> None:
    with pytest.raises(LoPAError, match=message):
        InstanceEncoderSpec("x", **options)

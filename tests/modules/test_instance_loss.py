"""A second loss teaches the instance encoder the labels: its value, where it acts, and what is kept of it."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PhiConfig, PhiForCausalLM

from lopa_lightning import (
    IDPG,
    ImageClassificationDataModule,
    ImageClassificationModule,
    InstanceEncoderSpec,
    LoPALightningModule,
    PretrainedSpec,
    PromptTuning,
    TextClassificationDataModule,
)
from lopa_lightning.cli import main
from lopa_lightning.errors import LoPAError
from lopa_lightning.serving.export import export_bundle
from lopa_lightning.task import Task, Verbalizer
from tests.data.image_files import write_images
from tests.modules.helpers import LoPATiny, module, reviews, trainer, write_reviews
from tests.tiny_images import save_vision, vision_model

Tiny = Callable[[str], str]

ROOT = Path(__file__).parents[2]

ADAPTED = InstanceEncoderSpec(adapter={"peft_type": "LORA", "r": 2})
STILL = functools.partial(LoPATiny, dropout=0.0)  # which passes nothing of the instance on at its first step


class Gradients(Callback):
    """Keeps the gradients of the first step, and its batch."""

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.batch = batch
        self.start = {name: value.clone() for name, value in module.state_dict().items()}

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.grads = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def fitted(folder: Path, model: Any, **options: Any) -> tuple[Any, Gradients]:
    seen = Gradients()
    run = trainer(folder, callbacks=[seen], max_steps=1, num_sanity_val_steps=0, **options)
    run.fit(model, reviews(folder, rows=12, batch_size=12))
    return run, seen


def taught(backbone: str, weight: float = 0.5, **options: Any) -> Any:
    seed_everything(1)
    given = {"instance_encoder": ADAPTED, "prompt_encoder": STILL, "objective": "head", **options}
    return module(backbone, instance_loss=weight, **given)


def test_it_is_the_weighted_cross_entropy_of_a_linear_layer_on_the_vector(tiny: Tiny, tmp_path: Path) -> None:
    model = taught(tiny("bert_base"), weight=0.25)
    run, seen = fitted(tmp_path, model, limit_val_batches=0)
    metrics = {name: float(value) for name, value in run.callback_metrics.items()}
    weight, bias = (seen.start[f"net.instance_readout.{name}"].requires_grad_() for name in ("weight", "bias"))
    model.load_state_dict(seen.start)
    with torch.no_grad():
        outputs, vectors, none = model.eval().net(seen.batch)
    assert none is None  # it is for training alone
    labels = seen.batch["labels"]
    of_vectors = F.cross_entropy(vectors @ weight.T + bias, labels)
    of_vectors.backward()
    assert metrics["train/loss"] == pytest.approx(float(F.cross_entropy(outputs, labels)), abs=1e-6)
    assert metrics["train/instance_loss"] == pytest.approx(of_vectors.item(), abs=1e-6)
    for name, wanted in (("weight", weight.grad), ("bias", bias.grad)):
        torch.testing.assert_close(seen.grads[f"net.instance_readout.{name}"], 0.25 * wanted, rtol=1e-5, atol=1e-7)


def test_it_reaches_the_encoder_at_the_first_step_where_the_soft_prompt_does_not(tiny: Tiny, tmp_path: Path) -> None:
    found = {}
    for weight in (0.0, 1.0):
        _, seen = fitted(tmp_path, taught(tiny("bert_base"), weight), limit_val_batches=0)
        found[weight] = max(float(grad.abs().max()) for name, grad in seen.grads.items() if "lora_B" in name)
    assert found[0.0] == 0.0
    assert found[1.0] > 1e-4


def phi(tiny: Tiny, folder: Path) -> str:
    """A tiny model whose head has a bias; returns its folder."""
    tokenizer = AutoTokenizer.from_pretrained(tiny("llama"))
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    model = PhiForCausalLM(PhiConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes))
    torch.nn.init.normal_(model.lm_head.bias)
    model.save_pretrained(folder / "phi")
    tokenizer.save_pretrained(folder / "phi")
    return str(folder / "phi")


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "phi"])  # the first has a head that is its embeddings
def test_a_copys_layer_answers_at_first_as_the_copy_itself(
    tiny: Tiny, tmp_path: Path, kind: str, normalize: bool
) -> None:
    name = phi(tiny, tmp_path) if kind == "phi" else tiny(kind)
    encoder = dataclasses.replace(ADAPTED, pooling="last", normalize=normalize)
    model, seen = taught(name, objective="causal_lm", instance_encoder=encoder), Gradients()
    run = trainer(tmp_path, callbacks=[seen], max_steps=1, limit_val_batches=0)
    run.fit(model, reviews(tmp_path, rows=12, batch_size=12, instance_reads="template"))
    ids, mask = seen.batch["instance_input_ids"], seen.batch["instance_attention_mask"]
    whole = AutoModelForCausalLM.from_pretrained(name)
    with torch.no_grad():
        last = whole.base_model(ids, attention_mask=mask)[0][torch.arange(12), mask.cumsum(1).argmax(1)]
        read = F.rms_norm(last, last.shape[-1:]) if normalize else last
        logits = whole.get_output_embeddings()(read)[:, model.word_ids(["great", "terrible"])]
    loss = float(F.cross_entropy(logits, seen.batch["labels"]))
    assert float(run.callback_metrics["train/instance_loss"]) == pytest.approx(loss, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "objective"),
    [
        ({"name": "gpt2", "pooling": "last"}, "causal_lm"),
        ({"pooling": "mean"}, "causal_lm"),
        ({"pooling": "last"}, "head"),
        ({"pooling": "last"}, "masked_lm"),
    ],
)
def test_the_layer_of_a_vector_that_no_head_reads_begins_small(tiny: Tiny, options: Any, objective: Any) -> None:
    named = {**options, **({"name": tiny(options["name"])} if "name" in options else {})}
    task = Task(["good", "bad"], verbalizer=None if objective == "head" else Verbalizer(["great", "bad"]))
    encoder = dataclasses.replace(ADAPTED, **named)
    kind = "bert" if objective == "masked_lm" else "gpt2"
    model = taught(tiny(kind), instance_encoder=encoder, objective=objective, task=task)
    model.configure_model()
    assert 0.01 < float(model.net.instance_readout.weight.detach().std()) < 0.03  # the tiny models' are 0.2


def test_the_layer_is_saved_and_resumed_and_not_exported(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = taught(tiny("bert_base"))
    run, _ = fitted(tmp_path, model)
    run.save_checkpoint(tmp_path / "saved.ckpt")
    states = []
    for resume in (None, tmp_path / "saved.ckpt"):
        again = taught(tiny("bert_base"), 0.5)
        seed_everything(1)
        more = trainer(tmp_path, epochs=2, callbacks=[], limit_val_batches=0)
        more.fit(again, reviews(tmp_path, rows=12, batch_size=12), ckpt_path=resume)
        states.append(again.state_dict())
    assert "net.instance_readout.weight" in states[0]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    with pytest.warns(UserWarning, match=r"by another loss .*instance_loss: the checkpoint has 0.5, this run 0.1"):
        more.fit(taught(tiny("bert_base"), 0.1), reviews(tmp_path, rows=12, batch_size=12), ckpt_path=resume)

    for was, now in ((0.5, 0.0), (0.0, 0.5)):  # with the layer and without it
        path = tmp_path / f"of_{was}.ckpt"
        fitted(tmp_path, taught(tiny("bert_base"), was), limit_val_batches=0)[0].save_checkpoint(path)
        with pytest.raises(LoPAError, match=r"instance_readout|cannot be resumed"):
            more.fit(taught(tiny("bert_base"), now), reviews(tmp_path, rows=12, batch_size=12), ckpt_path=path)

    bundle = export_bundle(tmp_path / "saved.ckpt")
    assert not [name for name in bundle.tensors if "instance_readout" in name]
    bundle.save_pretrained(tmp_path / "bundle")
    texts = ["the film was great", "it was terrible"]
    loaded: Any = LoPALightningModule.load_from_checkpoint(tmp_path / "saved.ckpt")
    shared: Any = type(bundle).from_pretrained(tmp_path / "bundle").module()
    assert shared.predict(texts) == loaded.predict(texts)
    assert shared.net.instance_readout is None
    # A bundle goes with the configuration of its run.
    monkeypatch.chdir(tmp_path)
    configs = [str(ROOT / "configs" / name) for name in ("own_csv.yaml", "methods/lopa_taught_encoder.yaml")]
    options: dict[str, Any] = {
        "data": {"init_args": {"data_files": {"train": "train.csv", "validation": "validation.csv"}}},
        "model": {"init_args": {"backbone": {"name": tiny("bert_base")}, "instance_encoder": {"name": "backbone"}}},
        "trainer": {"logger": False, "accelerator": "cpu"},
    }
    options["data"]["init_args"]["labels"] = ["good", "bad"]
    sizes = {"num_virtual_tokens": 3, "rank": 2, "hidden_dim": 8, "dropout": 0.0}
    options["model"]["init_args"]["instance_encoder"]["adapter"] = {"peft_type": "LORA", "r": 2}
    options["model"]["init_args"]["prompt_encoder"] = {"class_path": "lopa_lightning.LoPA", "init_args": sizes}
    Path("mine.yaml").write_text(json.dumps(options))
    for option in ([], ["--model.instance_loss=0"]):
        named = [f"--config={name}" for name in [*configs, "mine.yaml"]]
        main(["validate", *named, "--ckpt_path=bundle", *option])


def test_images_go_the_same_way(tmp_path: Path) -> None:
    save_vision(vision_model("vit"), tmp_path / "vit")
    write_images(str(tmp_path / "images"))
    encoder = InstanceEncoderSpec(adapter={"peft_type": "LORA", "r": 2, "target_modules": ["q_proj", "v_proj"]})
    options: Any = {"prompt_encoder": STILL, "instance_encoder": encoder, "instance_loss": 1.0}
    model = ImageClassificationModule(backbone=PretrainedSpec(str(tmp_path / "vit")), **options)
    run = trainer(tmp_path, callbacks=[], max_steps=1, limit_val_batches=0)
    run.fit(model, ImageClassificationDataModule(path=str(tmp_path / "images"), batch_size=4))
    assert run.callback_metrics["train/instance_loss"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": -1.0}, "instance_loss must be at least 0 and finite, got -1.0"),
        ({"weight": float("nan")}, "instance_loss must be at least 0 and finite, got nan"),
        ({"instance_encoder": InstanceEncoderSpec()}, "it needs its trainable: true or its adapter"),
        ({"loss_over": "vocabulary", "objective": "masked_lm"}, "instance_loss needs loss_over: labels"),
        (
            {"prompt_encoder": functools.partial(PromptTuning, num_virtual_tokens=2)},
            "instance_loss needs a prompt encoder that reads an instance vector, such as LoPA",
        ),
    ],
)
def test_what_it_cannot_teach_is_refused(tiny: Tiny, tmp_path: Path, options: Any, message: str) -> None:
    with pytest.raises(LoPAError, match=message):
        fitted(tmp_path, taught(tiny("bert"), **options))


@pytest.mark.parametrize(("labels", "message"), [(["good", "bad"], "label words"), ([], "regression needs")])
def test_a_task_without_words_is_refused_as_without_it(tiny: Tiny, tmp_path: Path, labels: Any, message: str) -> None:
    encoder, files = dataclasses.replace(ADAPTED, pooling="last"), {"train": write_reviews(tmp_path / "train.csv", 12)}
    data = TextClassificationDataModule(data_files=files, labels=labels, text_columns=["text"])
    if not labels:
        data.task = Task([])
    with pytest.raises(LoPAError, match=message):
        trainer(tmp_path).fit(taught(tiny("gpt2"), objective="causal_lm", instance_encoder=encoder), data)


def test_a_label_for_each_word_does_not_go_with_it(tiny: Tiny) -> None:
    """Also outside of a run, which refuses it before weights are loaded (tests/test_words.py)."""
    model = taught(tiny("bert_base"), task=Task(labels=["good", "bad"], per_word=True))
    with pytest.raises(LoPAError, match="instance_loss needs one answer for a text, and here each word has a label"):
        model.configure_model()


def test_it_reads_each_examples_own_vector_also_under_a_control(tiny: Tiny, tmp_path: Path) -> None:
    found = []
    for control in (None, "shuffled"):
        spec = InstanceEncoderSpec(adapter={"peft_type": "LORA", "r": 2}, control=control)  # type: ignore[arg-type]
        run, _ = fitted(tmp_path, taught(tiny("bert_base"), instance_encoder=spec), limit_val_batches=0)
        found.append(float(run.callback_metrics["train/instance_loss"]))
    assert found[0] == pytest.approx(found[1], abs=1e-6)


def test_any_prompt_encoder_that_reads_an_instance_goes_with_it(tiny: Tiny, tmp_path: Path) -> None:
    prompt = functools.partial(IDPG, num_virtual_tokens=2, hidden_dim=4)
    run, _ = fitted(tmp_path, taught(tiny("bert_base"), prompt_encoder=prompt), limit_val_batches=0)
    assert run.callback_metrics["train/instance_loss"] > 0

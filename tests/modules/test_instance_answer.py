"""Both models answer: what is read from the instance vector is added to the backbone's answer, wherever it goes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything

from lopa_lightning import (
    Bundle,
    ImageClassificationDataModule,
    ImageClassificationModule,
    InstanceEncoderSpec,
    LoPALightningModule,
    LoPAPrompter,
    PretrainedSpec,
    PromptTuning,
    TextClassificationDataModule,
)
from lopa_lightning.errors import LoPAError
from lopa_lightning.serving.export import export_bundle
from lopa_lightning.task import Task
from tests.data.image_files import write_images
from tests.modules.helpers import LoPATiny, module, reviews, trainer, with_own_encoder
from tests.tiny_images import save_vision, vision_model

Tiny = Callable[[str], str]

TEXTS = ["the film was great", "a terrible cast", "the second half of it"]
LAYER = "net.instance_answer"


def fitted(folder: Path, model: Any, data: Any = None, **options: Any) -> Any:
    run = trainer(folder, callbacks=[], limit_val_batches=0, num_sanity_val_steps=0, **{"max_steps": 2, **options})
    run.fit(model, data or reviews(folder, rows=12, batch_size=6))
    return run


def both(backbone: str, encoder: str, **options: Any) -> Any:
    """A module of which both models answer; the instance encoder is frozen."""
    seed_everything(1)
    given = {"instance_encoder": with_own_encoder(encoder), "objective": "head", "instance_answer": True, **options}
    return module(backbone, **given)


def check_sum(model: Any, inputs: list[Any], added: torch.Tensor) -> None:
    """The module's answers are those of its backbone with what is added to their logits."""
    wanted = model.predict(inputs)
    model.net.instance_answer = None
    alone = model.predict(inputs)
    assert alone != wanted
    for row, one, record in zip(added, alone, wanted, strict=True):
        logits = torch.tensor(list(one["probabilities"].values())).log() + row
        assert list(record["probabilities"].values()) == pytest.approx(logits.softmax(0).tolist(), abs=1e-5)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("objective", ["head", "masked_lm"])
def test_outputs_are_the_sum_of_both(training: bool, objective: str, tiny: Tiny, tmp_path: Path) -> None:
    prompt = functools.partial(LoPATiny, dropout=0.0)
    model = both(tiny("bert"), tiny("bert_base"), objective=objective, prompt_encoder=prompt)
    fitted(tmp_path, model)
    net, ids = model.net.train(training), torch.tensor([[5, 6, 7], [8, 9, 10]])
    if objective == "masked_lm":
        ids[:, 1] = model.builder.kind.tokenizer.mask_token_id
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "instance": torch.randn(2, 32)}
    outputs, vectors, of_instance = net(batch)
    weight, bias = (model.state_dict()[f"{LAYER}.{name}"] for name in ("weight", "bias"))
    added = vectors @ weight.T + bias
    net.instance_answer = None
    torch.testing.assert_close(outputs, net(batch).outputs + added, rtol=0, atol=1e-6)
    torch.testing.assert_close(of_instance, added, rtol=0, atol=1e-6)
    assert added.abs().max() > 1e-3


def test_a_loss_of_its_own_goes_through_the_same_layer(tiny: Tiny, tmp_path: Path) -> None:
    found = {}
    encoder = InstanceEncoderSpec(adapter={"peft_type": "LORA", "r": 2})
    for weight in (0.0, 0.5):
        model = both(tiny("bert_base"), tiny("bert_base"), instance_encoder=encoder, instance_loss=weight)
        run = fitted(tmp_path, model, max_steps=1)
        found[weight] = sorted(name for name in run.callback_metrics if name.startswith("train/"))
        names = [name for name in model.state_dict() if "instance_readout" in name or "instance_answer" in name]
        assert names == [f"{LAYER}.weight", f"{LAYER}.bias"]
        assert len(model.net.parameter_groups()["instance_readout"]) == 2
    assert found == {0.0: ["train/loss"], 0.5: ["train/instance_loss", "train/loss"]}


@pytest.mark.parametrize("frozen", [True, False])
def test_it_is_saved_and_exported_and_answers_everywhere(frozen: bool, tiny: Tiny, tmp_path: Path) -> None:
    adapter = None if frozen else {"peft_type": "LORA", "r": 2}
    encoder = with_own_encoder(tiny("bert_base"), adapter=adapter)
    model = both(tiny("bert"), tiny("bert_base"), objective="masked_lm", instance_encoder=encoder)
    run = fitted(tmp_path, model)
    run.save_checkpoint(path := tmp_path / "saved.ckpt")
    loaded: Any = LoPALightningModule.load_from_checkpoint(path)
    wanted = model.predict(TEXTS)
    assert loaded.predict(TEXTS) == wanted
    export_bundle(path).save_pretrained(tmp_path / "bundle")
    bundle = Bundle.from_pretrained(tmp_path / "bundle")
    assert f"{LAYER}.weight" in bundle.tensors
    assert bundle.config.answer["instance_answer"] is True
    again: Any = bundle.module()
    assert again.predict(TEXTS) == wanted
    prompts, added = LoPAPrompter(bundle).with_answers(TEXTS, batch_size=2)
    assert added is not None
    check_sum(again, TEXTS, added)
    told = [row["instance_answer"] for row in bundle.rows]
    _, again_added = LoPAPrompter(bundle).with_answers([row["input"] for row in bundle.rows])
    torch.testing.assert_close(torch.tensor(told), again_added, rtol=0, atol=1e-5)
    assert torch.equal(prompts, LoPAPrompter(bundle)(TEXTS, batch_size=2))
    empty, none = LoPAPrompter(bundle).with_answers([])
    assert none is not None
    assert (empty.shape, none.shape) == ((0, 3, 32), (0, 2))


def test_images_go_the_same_way(tmp_path: Path) -> None:
    save_vision(vision_model("vit"), tmp_path / "vit")
    save_vision(vision_model("deit"), tmp_path / "deit")
    write_images(str(tmp_path / "images"))
    seed_everything(1)
    options: Any = {"prompt_encoder": LoPATiny, "instance_encoder": InstanceEncoderSpec(str(tmp_path / "deit"))}
    options |= {"backbone": PretrainedSpec(str(tmp_path / "vit")), "instance_answer": True}
    model: Any = ImageClassificationModule(**options)
    run = fitted(tmp_path, model, ImageClassificationDataModule(path=str(tmp_path / "images"), batch_size=4))
    run.save_checkpoint(tmp_path / "saved.ckpt")
    bundle = export_bundle(tmp_path / "saved.ckpt")
    assert bundle.images is not None
    images = list(bundle.images.numpy())
    assert bundle.module().predict(images) == model.predict(images)  # type: ignore[operator]
    _, added = LoPAPrompter(bundle).with_answers(images, batch_size=2)
    assert added is not None
    check_sum(model, images, added)


def test_a_number_is_the_sum_of_two(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,label\nthe film,1.5\nthe cast,2.5\nthe half,0.5\n")
    data = TextClassificationDataModule(data_files={"train": str(tmp_path / "train.csv")}, labels=[], batch_size=3)
    model = both(tiny("bert_base"), tiny("bert_base"), head_pooling="mean")
    run = fitted(tmp_path, model, data)
    run.save_checkpoint(tmp_path / "saved.ckpt")
    _, added = LoPAPrompter(export_bundle(tmp_path / "saved.ckpt")).with_answers(TEXTS)
    assert added is not None
    wanted = [record["value"] for record in model.predict(TEXTS)]
    model.net.instance_answer = None
    alone = torch.tensor([record["value"] for record in model.predict(TEXTS)])
    assert wanted == pytest.approx((alone + added[:, 0]).tolist(), abs=1e-5)
    assert wanted != pytest.approx(alone.tolist(), abs=1e-3)


def test_a_checkpoint_with_and_one_without_it_are_not_mistaken_for_each_other(tiny: Tiny, tmp_path: Path) -> None:
    for has, wants in ((True, False), (False, True)):
        run = fitted(tmp_path, both(tiny("bert_base"), tiny("bert_base"), instance_answer=has))
        run.save_checkpoint(tmp_path / f"{has}.ckpt")
        other = both(tiny("bert_base"), tiny("bert_base"), instance_answer=wants)
        with pytest.raises(LoPAError, match=r"instance_answer"):
            run.validate(other, reviews(tmp_path, rows=12), ckpt_path=tmp_path / f"{has}.ckpt", verbose=False)
    saved = torch.load(tmp_path / "True.ckpt", weights_only=True)
    for name in ("weight", "bias"):
        del saved["state_dict"][f"{LAYER}.{name}"]
    torch.save(saved, tmp_path / "cut.ckpt")
    with pytest.raises(LoPAError, match=rf"{LAYER}.weight: missing in the checkpoint"):
        LoPALightningModule.load_from_checkpoint(tmp_path / "cut.ckpt")


def test_a_bundle_whose_flag_and_tensors_do_not_go_together_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    soft = functools.partial(PromptTuning, num_virtual_tokens=2)
    cases = [(True, LoPATiny, "not trained here"), (False, LoPATiny, "missing in the checkpoint")]
    for has, prompt, message in cases:
        run = fitted(tmp_path, both(tiny("bert_base"), tiny("bert_base"), prompt_encoder=prompt, instance_answer=has))
        run.save_checkpoint(tmp_path / "saved.ckpt")
        bundle = export_bundle(tmp_path / "saved.ckpt")
        bundle.config.module["init_args"]["instance_answer"] = not has
        with pytest.raises(LoPAError, match=rf"{LAYER}.weight: {message}"):
            LoPAPrompter(Bundle(bundle.config, bundle.tensors, "", []))
        if has:
            with pytest.raises(LoPAError, match=r"task.instance_answer: the checkpoint has True"):
                Bundle(bundle.config, bundle.tensors, "", []).module()
    run = fitted(tmp_path, both(tiny("bert_base"), tiny("bert_base"), prompt_encoder=soft, instance_answer=False))
    run.save_checkpoint(tmp_path / "saved.ckpt")
    bundle = export_bundle(tmp_path / "saved.ckpt")
    bundle.config.module["init_args"]["instance_answer"] = True
    bundle.config.identity["task"]["instance_answer"] = True
    layer = {f"{LAYER}.weight": torch.zeros(2, 32), f"{LAYER}.bias": torch.zeros(2)}
    for load, message in (
        (LoPAPrompter, "its prompt encoder reads no instance vector"),
        (Bundle.module, "instance_answer needs a prompt encoder that reads an instance vector"),
    ):
        with pytest.raises(LoPAError, match=message):
            load(Bundle(bundle.config, {**bundle.tensors, **layer}, "", []))  # type: ignore[operator]


def test_a_bundle_in_half_precision_answers_as_one_in_full(tiny: Tiny, tmp_path: Path) -> None:
    fitted(tmp_path, both(tiny("bert_base"), tiny("bert_base"))).save_checkpoint(tmp_path / "saved.ckpt")
    bundle = export_bundle(tmp_path / "saved.ckpt")
    half = Bundle(bundle.config, {name: each.half() for name, each in bundle.tensors.items()}, "", [])
    wanted, found = (LoPAPrompter(each).with_answers(TEXTS)[1] for each in (bundle, half))
    assert wanted is not None
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-2)


def test_a_label_for_each_word_does_not_go_with_it(tiny: Tiny) -> None:
    """Also outside of a run: one answer of the instance would be added to each token's."""
    task = Task(labels=["good", "bad"], per_word=True)
    model = both(tiny("bert_base"), tiny("bert_base"), task=task)
    with pytest.raises(LoPAError, match="instance_answer needs one answer for a text, and here each word has a label"):
        model.configure_model()


def test_the_encoder_learns_from_it_at_the_first_step(tiny: Tiny, tmp_path: Path) -> None:
    """Where the soft prompt passes nothing of the instance on yet, as LoPA's MLPs end in zeros."""
    moved = {}
    for answers in (False, True):
        encoder = InstanceEncoderSpec(adapter={"peft_type": "LORA", "r": 2})
        model = both(tiny("bert_base"), tiny("bert_base"), instance_encoder=encoder, instance_answer=answers)
        fitted(tmp_path, model, max_steps=1)
        moved[answers] = max(float(each.abs().max()) for name, each in model.state_dict().items() if "lora_B" in name)
    assert moved[False] == 0.0
    assert moved[True] > 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_over": "vocabulary", "objective": "masked_lm"}, "instance_answer needs loss_over: labels"),
        (
            {"prompt_encoder": functools.partial(PromptTuning, num_virtual_tokens=2)},
            "instance_answer needs a prompt encoder that reads an instance vector, such as LoPA",
        ),
    ],
)
def test_what_does_not_go_with_it_is_refused(tiny: Tiny, tmp_path: Path, options: Any, message: str) -> None:
    with pytest.raises(LoPAError, match=message):
        fitted(tmp_path, both(tiny("bert"), tiny("bert_base"), **options))

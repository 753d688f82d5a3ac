"""The overlays of the paper's released recipes: each option, and what it does."""

from __future__ import annotations

import contextlib
import io
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer

from lopa_lightning.backbones.tokens import cut_left
from lopa_lightning.checkpoint import check_identity
from lopa_lightning.cli import LoPACLI
from lopa_lightning.data.glue import GLUEDataModule
from lopa_lightning.errors import LoPAError
from lopa_lightning.modules import CausalLMModule, ClassificationModule
from lopa_lightning.task import InstanceReads, Task, Verbalizer
from tests.mini_code import write_mini_cruxeval, write_mini_mbpp
from tests.mini_glue import write_mini_glue

Tiny = Callable[[str], str]

CONFIGS = Path(__file__).parent.parent / "configs"
NLU, CODE, CRUXEVAL = (f"methods/lopa_paper_{name}" for name in ("nlu", "code", "cruxeval"))
_MODEL, _DATA = "model.init_args.", "data.init_args."
_SHARED: dict[str, Any] = {
    f"{_MODEL}frozen_dropout": True,
    f"{_MODEL}instance_encoder.pooling": "cls",
    f"{_MODEL}instance_encoder.normalize": False,
    f"{_MODEL}placement": "before",
    f"{_MODEL}prompt_encoder.class_path": "lopa_lightning.LoPA",
    f"{_MODEL}prompt_encoder.init_args.num_virtual_tokens": 10,
    f"{_MODEL}prompt_encoder.init_args.rank": 4,
    f"{_MODEL}prompt_encoder.init_args.dropout": 0.1,
    f"{_MODEL}prompt_encoder.init_args.init": "normal",
    f"{_MODEL}prompt_encoder.init_args.init_std": 1.0,
    f"{_MODEL}prompt_encoder.init_args.heads_init": "normal",
    f"{_MODEL}prompt_encoder.init_args.combine": "gate",
    f"{_MODEL}optimizer.class_path": "torch.optim.AdamW",
    f"{_MODEL}lr_scheduler": None,
    f"{_MODEL}learning_rates": None,
    f"{_MODEL}adapter": None,
    f"{_MODEL}train_backbone": False,
}
RECIPES: dict[str, dict[str, Any]] = {
    NLU: {
        **_SHARED,
        f"{_MODEL}backbone.name": "FacebookAI/roberta-large",
        f"{_MODEL}instance_encoder.name": "backbone",  # trained, so a copy of its own
        f"{_MODEL}instance_encoder.trainable": True,
        f"{_MODEL}instance_encoder.max_length": 256,
        f"{_MODEL}objective": "masked_lm",
        f"{_MODEL}loss_over": "vocabulary",
        f"{_MODEL}prompt_encoder.init_args.hidden_dim": 256,
        f"{_MODEL}optimizer.init_args.lr": 1e-5,
        f"{_MODEL}optimizer.init_args.weight_decay": 0.0,
        f"{_MODEL}warmup": 0.06,
        f"{_DATA}pair_template": "mask_between",
        f"{_DATA}instance_reads": "template",
        f"{_DATA}batch_size": 16,
        f"{_DATA}max_length": 256,
        "trainer.max_epochs": 20,
    },
    CODE: {
        **_SHARED,
        "seed_everything": 9876,
        f"{_MODEL}instance_encoder.name": "microsoft/codebert-base",
        f"{_MODEL}instance_encoder.trainable": False,
        f"{_MODEL}instance_encoder.dropout": True,
        f"{_MODEL}prompt_encoder.init_args.hidden_dim": None,  # the encoder's width
        f"{_MODEL}optimizer.init_args.lr": 1e-3,
        f"{_MODEL}optimizer.init_args.weight_decay": 0.01,
        f"{_MODEL}warmup": 0.0,
        f"{_MODEL}generation.do_sample": True,
        f"{_MODEL}generation.top_p": 0.95,
        f"{_DATA}instance_reads": "prompt",
        f"{_DATA}batch_size": 8,
        "trainer.limit_val_batches": 0,
    },
}
OF_MBPP = {
    f"{_MODEL}start_token": False,
    f"{_DATA}learn_end": True,
    f"{_DATA}max_length": 571,
    f"{_MODEL}generation.temperature": 0.6,
    "trainer.max_epochs": 10,
}
OF_CRUXEVAL = {
    f"{_MODEL}start_token": True,
    f"{_DATA}learn_end": False,
    f"{_DATA}max_length": 512,
    f"{_MODEL}generation.temperature": 0.2,
    "trainer.max_epochs": 20,
}
STACKS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "rte": (["glue_rte", NLU], RECIPES[NLU]),
    "mbpp": (["mbpp", CODE], {**RECIPES[CODE], **OF_MBPP}),
    "cruxeval_input": (["cruxeval_input", CODE, CRUXEVAL], {**RECIPES[CODE], **OF_CRUXEVAL}),
    "cruxeval_output": (["cruxeval_output", CODE, CRUXEVAL], {**RECIPES[CODE], **OF_CRUXEVAL}),
}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lopa"])


def arguments(configs: list[str]) -> list[str]:
    return [part for name in configs for part in ("--config", str(CONFIGS / f"{name}.yaml"))]


@pytest.mark.parametrize("name", STACKS)
def test_every_option_is_the_released_recipes(name: str) -> None:
    configs, recipe = STACKS[name]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
        LoPACLI(args=["fit", *arguments(configs), "--print_config"])
    config = yaml.safe_load(printed.getvalue())
    found: dict[str, Any] = {}
    for key in recipe:
        value = config
        for part in key.split("."):
            value = value[part]
        found[key] = value
    assert found == recipe


@pytest.fixture(scope="module")
def mini_glue(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_mini_glue(tmp_path_factory.mktemp("glue"))


def tiny_nlu(task: str, tiny: Tiny, mini_glue: str, *more: str) -> list[str]:
    return [
        *arguments([f"glue_{task}", NLU]),
        *(f"--model.backbone.name={tiny('roberta')}", f"--data.path={mini_glue}"),
        *("--data.batch_size=4", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"),
        *("--trainer.logger=false", *more),
    ]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("task", "text"),
    [
        ("sst2", "{sentence} . It was <mask> ."),
        ("mnli", "{premise} ? <mask> , {hypothesis}"),
        ("mrpc", "{sentence1} ? <mask> , {sentence2}"),
        ("qnli", "{question} ? <mask> , {sentence}"),
        ("qqp", "{question1} <mask> , {question2}"),
        ("rte", "{sentence1} ? <mask> , {sentence2}"),
    ],
)
def test_backbone_and_encoder_read_one_templated_text(task: str, text: str, tiny: Tiny, mini_glue: str) -> None:
    data = GLUEDataModule(task, path=mini_glue, pair_template="mask_between", instance_reads="template")
    data.connect(nlu_module(tiny).input_spec)
    data.setup("validate")
    tokenizer = AutoTokenizer.from_pretrained(tiny("roberta"))
    rows = data.load_split(data.splits_of("val")[0], "val")
    for row, encoded in zip(rows, data.datasets["val"][0]):
        assert tokenizer.decode(encoded["input_ids"]) == f"<s>{text.format(**row)}</s>"
        assert encoded["instance_input_ids"] == encoded["input_ids"]


def nlu_module(tiny: Tiny, **options: Any) -> ClassificationModule:
    from lopa_lightning import InstanceEncoderSpec, PretrainedSpec

    return ClassificationModule(
        backbone=PretrainedSpec(tiny("roberta")), instance_encoder=InstanceEncoderSpec(trainable=True), **options
    )


def test_the_nlu_recipe_computes_what_the_released_code_does(tiny: Tiny, mini_glue: str) -> None:
    """A fit on tiny models, and the loss once more by hand, from transformers' own logits of the whole vocabulary."""
    cli = LoPACLI(args=["fit", *tiny_nlu("rte", tiny, mini_glue, "--trainer.max_epochs=1")])
    model, data = cli.model, cli.datamodule
    net = model.net
    assert all(part.training for part in (*net.backbone.modules(), *net.instance_encoder.modules()))
    (optimizer,) = cli.trainer.optimizers
    assert {(group["lr"], group["weight_decay"]) for group in optimizer.param_groups} == {(1e-5, 0.0)}
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert {id(p) for p in (*net.prompt_encoder.parameters(), *net.instance_encoder.parameters())} == trained

    model.eval()
    batch = next(iter(data.val_dataloader()[0]))
    plain = AutoModelForMaskedLM.from_pretrained(tiny("roberta")).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny("roberta"))
    words = torch.tensor([tokenizer.encode(f"x {word}", add_special_tokens=False)[-1] for word in ("Yes", "No")])
    with torch.no_grad():
        prompt, instance = net.soft_prompt(batch)
        read = net.instance_encoder.model(batch["instance_input_ids"], batch["instance_attention_mask"])
        torch.testing.assert_close(instance, read.last_hidden_state[:, 0])  # <s>, not normalised
        mask = F.pad(batch["attention_mask"], (prompt.shape[1], 0), value=1)
        embedded = torch.cat([prompt, plain.get_input_embeddings()(batch["input_ids"])], 1)
        logits = plain(inputs_embeds=embedded, attention_mask=mask).logits[:, prompt.shape[1] :]
        at_mask = logits[batch["input_ids"] == tokenizer.mask_token_id]
        outputs = model(batch)
        wanted = F.cross_entropy(at_mask, words[batch["labels"]])
        torch.testing.assert_close(model.loss(outputs, batch), wanted)
        labels_alone = F.cross_entropy(at_mask[:, words], batch["labels"])
        assert (wanted - labels_alone).abs() > 0.1
        torch.testing.assert_close(
            model.predict_outputs(outputs)["probabilities"], at_mask[:, words].softmax(-1), rtol=1e-4, atol=1e-6
        )


def test_gradients_of_the_loss_over_the_vocabulary_are_the_formulas(tiny: Tiny) -> None:
    """∂/∂h of log Σ_v exp(ℓ_v) − ℓ_label, through a frozen head."""
    from lopa_lightning.backbones.text import TextBackbone

    plain = AutoModelForMaskedLM.from_pretrained(tiny("roberta")).eval()
    backbone = TextBackbone(AutoModelForMaskedLM.from_pretrained(tiny("roberta")))
    words = torch.tensor([7, 300])
    ours, theirs = (torch.randn(5, 32, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    labels = torch.tensor([0, 1, 1, 0, 1])
    F.nll_loss(backbone.label_log_probabilities(ours, words), labels).backward()
    F.cross_entropy(plain.lm_head(theirs), words[labels]).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_over": "words"}, "loss_over must be one of labels, vocabulary, got 'words'"),
        ({"loss_over": "vocabulary", "objective": "head"}, "loss_over: vocabulary needs objective: masked_lm or"),
    ],
)
def test_a_loss_that_cannot_be_is_refused(options: dict[str, Any], message: str, tiny: Tiny) -> None:
    with pytest.raises(LoPAError, match=message):
        nlu_module(tiny, **options)


def test_a_checkpoint_says_what_its_encoder_read(tiny: Tiny) -> None:
    reads: list[InstanceReads] = ["columns", "template"]
    tasks = [Task(["no", "yes"], verbalizer=Verbalizer(["No", "Yes"], ["{a} {mask}"], instance_reads=r)) for r in reads]
    before, after = (nlu_module(tiny, task=task).task_identity() for task in tasks)
    read = {"instance_reads": "template", "instance_template": ["{a} {mask}", None]}
    assert after == {**before, **read}  # and of the default nothing, as ever


@pytest.mark.parametrize("changed", [{"template": ["so {a} {mask}"]}, {"causal_template": "{a} {mask}"}], ids=str)
def test_with_another_template_of_its_encoder_a_checkpoint_is_refused(changed: dict[str, Any], tiny: Tiny) -> None:
    """A head's backbone reads no template; the encoder does."""

    def identity(**says: Any) -> dict[str, Any]:
        read: Any = {"template": ["{a} {mask}"], "causal_template": "{a}: {mask}", "instance_reads": "template", **says}
        task = Task(["no", "yes"], verbalizer=Verbalizer(None, **read))
        return {"task": nlu_module(tiny, task=task, objective="head").task_identity()}

    saved, other = identity(), identity(**changed)
    check_identity(saved, identity())
    with pytest.raises(LoPAError, match=r"task\.instance_template: the checkpoint has"):
        check_identity(saved, other)
    del saved["task"]["instance_template"]  # as checkpoints were
    check_identity(saved, other)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GLUEDataModule("rte", pair_template="middle"), "pair_template must be one of mask_last, mask_betw"),  # type: ignore[arg-type]
        (lambda: GLUEDataModule("rte", instance_reads="all"), "instance_reads must be one of columns, template"),  # type: ignore[arg-type]
        (
            lambda: GLUEDataModule("rte", template=["{sentence1} {mask}"], pair_template="mask_between"),
            "give template or pair_template: mask_between, not both",
        ),
    ],
)
def test_wrong_choices_are_listed(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(LoPAError, match=message):
        make()


def test_an_encoder_without_a_mask_reads_the_template_as_a_causal_backbone_does(tiny: Tiny, mini_glue: str) -> None:
    from lopa_lightning import InstanceEncoderSpec, PretrainedSpec

    module = ClassificationModule(
        backbone=PretrainedSpec(tiny("llama")),
        objective="causal_lm",
        instance_encoder=InstanceEncoderSpec(tiny("llama"), pooling="last", cache=False),
    )
    data = GLUEDataModule("rte", path=mini_glue, instance_reads="template")
    data.connect(module.input_spec)
    data.setup("validate")
    batch = next(iter(data.val_dataloader()[0]))
    assert torch.equal(batch["instance_input_ids"], batch["input_ids"])
    text = AutoTokenizer.from_pretrained(tiny("llama")).decode(batch["input_ids"][0])
    assert "Question:" in text
    assert text.endswith("Answer:")


# Code


@pytest.fixture
def with_start(tiny: Tiny) -> str:
    """A tiny Llama whose tokenizer has a start token, and does not put it by itself, as CodeGen's and Phi-2's."""
    folder = Path("llama_with_start")
    shutil.copytree(tiny("llama"), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.save_pretrained(folder)
    assert tokenizer("good")["input_ids"] == AutoTokenizer.from_pretrained(tiny("llama"))("good")["input_ids"]
    return str(folder)


def tiny_code(name: str, backbone: str, tiny: Tiny, *more: str) -> list[str]:
    path = write_mini_mbpp(Path("mini_mbpp")) if name == "mbpp" else write_mini_cruxeval(Path("mini_cruxeval"))
    return [
        *arguments(STACKS[name][0]),
        *(f"--model.backbone.name={backbone}", f"--model.instance_encoder.name={tiny('bert_base')}"),
        *(f"--data.path={path}", "--data.max_length=50", "--model.generation.max_new_tokens=4"),
        *("--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", *more),
    ]


# The stacks differ in options that the first test reads.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["mbpp", pytest.param("cruxeval_output", marks=pytest.mark.slow)])
def test_the_code_recipe_fits_and_tests(name: str, tiny: Tiny, with_start: str) -> None:
    cli = LoPACLI(args=["fit", *tiny_code(name, with_start, tiny, "--trainer.max_epochs=1")])
    model, data, net = cli.model, cli.datamodule, cli.model.net
    assert [path.name for path in Path("runs").rglob("*.ckpt")] == ["last.ckpt"]
    (optimizer,) = cli.trainer.optimizers
    assert {(group["lr"], group["weight_decay"]) for group in optimizer.param_groups} == {(1e-3, 0.01)}
    assert {layer.weight.shape for layer in (net.prompt_encoder.row_head[1], net.prompt_encoder.column_head[1])} == {
        (32, 32)  # h is the encoder's width
    }

    rows, halves = data.datasets["train"][0], data.raw()
    assert len(rows) == len(halves["train"])  # all of the half, none to validate on
    tokenizer, is_cruxeval = model.input_spec.tokenizer, name != "mbpp"
    for row, ids in zip(halves["train"], rows):
        labels = [label for label in ids["labels"] if label != -100]
        example = data.layout("train")(row)
        assert tokenizer.decode(labels) == example.completion + ("" if is_cruxeval else "<|endoftext|>")
        assert (ids["input_ids"][0] == tokenizer.bos_token_id) == is_cruxeval
        assert tokenizer.eos_token_id not in ids["input_ids"][1 : -1 if not is_cruxeval else None]
        assert example.instance == example.prompt

    # The frozen encoder's own dropout and the backbone's are on in training, and off in evaluation.
    batch = next(iter(data.train_dataloader()))
    assert "instance" not in batch
    assert all(part.training for part in (*net.backbone.modules(), *net.instance_encoder.modules()))
    assert not any(parameter.requires_grad for parameter in net.instance_encoder.parameters())
    with torch.no_grad():
        assert not torch.equal(net.encode_instance(batch), net.encode_instance(batch))
        model.eval()
        own = AutoModel.from_pretrained(tiny("bert_base")).eval()
        keys = "instance_input_ids", "instance_attention_mask", "instance_token_type_ids"
        states = own(*(batch[key] for key in keys)).last_hidden_state
        torch.testing.assert_close(net.encode_instance(batch), states[:, 0])  # not normalised

    tested = tiny_code(name, with_start, tiny, "--ckpt_path=last", "--data.allow_code_execution=true")
    LoPACLI(args=["test", *tested, "--predictions.folder=out", "--trainer.logger=false"])
    assert len(Path("out/results.jsonl").read_text().splitlines()) == len(halves["test"])


def test_a_start_token_stands_before_what_is_generated_too(with_start: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from lopa_lightning import NoPrompt, PretrainedSpec

    asked: list[tuple[list[list[int]], list[int]]] = []
    monkeypatch.setattr(CausalLMModule, "_complete", lambda _, prompts, *__: asked.append(prompts) or [])
    for start_token in (False, True):
        module = CausalLMModule(backbone=PretrainedSpec(with_start), prompt_encoder=NoPrompt, start_token=start_token)
        module.generate(["good film"])
        assert cut_left([[0, 5, 6, 7, 8]], 3, len(module.input_spec.start_ids)) == (
            [[0, 7, 8]] if start_token else [[6, 7, 8]]
        )
    ((without,), _), ((with_token,), _) = asked
    assert with_token == [module.input_spec.tokenizer.bos_token_id, *without]
    assert module.task_identity() == {"objective": "completion", "start_token": True}


def test_a_start_token_that_there_is_not_is_refused_before_weights_are_loaded(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lopa_lightning.modules.builder.load_model", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(LoPAError, match="start_token: true needs a backbone whose tokenizer has a start token"):
        LoPACLI(args=["fit", *tiny_code("cruxeval_output", tiny("llama"), tiny)])


def test_a_backbone_that_is_its_own_encoder_has_no_dropout_of_its_own() -> None:
    from lopa_lightning import InstanceEncoderSpec

    with pytest.raises(LoPAError, match=r"instance_encoder\.dropout needs a model of its own"):
        InstanceEncoderSpec(dropout=True)

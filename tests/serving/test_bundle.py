"""A bundle answers as the checkpoint it was made of does, and may be anybody's."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from lopa_lightning import Bundle, LoPALightningModule, LoPAPrompter
from lopa_lightning.checkpoint import read
from lopa_lightning.cli import main
from lopa_lightning.errors import LoPAError
from lopa_lightning.serving.card import metrics_in, model_card, run_facts
from lopa_lightning.serving.export import export_bundle
from tests.checkpoints.write import HERE
from tests.modules.helpers import reviews, trainer
from tests.serving.helpers import checkpoint, image_checkpoint, image_home
from tests.test_checkpoint_file import CONTENTS, ESCAPE, KEY, REFUSED, refusal
from tests.tiny_images import WIDTH

Tiny = Callable[[str], str]
TEXTS = ["the film was great", "a bad story", "No", "the second half of it"]


def written(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    main(["export", *arguments])
    return capsys.readouterr().out


# What it is


def test_a_checkpoint_is_exported_and_answers_wherever_a_checkpoint_does(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, path = checkpoint("words", tmp_path / "run", tiny)
    out = tmp_path / "bundle"
    assert written([str(path), str(out), "--text", TEXTS[0], "--text", TEXTS[1]], capsys).startswith(
        f"{out} is a bundle"
    )
    names = {"config.json", "model.safetensors", "README.md", "parity.json", "parity.safetensors"}
    assert {each.name for each in out.iterdir()} == names
    assert len({each.stat().st_mode for each in out.iterdir()}) == 1  # who may read one may read all
    config = json.loads((out / "config.json").read_text())
    assert config["format_version"] == 1
    assert config["module"]["class_path"] == "classification"
    assert config["module"]["init_args"]["prompt_encoder"]["class_path"] == "lopa"
    assert not {"optimizer", "lr_scheduler", "learning_rates"} & set(config["module"]["init_args"])
    shape = {"num_virtual_tokens": 3, "embedding_dim": 32, "instance_dim": 32, "placement": "before"}
    assert config["prompt"] == {**shape, "dtype": "float32", "layers": 1}
    words = ["great", "terrible"]
    ids = [model.input_spec.tokenizer(f" {word}")["input_ids"][0] for word in words]
    assert config["answer"] == {"objective": "causal_lm", "labels": ["good", "bad"], "words": words, "word_ids": ids}
    assert len(config["tokenizers"]["backbone"]["sha256"]) == 64
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert set(safetensors.torch.load_file(out / "model.safetensors")) == set(saved)

    wanted = model.predict(TEXTS)
    again = LoPALightningModule.load_from_checkpoint(out)
    for key, value in saved.items():
        assert torch.equal(again.state_dict()[key], value)
    assert again.predict(TEXTS) == wanted
    rows = json.loads((out / "parity.json").read_text())
    assert [row.pop("input") for row in rows] == [{"text": text} for text in TEXTS[:2]]
    for row, other in zip(rows, wanted[:2], strict=True):
        assert row["probabilities"] == pytest.approx(other["probabilities"], abs=1e-5)
    capsys.readouterr()
    main(["predict", "--ckpt_path", str(out), "--text", TEXTS[0]])
    assert json.loads(capsys.readouterr().out)["probabilities"] == pytest.approx(wanted[0]["probabilities"], abs=1e-5)

    data = reviews(tmp_path, max_length=30)
    (scores,) = trainer(tmp_path, callbacks=[]).test(model, data, verbose=False)
    other = type(model)(**_arguments(model))
    assert trainer(tmp_path, callbacks=[]).test(other, data, ckpt_path=out, verbose=False) == [pytest.approx(scores)]
    with pytest.raises(LoPAError, match="a bundle holds no state of training; go on from the checkpoint"):
        trainer(tmp_path, callbacks=[]).fit(other, data, ckpt_path=out)


def _arguments(model: Any) -> dict[str, Any]:
    """What the module was built with."""
    return {
        "backbone": model.backbone_spec,
        "prompt_encoder": model.make_prompt_encoder,
        "instance_encoder": model.instance_spec,
        "objective": model.objective,
    }


@pytest.mark.parametrize(
    ("kind", "backbone", "around"),
    [
        ("soft", "llama", ("", "the film was")),
        ("soft in a chat", "chat", ("<|system|>", "<|user|>the film was<|assistant|>")),
    ],
)
def test_completions_come_with_the_likeliest_first_tokens(
    kind: str, backbone: str, around: tuple[str, str], tiny: Tiny, tmp_path: Path
) -> None:
    model, path = checkpoint(kind, tmp_path, tiny)
    bundle = export_bundle(path, ["the film was"])
    (row,) = bundle.rows
    plain, tokenizer = AutoModelForCausalLM.from_pretrained(tiny(backbone)), model.input_spec.tokenizer
    before, after = (
        plain.get_input_embeddings()(torch.tensor([tokenizer(text)["input_ids"]]).long()) for text in around
    )
    soft = bundle.tensors["net.prompt_encoder.shared_prompt.weight"][None]
    logits = plain(inputs_embeds=torch.cat([before, soft, after], 1)).logits[0, -1].log_softmax(-1)
    values, tokens = logits.topk(20)
    assert row["first_tokens"]["ids"] == tokens.tolist()
    assert row["first_tokens"]["log_probabilities"] == pytest.approx(values.tolist(), abs=1e-5)
    assert bundle.module().generate("the film was", {"max_new_tokens": 1}) == [[tokenizer.decode(tokens[0])]]


def test_the_card_says_what_it_is(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    backbone = Path(tiny("llama"), "README.md")
    backbone.write_text("---\nlicense: mit\n---\n# Tiny\n")
    _, path = checkpoint("words", tmp_path / "run" / "checkpoints", tiny)
    saved = torch.load(path, weights_only=True)
    saved["callbacks"]["FitSummary"] = {"best": {"val/score": 0.75}}
    torch.save(saved, path)
    settings = {
        "data": {"class_path": "lopa_lightning.GLUEDataModule", "init_args": {"path": "nyu-mll/glue", "task": "sst2"}}
    }
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(settings))
    bundle = export_bundle(path, names={"backbone": "me/tiny"}, license="apache-2.0")
    _, front, body = bundle.card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "lopa-lightning",
        "base_model": "me/tiny",
        "base_model_relation": "adapter",
        "pipeline_tag": "text-classification",
        "tags": ["soft-prompt", "prompt-tuning", "lopa"],
        "datasets": ["nyu-mll/glue"],
        "license": "apache-2.0",
    }
    for said in (
        "for the labels good, bad",
        "`val/score`: 0.7500",
        "`GLUEDataModule`, `nyu-mll/glue`, `sst2`",
        "Licence: unknown",  # of the encoder
        "Licence: mit",
        "vllm serve me/tiny --enable-prompt-embeds",
        "with the embeddings of the whole text",
        "3 virtual tokens of width 32",
    ):
        assert said in body, said
    assert tiny("llama") not in json.dumps(dataclasses.asdict(bundle.config))
    assert bundle.config.metrics == {"val/score": 0.75}
    backbone.unlink()
    export_bundle(path).save_pretrained(tmp_path / "bundle")
    assert export_bundle(tmp_path / "bundle").config.metrics == {"val/score": 0.75}


def test_a_card_says_how_the_backbone_was_quantised(tiny: Tiny, tmp_path: Path) -> None:
    bundle = export_bundle(checkpoint("words", tmp_path, tiny)[1])
    said = "The backbone was quantised in training: the server must quantise it alike"
    for quantization in (None, {"quant_method": "bitsandbytes", "load_in_4bit": True}):
        config = dataclasses.replace(bundle.config, identity={**bundle.config.identity, "quantization": quantization})
        card = model_card(config, {"backbone": ("me/tiny", "mit")}, None, True, False, {})
        assert (said in card) == (quantization is not None)


def test_metrics_that_have_no_value_are_left_out() -> None:
    best = {"val/loss": 0.5, "val/score": float("nan"), "val/perplexity": float("inf")}
    assert metrics_in({"callbacks": {"FitSummary": {"best": best}}}) == {"val/loss": 0.5}
    assert metrics_in({}) == {}


@pytest.mark.parametrize("best", [[1], {"a": "x"}, {"a": None}])
def test_metrics_that_are_no_numbers_are_refused(best: Any) -> None:
    with pytest.raises(LoPAError, match="best"):
        metrics_in({"callbacks": {"FitSummary": {"best": best}}})


@pytest.mark.parametrize("text", ["seed: 1", "data: {init_args: {}}", "data: 3", "[1]"])
def test_a_configuration_of_something_else_says_nothing_of_the_data(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    assert run_facts(tmp_path / "best.ckpt") == {}


@pytest.mark.parametrize("kind", ["a file", "not empty"])
def test_a_folder_that_is_there_is_refused_before_weights_are_read(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    if kind == "a file":
        out.touch()
    else:
        out.mkdir()
        (out / "x").touch()
    with pytest.raises(SystemExit):
        main(["export", str(HERE / "format_1" / "lopa.ckpt"), str(out)])
    assert f"OUT '{out}' is there already and not an empty folder; give another\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--to", "peft", "--text", "x", "--license", "mit"], "--text, --license goes with --to bundle, got --to peft"),
        (["--private"], "--private goes with --push"),
        (["--push", "a/b/c"], "no repository on the hub can be called 'a/b/c'"),
    ],
)
def test_options_that_would_be_passed_over_are_refused(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["export", "none.ckpt", str(tmp_path / "OUT"), *options])
    assert said in capsys.readouterr().err


def test_a_hub_id_of_an_encoder_that_there_is_not_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE)
    with pytest.raises(LoPAError, match="--instance_encoder: the instance encoder is the backbone, or there is none"):
        export_bundle("format_1/prompt_tuning.ckpt", names={"instance_encoder": "me/encoder"})


def test_what_ends_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE)
    bundle = export_bundle("format_1/lopa.ckpt")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save", full)
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty"):
        with pytest.raises(OSError, match="No space left"):
            bundle.save_pretrained(tmp_path / name)
    assert [(each.name, list(each.iterdir())) for each in tmp_path.iterdir()] == [("empty", [])]
    monkeypatch.undo()
    bundle.save_pretrained(tmp_path / "empty")
    assert len(list((tmp_path / "empty").iterdir())) == 5
    with pytest.raises(LoPAError, match=r"a folder has no revision: '.*empty' is read as it is, got revision 'v2'"):
        Bundle.from_pretrained(tmp_path / "empty", revision="v2")


# It may be anybody's


@pytest.fixture(scope="module", params=["text", "images"])
def home(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder from which the models of a bundle are named."""
    return HERE if request.param == "text" else image_home(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def good(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of LoPA."""
    folder = tmp_path_factory.mktemp("bundles") / "good"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        path = HERE / "format_1" / "lopa.ckpt" if home == HERE else image_checkpoint("lopa", home)[1]
        export_bundle(path).save_pretrained(folder)
    return folder


OF_TEXT = pytest.mark.parametrize("home", ["text"], indirect=True)
OF_IMAGES = pytest.mark.parametrize("home", ["images"], indirect=True)


@pytest.fixture
def bad(
    good: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Callable[[dict[str, Any], dict[str, Any]], Any]], Path]:
    """Writes the bundle with something else in it."""
    monkeypatch.chdir(home)
    config, tensors = (
        json.loads((good / "config.json").read_text()),
        safetensors.torch.load_file(good / "model.safetensors"),
    )

    def write(change: Callable[[dict[str, Any], dict[str, Any]], Any]) -> Path:
        changed, values = copy.deepcopy(config), {key: value.clone() for key, value in tensors.items()}
        change(changed, values)
        folder = tmp_path / "bad"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(changed))
        safetensors.torch.save_file(values, folder / "model.safetensors")
        return folder

    return write


@pytest.mark.sampled(9)
@OF_TEXT
@pytest.mark.parametrize("kind", [kind for kind in REFUSED if kind != "other words"])  # which says it as format 1 did
def test_settings_that_the_rest_contradicts_are_refused_as_in_a_checkpoint(kind: str, bad: Any) -> None:
    hyperparameters, message = REFUSED[kind]
    folder = bad(lambda config, _: config["module"]["init_args"].update(hyperparameters))
    assert message in refusal(lambda: LoPALightningModule.load_from_checkpoint(folder))


def _bomb() -> Any:
    nested: Any = 0
    for _ in range(60):
        nested = [nested]
    return nested


BAD: dict[str, tuple[Callable[[dict[str, Any], dict[str, Any]], Any], str]] = {
    "later format": (lambda config, _: config.update(format_version=2), "format_version 2, .*reads up to 1; update it"),
    "no format": (lambda config, _: config.pop("format_version"), "its format_version is None"),
    "format a bool": (lambda config, _: config.update(format_version=True), "its format_version is True"),
    "later identity": (lambda config, _: config["identity"].update(format=99), "it has format 99"),
    "identity a list": (lambda config, _: config.update(identity=[]), "identity must be dict"),
    "no identity": (lambda config, _: config.pop("identity"), "lacks identity"),
    "unknown entry": (lambda config, _: config.update({ESCAPE: 1}), "must be of format_version"),
    "another class": (lambda config, _: config["module"].update(class_path="os.system"), "is no subclass of"),
    "no such class": (
        lambda config, _: config["module"].update(class_path="s1_evil.Evil"),
        "is no imported subclass of",
    ),
    "no arguments": (lambda config, _: config["module"].pop("init_args"), "must have class_path and init_args"),
    "nested": (lambda config, _: config["module"]["init_args"].update(task=_bomb()), "nested too deeply"),
    "long text": (lambda config, _: config["module"]["init_args"].update(placement="x" * 10**6), "longer than any"),
    "long number": (lambda config, _: config["module"]["init_args"].update(warmup=2**70), "longer than any setting"),
    "width a text": (lambda config, _: config["prompt"].update(embedding_dim="8"), "embedding_dim must be int"),
    "NaN": (lambda _, tensors: tensors[KEY].fill_(float("nan")), f"'{KEY}' in its model.safetensors is NaN"),
    "infinite": (lambda _, tensors: tensors[KEY].fill_(float("inf")), "NaN or infinite in part"),
    "integers": (lambda _, tensors: tensors.update({KEY: torch.ones(3, dtype=torch.long)}), "is torch.int64"),
    "other labels": (
        lambda config, _: config["module"]["init_args"]["task"]["labels"].reverse(),
        "task.labels: the checkpoint has",
    ),
    "another shape": (lambda _, tensors: tensors.update({KEY: torch.ones(7)}), f"{KEY}: the checkpoint has \\(7,\\)"),
    "a tensor less": (lambda _, tensors: tensors.pop(KEY), f"{KEY}: missing in the checkpoint"),
    "a tensor more": (lambda _, tensors: tensors.update(x=torch.ones(1)), "x: not trained here"),
}


@pytest.mark.sampled(14)
@pytest.mark.parametrize("kind", BAD)
def test_a_bundle_that_is_none_is_refused_in_a_line(kind: str, bad: Any) -> None:
    change, message = BAD[kind]
    folder = bad(change)
    with pytest.raises(LoPAError, match=message):
        LoPALightningModule.load_from_checkpoint(folder)
    refusal(lambda: Bundle.from_pretrained(folder).check_served())


@OF_TEXT
def test_other_words_are_refused(bad: Any) -> None:
    folder = bad(lambda config, _: config["module"]["init_args"]["task"]["verbalizer"]["words"].reverse())
    assert "task.words: the checkpoint has" in refusal(lambda: LoPALightningModule.load_from_checkpoint(folder))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("embedding_dim", 999_999, "the checkpoint has ({m}, {d}), this run ({m}, 999999)"),
        ("instance_dim", 999_999, "the checkpoint has ({h}, {d}), this run ({h}, 999999)"),
        ("instance_dim", 2**60, "instance_dim must be at most 1000000"),
        ("num_virtual_tokens", 5, "the bundle's prompt says num_virtual_tokens 5, and its method makes {m}"),
        ("layers", 0, "backbone_layers must be at least 1, got 0"),
        ("layers", 2, ".bias: the checkpoint has ("),
        ("layers", 2**60, "backbone_layers must be at most 1000000"),
    ],
)
def test_sizes_that_the_tensors_do_not_have_are_never_built(
    name: str, value: int, message: str, home: Path, bad: Any
) -> None:
    sizes = {"m": 2, "d": 8, "h": 3} if home == HERE else {"m": 3, "d": WIDTH, "h": 8}
    folder = bad(lambda config, _: config["prompt"].update({name: value}))
    assert message.format(**sizes) in refusal(lambda: Bundle.from_pretrained(folder).prompt_encoder())


def _view(entry: str, value: Any) -> Callable[[dict[str, Any], Any], Any]:
    return lambda config, _: config["module"]["init_args"]["processing"].update({entry: value})


OF_A_VIEW: dict[str, tuple[Callable[[dict[str, Any], dict[str, Any]], Any], str]] = {
    "another view": (_view("resize", 12), "task.view.resize: the checkpoint has 13, this run 12"),
    "a long edge": (_view("resize", 10**9), "resize must be pixels from 1 to 10000, got 1000000000"),
    "no size": (_view("size", [12]), "size must be pixels from 1 to 10000"),
    "a text": (_view("crop", "yes"), "processing.crop must be bool, got 'yes'"),
    "an unknown entry": (_view("antialias", True), "processing must be of size, resize, crop"),
    "no view": (
        lambda config, _: config["identity"]["task"].pop("view"),
        "task.view: the checkpoint has None, this run {'size'",
    ),
}


@OF_IMAGES
@pytest.mark.parametrize("kind", OF_A_VIEW)
def test_what_is_done_to_images_is_what_it_was_trained_with(kind: str, bad: Any) -> None:
    change, message = OF_A_VIEW[kind]
    folder = bad(change)
    assert message in refusal(lambda: LoPALightningModule.load_from_checkpoint(folder))


@OF_IMAGES
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("std", [0.0, 0.0, 0.0], "std: the bundle has [0.0, 0.0, 0.0], it ["),
        ("resample", 10**9, "resample: the bundle has 1000000000, it 3"),
        ("size", [10**9, 4], "size must be pixels from 1 to 10000, got (1000000000, 4)"),
        ("mean", "x", "identity.task.instance_processing.mean must be"),
    ],
)
def test_nor_does_a_prompter_read_images_otherwise(key: str, value: Any, message: str, bad: Any) -> None:
    folder = bad(lambda config, _: config["identity"]["task"]["instance_processing"].update({key: value}))
    assert message in refusal(lambda: LoPAPrompter.from_pretrained(folder))


@OF_IMAGES
@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 4, 4, 3), "must hold pixels in uint8, 'images' is torch.float32"),
        (torch.zeros(2, 4, 4, 3, dtype=torch.uint8), "must have images [3, H, W, 3], got (2, 4, 4, 3)"),
        (torch.zeros(3, 4, 3, dtype=torch.uint8), "must have images [3, H, W, 3], got (3, 4, 3)"),
        (torch.zeros(3, 0, 4, 3, dtype=torch.uint8), "must have images [3, H, W, 3], got (3, 0, 4, 3)"),
    ],
)
def test_images_that_the_rows_do_not_have_are_refused(images: Any, message: str, good: Path, bad: Any) -> None:
    folder = bad(lambda *_: None)
    (folder / "parity.json").write_bytes((good / "parity.json").read_bytes())
    safetensors.torch.save_file({"images": images}, folder / "parity.safetensors")
    assert message in refusal(lambda: Bundle.from_pretrained(folder))


FILES: dict[str, tuple[str, bytes, str]] = {
    "no JSON": ("config.json", b"{", "its config.json is no JSON"),
    "deep": ("config.json", b"[" * 10**5, "its config.json is no JSON"),
    "a list": ("config.json", b"[]", "its format_version is None"),
    "bytes": ("config.json", b"\xff\xfe\x00", "its config.json is no JSON"),
    "a pickle": (
        "model.safetensors",
        (HERE / "format_1" / "lopa.ckpt").read_bytes(),
        "its model.safetensors is damaged",
    ),
    "empty": ("model.safetensors", b"", "its model.safetensors is damaged"),
    "a long header": ("model.safetensors", (2**60).to_bytes(8, "little") + b"{}", "its model.safetensors is damaged"),
    "rows": ("parity.json", b"{}", "its parity.json must be a list of rows"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_that_is_damaged_is_named(kind: str, bad: Any) -> None:
    folder = bad(lambda *_: None)
    name, content, message = FILES[kind]
    (folder / name).write_bytes(content)
    assert message in refusal(lambda: Bundle.from_pretrained(folder))


def test_a_folder_that_is_none_is_named(tmp_path: Path, bad: Any) -> None:
    assert "is no bundle: it has no config.json" in refusal(lambda: Bundle.from_pretrained(tmp_path))
    folder = bad(lambda *_: None)
    (folder / "model.safetensors").unlink()
    assert "it has no regular file model.safetensors" in refusal(lambda: read(folder))
    assert "no regular file" in refusal(lambda: read(tmp_path))


def test_the_checks_of_a_checkpoint_are_those_of_a_bundle() -> None:
    assert {"later format", "NaN", "infinite", "integers", "nested", "long text", "long number"} <= {*CONTENTS} & {*BAD}


# PEFT


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", ["soft", "soft words", "soft mask", "lora", "lora words", "ia3"])
def test_plain_peft_loads_what_is_exported_and_computes_the_same(
    kind: str, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peft = pytest.importorskip("peft")
    model, path = checkpoint(kind, tmp_path / "run", tiny)
    for value in filter(lambda each: each.requires_grad, model.parameters()):
        value.data += torch.randn(value.shape) * 0.1  # LoRA starts as no change, and a step is a small one
    saved = torch.load(path, weights_only=True)
    saved["state_dict"] = dict(model.state_dict())
    torch.save(saved, path)
    assert "is an adapter for peft" in written([str(path), str(tmp_path / "out"), "--to", "peft"], capsys)
    assert {each.name for each in (tmp_path / "out").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    is_mask = kind == "soft mask"
    auto = AutoModelForMaskedLM if is_mask else AutoModelForCausalLM
    plain = auto.from_pretrained(tiny("bert" if is_mask else "llama")).eval()
    batch = {"input_ids": torch.tensor([[70, 71, 72, 73], [80, 81, 0, 0]]), "attention_mask": torch.ones(2, 4).long()}
    batch["attention_mask"][1, 2:] = 0
    with torch.no_grad():
        before = plain(**batch).logits
        found = peft.PeftModel.from_pretrained(plain, str(tmp_path / "out")).eval()(**batch).logits
        states = model.net.backbone(model.net.prompt_encoder(None), batch)
        head = model.net.backbone.model
        wanted = head.cls(states.hidden) if is_mask else head.lm_head(states.hidden)
    real = states.content_mask.bool()
    torch.testing.assert_close(found[real], wanted[real], rtol=0, atol=1e-5)
    assert (found[real] - before[batch["attention_mask"].bool()]).abs().max() > 1e-3


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("completion", "PEFT has no soft prompt that depends on the instance, as LoPA's does"),
        ("head", "PEFT has no such trained head"),
        ("dept", "PEFT's prompt tuning has no DePT"),
        ("after first", "PEFT puts soft prompts before the text, and placement is after_first"),
        ("full", "all of the backbone was trained, which is no adapter"),
    ],
)
def test_what_peft_does_not_have_is_refused(
    kind: str,
    message: str,
    tiny: Tiny,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("peft")
    _, path = checkpoint(kind, tmp_path / "run", tiny)
    monkeypatch.setattr(LoPALightningModule, "configure_model", lambda module: pytest.fail("weights were read"))
    with pytest.raises(SystemExit):
        main(["export", str(path), str(tmp_path / "out"), "--to", "peft"])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

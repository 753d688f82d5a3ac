"""Every method on images, and a run from the command line."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from datasets import Dataset, DatasetDict
from torch import Tensor

from lopa_lightning import (
    IDPG,
    DePT,
    ImageClassificationModule,
    InstanceEncoderSpec,
    LoPA,
    LoPALightningModule,
    NoPrompt,
    PretrainedSpec,
    PromptTuning,
    PTuning,
    Task,
    VisualPromptTuning,
)
from lopa_lightning.cli import main
from lopa_lightning.data.splits import SplitsDataModule
from lopa_lightning.errors import LoPAError
from tests.modules.helpers import trainer
from tests.tiny_images import LAYERS, SIDE, WIDTH, save_vision, vision_model

M, CLASSES, H = 3, 4, 5
HEAD = CLASSES * (WIDTH + 1)
DEEP = {"placement": "every_layer"}
SIZES: dict[str, Any] = {"num_virtual_tokens": M, "hidden_dim": H}
LOW_RANK = 2 * (WIDTH + 1) * H + (H + 1) * (M + WIDTH) * 2
LAYER = 4 * (WIDTH + 1) * WIDTH + (2 * WIDTH + 1) * 24 + WIDTH + 4 * WIDTH
# Options of the module, and how many parameters are trained beside the head.
METHODS: dict[str, tuple[dict[str, Any], int | None]] = {
    "vpt_shallow": ({"prompt_encoder": functools.partial(PromptTuning, num_virtual_tokens=M)}, M * WIDTH),
    "vpt_deep": (
        {"prompt_encoder": functools.partial(VisualPromptTuning, num_virtual_tokens=M, dropout=0.1), **DEEP},
        LAYERS * M * WIDTH,
    ),
    "vpt_projected": (
        {"prompt_encoder": functools.partial(VisualPromptTuning, num_virtual_tokens=M, project_dim=2), **DEEP},
        LAYERS * M * 2 + 3 * WIDTH,
    ),
    "lopa": ({"prompt_encoder": functools.partial(LoPA, rank=2, **SIZES)}, M * WIDTH + LOW_RANK),
    "lopa_deep": ({"prompt_encoder": functools.partial(LoPA, rank=2, **SIZES), **DEEP}, LAYERS * M * WIDTH + LOW_RANK),
    "idpg": (
        {"prompt_encoder": functools.partial(IDPG, **SIZES)},
        (WIDTH + 1) * H + H * M * WIDTH + M * WIDTH,
    ),
    "p_tuning_deep": (
        {"prompt_encoder": functools.partial(PTuning, input_dim=2, **SIZES), **DEEP},
        M * 2 + 3 * H + (H + 1) * H + (H + 1) * LAYERS * WIDTH,
    ),
    "linear_probe": ({"prompt_encoder": NoPrompt}, 0),
    "lora": (
        {"prompt_encoder": NoPrompt, "adapter": {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj", "v_proj"]}},
        LAYERS * 2 * 2 * 2 * WIDTH,
    ),
    "full": ({"prompt_encoder": NoPrompt, "train_backbone": True}, None),
    # Of each layer, its attention, MLP and two norms; of ViT's patches or CLIP's first norm; of the last norm.
    "bias": ({"prompt_encoder": NoPrompt, "train_backbone": "bias"}, LAYERS * (7 * WIDTH + 24) + 2 * WIDTH),
    "last_2": ({"prompt_encoder": NoPrompt, "train_backbone": 2}, 2 * LAYER + 2 * WIDTH),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Saves a tiny model, once."""
    at = tmp_path_factory.mktemp("models")

    def saved(kind: str) -> str:
        return str(at / kind) if (at / kind).is_dir() else save_vision(vision_model(kind), at / kind)

    return saved


def module(backbone: str, **options: Any) -> ImageClassificationModule:
    task = Task([str(number) for number in range(CLASSES)])
    return ImageClassificationModule(backbone=PretrainedSpec(backbone), task=task, **options)


def batch(count: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator)
    return {"index": torch.arange(count), "pixels": pixels, "labels": torch.arange(count) % CLASSES}


@pytest.mark.sampled(8)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["vit", "clip"])
def test_every_method_learns_from_images(method: str, kind: str, folder: Callable[[str], str]) -> None:
    options, expected = METHODS[method]
    made = module(folder(kind), **options)
    made.configure_model()
    trained = {name: p for name, p in made.named_parameters() if p.requires_grad}
    in_groups = [p for group in made._net().parameter_groups().values() for p in group]
    assert {id(p) for p in in_groups} == {id(p) for p in trained.values()}
    if expected is not None:
        assert sum(p.numel() for p in in_groups) == expected + HEAD

    optimizer, moved = torch.optim.SGD(in_groups, lr=0.1), set[str]()
    losses = []
    for _ in range(3):
        outputs = made(batch())
        assert outputs.shape == (6, CLASSES)
        losses.append(made.loss(outputs, batch()))
        optimizer.zero_grad()
        losses[-1].backward()
        moved |= {name for name, p in trained.items() if p.grad is not None and p.grad.abs().sum() > 0}
        optimizer.step()
    unread = {name for name in trained if "post_layernorm" in name or ".pooler." in name or "mask_token" in name}
    assert moved >= set(trained) - unread - {name for name in trained if name.endswith("k_proj.bias")}
    assert losses[-1] < losses[0]
    assert all(p.grad is None for p in made.parameters() if not p.requires_grad)


@pytest.mark.parametrize("pooling", ["cls", "patches", "prompts", "all"])
def test_the_head_reads_what_it_is_told(pooling: Any, folder: Callable[[str], str]) -> None:
    made = module(folder("deit"), **METHODS["lopa_deep"][0], head_pooling=pooling)
    made.configure_model()
    net = made._net().eval()
    instance = net.encode_instance(batch())
    hidden = net.backbone(net.prompt_encoder(instance), batch()).hidden  # CLS, distillation, virtual tokens, patches
    read = {
        "cls": hidden[:, 0],
        "patches": hidden[:, 2 + M :].mean(1),
        "prompts": hidden[:, 2 : 2 + M].mean(1),
        "all": hidden[:, 2:].mean(1),
    }[pooling]
    linear: Any = net.readout.linear
    torch.testing.assert_close(made(batch()), read @ linear.weight.T + linear.bias)


def test_an_instance_encoder_of_its_own_reads_the_same_pixels(folder: Callable[[str], str]) -> None:
    encoder = InstanceEncoderSpec(folder("vit"), pooling="cls", cache=False)
    made = module(folder("siglip"), **METHODS["lopa"][0], head_pooling="patches", instance_encoder=encoder)
    made.configure_model()
    net = made._net()
    assert made.input_spec.instance_vectors is None
    vectors = net.encode_instance(batch())
    assert vectors is not None
    expected = vision_model("vit")
    mean, std = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1), torch.tensor([0.3, 0.2, 0.25]).view(3, 1, 1)
    cls = expected(pixel_values=(batch()["pixels"] / 255 - mean) / std).last_hidden_state[:, 0]
    torch.testing.assert_close(vectors, cls / cls.square().mean(-1, keepdim=True).sqrt(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("siglip", {"prompt_encoder": PromptTuning}, r"has no CLS token; use head_pooling: patches"),
        ("vit", {"prompt_encoder": NoPrompt, "head_pooling": "prompts"}, r"head_pooling: prompts needs virtual tokens"),
        (
            "vit",
            {"prompt_encoder": functools.partial(DePT, rank=2)},
            r"^DePT changes the text's embeddings, which VisionBackbone",
        ),
        ("vit", {"head_pooling": "mean"}, r"^head_pooling must be one of cls, patches, prompts, all, got 'mean'$"),
        ("vit", {"objective": "causal_lm"}, r"^images need objective: head, got 'causal_lm'$"),
        ("vit", {"placement": "after_first"}, r"^placement of images must be one of before, every_layer"),
    ],
)
def test_what_cannot_be_right_is_refused(
    kind: str, options: dict[str, Any], message: str, folder: Callable[[str], str]
) -> None:
    def check() -> None:
        made = module(folder(kind), **options)
        made.is_trainable()
        made.input_spec  # noqa: B018 - raises

    with pytest.raises(LoPAError, match=message):
        check()


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (
            "siglip",
            {"pooling": "cls"},
            r"must be mean, max, and 'backbone' has no CLS token; got 'cls'",
        ),
        ("vit", {"pooling": "last"}, r"pooling of images must be cls, mean, max; got 'last'"),
        ("vit", {"max_length": 3}, r"instance_encoder.max_length is of texts"),
        ("vit", None, r"init='text' needs a backbone with a vocabulary"),
    ],
)
def test_what_would_read_images_amiss_is_refused_before_weights_are_read(
    kind: str,
    options: dict[str, Any] | None,
    message: str,
    folder: Callable[[str], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr("lopa_lightning.modules.builder.load_model")
    given: dict[str, Any] = {"head_pooling": "patches", "prompt_encoder": functools.partial(LoPA, **SIZES)}
    if options is None:
        given["prompt_encoder"] = functools.partial(PromptTuning, init="text", init_text="a film")
    else:
        given["instance_encoder"] = InstanceEncoderSpec(**options)
    with pytest.raises(LoPAError, match=message):
        trainer(tmp_path).fit(module(folder(kind), **given), ShadesDataModule())


class ShadesDataModule(SplitsDataModule):
    """How bright is an image?"""

    task = Task(["dark", "dim", "light", "bright"])

    def load(self) -> DatasetDict:
        generator = torch.Generator().manual_seed(0)
        labels = torch.arange(48) % CLASSES
        pixels = torch.randint(64, (48, 3, SIDE, SIDE), generator=generator) + 60 * labels.view(-1, 1, 1, 1)
        rows = {"pixels": pixels.flatten(1).tolist(), "labels": labels.tolist(), "index": range(48)}
        parts = Dataset.from_dict(rows).train_test_split(16, shuffle=False)
        return DatasetDict({**parts, "validation": parts["test"]})

    def encode(self, data: Dataset, split: str, role: str) -> Dataset:
        return data

    def collate(self) -> Callable[[pa.Table], dict[str, Tensor]]:
        def made(table: pa.Table) -> dict[str, Tensor]:
            found = {name: torch.tensor(table[name].to_pylist()) for name in table.column_names}
            return {**found, "pixels": found["pixels"].view(-1, 3, SIDE, SIDE).byte()}

        return made


RUN = """
model:
  class_path: lopa_lightning.ImageClassificationModule
  init_args:
    backbone: {{name: {backbone}}}
    placement: every_layer
    instance_encoder: {{cache: false, pooling: cls}}
    prompt_encoder: {{class_path: lopa_lightning.LoPA, init_args: {{num_virtual_tokens: 3, rank: 2, hidden_dim: 8}}}}
    optimizer: {{class_path: torch.optim.AdamW, init_args: {{lr: 0.01}}}}
data: {{class_path: {here}.ShadesDataModule, init_args: {{batch_size: 8}}}}
trainer: {{max_epochs: 4, accelerator: cpu, devices: 1, enable_progress_bar: false, log_every_n_steps: 2}}
"""


CONFIGS = Path(__file__).parents[2] / "configs" / "methods"
OF_IMAGES = sorted(path.stem for path in CONFIGS.glob("*.yaml") if "vision" in path.stem or path.stem.startswith("vpt"))
OF_BOTH = ["bias_only", "partial", "full", "head_only", "idpg", "lopa", "lopa_deep", "p_tuning_mlp", "prompt_tuning"]


# tests/test_methods.py runs the overlays of texts, and above are their methods on images.
@pytest.mark.sampled(2)
@pytest.mark.parametrize("method", [*OF_IMAGES, *(pytest.param(name, marks=pytest.mark.slow) for name in OF_BOTH)])
def test_the_configs_of_methods_run_on_images(
    method: str, folder: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(RUN.format(here=__name__, backbone=folder("clip")))
    main(["fit", "--config", "run.yaml", "--config", str(CONFIGS / f"{method}.yaml"), "--trainer.fast_dev_run=true"])


@pytest.mark.slow
def test_it_is_planned_trained_resumed_and_predicts(
    folder: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(RUN.format(here=__name__, backbone=folder("beit_relative")))
    config = ["--config", "run.yaml"]
    main(["plan", *config, "--json"])
    planned = json.loads(capsys.readouterr().out)
    main(["fit", *config])
    said = capsys.readouterr().out
    trained = LAYERS * M * WIDTH + 2 * (WIDTH + 1) * 8 + 9 * (M + WIDTH) * 2 + HEAD
    assert (planned["trained"], planned["tokens"], planned["examples"]) == (trained, 9, 8)
    assert f"{trained:,} parameters beside" in said
    config += ["--monitor.enabled=false"]  # tests/callbacks/test_pictures.py: a run is the same without
    main(["fit", *config, "--trainer.max_epochs", "2"])
    main(["fit", *config, "--ckpt_path", "runs/lopa/version_1/checkpoints/last.ckpt"])
    whole, resumed = (
        LoPALightningModule.load_from_checkpoint(Path(f"runs/lopa/version_{number}/checkpoints/last.ckpt"))
        for number in (0, 2)
    )
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, rtol=0, atol=0)
    main(["predict", *config, "--ckpt_path", "runs/lopa/version_0/checkpoints/last.ckpt", "--predictions.folder", "."])
    settings = Path(folder("beit_relative"), "preprocessor_config.json")
    before = settings.read_text()
    settings.write_text(before.replace("0.25", "0.5"))
    with pytest.raises(LoPAError, match=r"std: the checkpoint has .*0\.25"):
        LoPALightningModule.load_from_checkpoint("runs/lopa/version_0/checkpoints/last.ckpt")
    settings.write_text(before)
    rows = [json.loads(line) for line in Path("predictions.jsonl").read_text().splitlines()]
    assert sum(row["label"] == whole.task.labels[row["index"] % CLASSES] for row in rows) >= len(rows) / 2
    assert len(rows) == 16

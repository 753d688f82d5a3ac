"""Every method's YAML: it trains, saves exactly what it trained, and predicts the same after loading."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from lopa_lightning import ClassificationModule, GLUEDataModule
from lopa_lightning.cli import LoPACLI
from lopa_lightning.errors import LoPAError
from lopa_lightning.experiments.resolve import resolve
from tests.mini_glue import write_mini_glue

Tiny = Callable[[str], str]

ROOT = Path(__file__).parent.parent
# Those of the paper's code tasks are run by tests/test_paper.py, those of images by
# tests/modules/test_image_classification.py.
METHODS = [
    path
    for path in sorted((ROOT / "configs" / "methods").glob("*.yaml"))
    if path.stem not in ("lopa_paper_code", "lopa_paper_cruxeval")
    and "vision" not in path.stem
    and path.stem[:3] != "vpt"
]
RTE = ROOT / "configs" / "glue_rte.yaml"
CPU_SMALL = ROOT / "configs" / "cpu_small.yaml"
LAYER = "net.backbone.model.roberta.encoder.layer"


def in_prompt_encoder(*names: str) -> set[str]:
    return {f"net.prompt_encoder.{name}" for name in names}


def layers(part: str, *numbers: int) -> list[str]:
    return [f"{part}.{number}.{kind}" for number in numbers for kind in ("weight", "bias")]


HEADS = [*layers("row_head", 1, 3), *layers("column_head", 1, 3)]
MLP = ["inputs", *layers("mlp", 0, 2, 4)]
LSTM = [
    f"lstm.{kind}_{gate}_l{layer}{way}"
    for kind in ("weight", "bias")
    for gate in ("ih", "hh")
    for layer in (0, 1)
    for way in ("", "_reverse")
]
SOFT = in_prompt_encoder("shared_prompt.weight")
LINEAR_AND_NORM = [
    *(f"attention.self.{part}" for part in ("query", "key", "value")),
    *(f"{part}.{kind}" for part in ("attention.output", "output") for kind in ("dense", "LayerNorm")),
    "intermediate.dense",
]
ADAPTER = {
    f"net.instance_encoder.model.encoder.layer.{layer}.attention.self.{part}.lora_{side}.default.weight"
    for layer in (0, 1)
    for part in ("query", "value")
    for side in "AB"
}
COPYS_ADAPTER = {
    f"net.instance_encoder.model.layers.{layer}.self_attn.{part}_proj.lora_{side}.default.weight"
    for layer in (0, 1)
    for part in "qv"
    for side in "AB"
}
INSTANCE_READOUT = {"net.instance_readout.weight", "net.instance_readout.bias"}
SAVED: dict[str, set[str]] = {
    **dict.fromkeys(
        ["lopa", "lopa_add", "lopa_concat", "lopa_max", "lopa_deep", "lopa_trained_encoder", "lopa_paper_nlu"],
        SOFT | in_prompt_encoder(*HEADS),
    ),
    "lopa_instance_only": in_prompt_encoder(*HEADS),
    **dict.fromkeys(["prompt_tuning", "p_tuning_v2"], SOFT),
    "idpg": SOFT | in_prompt_encoder(*layers("generator", 1), "generator.3.weight"),
    "idpg_phm": SOFT | in_prompt_encoder(*(f"generator.{part}" for part in ("1.a", "1.b", "1.bias", "3.a", "3.b"))),
    **dict.fromkeys(["p_tuning_mlp", "prefix_tuning"], in_prompt_encoder(*MLP)),
    "p_tuning_lstm": in_prompt_encoder("inputs", *LSTM, *layers("mlp", 0, 2)),
    "dept": SOFT | in_prompt_encoder("offset_a", "offset_b"),
    "lora": {
        f"{LAYER}.{layer}.attention.self.{part}.lora_{side}.default.weight"
        for layer in (0, 1)
        for part in ("query", "value")
        for side in "AB"
    },
    "lopa_adapted_encoder": SOFT | in_prompt_encoder(*HEADS) | ADAPTER,
    "lopa_taught_encoder": SOFT | in_prompt_encoder(*HEADS) | ADAPTER | INSTANCE_READOUT,
    "lopa_adapted_copy": SOFT | in_prompt_encoder(*HEADS) | COPYS_ADAPTER | INSTANCE_READOUT,
    "encoder_alone": {
        f"net.backbone.model.encoder.layer.{layer}.attention.self.{part}.lora_{side}.default.weight"
        for layer in (0, 1)
        for part in ("query", "value")
        for side in "AB"
    }
    | {"net.readout.linear.weight", "net.readout.linear.bias"},
    "ia3": {
        f"{LAYER}.{layer}.{part}.ia3_l.default"
        for layer in (0, 1)
        for part in ("attention.self.key", "attention.self.value", "attention.output.dense", "output.dense")
    },
    "head_only": {"net.readout.linear.weight", "net.readout.linear.bias"},
    "full": set(),
    "bias_only": {f"{LAYER}.{layer}.{part}.bias" for layer in (0, 1) for part in LINEAR_AND_NORM}
    | {f"net.backbone.model.{part}.bias" for part in ("roberta.embeddings.LayerNorm", "lm_head.dense")}
    | {f"net.backbone.model.{part}.bias" for part in ("lm_head.layer_norm", "lm_head")},
    "partial": {f"{LAYER}.1.{part}.{kind}" for part in LINEAR_AND_NORM for kind in ("weight", "bias")},
}
# Of these parts, all is trained.
WHOLE = {
    **dict.fromkeys(["lopa_trained_encoder", "lopa_paper_nlu"], "instance_encoder"),
    "full": "backbone",
}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def mini_glue(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_mini_glue(tmp_path_factory.mktemp("glue"))


def fitted(method: Path, *arguments: str) -> LoPACLI:
    configs = [argument for path in (RTE, method) for argument in ("--config", str(path))]
    return LoPACLI(args=["fit", *configs, "--trainer.enable_progress_bar=false", "--trainer.logger=false", *arguments])


def outputs(module: ClassificationModule, data: GLUEDataModule) -> torch.Tensor:
    module.eval()
    with torch.no_grad():
        return torch.cat([module(batch) for batch in data.val_dataloader()[0]])


def check_round_trip(method: Path, *arguments: str) -> None:
    cli = fitted(
        method,
        *arguments,
        *("--data.batch_size=4", "--trainer.max_epochs=1", "--trainer.accelerator=cpu"),
        *("--checkpoint.dirpath=kept", "--last_checkpoint.dirpath=kept"),
    )
    whole = getattr(cli.model.net, WHOLE[method.stem]) if method.stem in WHOLE else None
    names = set() if whole is None else {f"net.{WHOLE[method.stem]}.{name}" for name, _ in whole.named_parameters()}
    trained = SAVED[method.stem] | names
    assert {name for name, parameter in cli.model.named_parameters() if parameter.requires_grad} == trained
    assert set(torch.load("kept/last.ckpt", weights_only=True)["state_dict"]) == trained
    groups = cli.model.net.parameter_groups()
    assert sum(len(group) for group in groups.values()) == len(trained)

    again = ClassificationModule.load_from_checkpoint("kept/last.ckpt")
    torch.testing.assert_close(outputs(again, cli.datamodule), outputs(cli.model, cli.datamodule), rtol=0, atol=0)
    moved = [name for name, p in again.named_parameters() if name in trained and p.abs().sum() > 0]
    assert len(moved) >= len(trained) / 2  # not zeros read from nowhere


# Each differs from one that is run in an argument, whose tensors are those that a faster test names: of prompts
# tests/prompts/test_contract.py, of IA³ tests/backbones/test_adapters.py, of a backbone in part
# tests/modules/test_image_classification.py.
VARIANTS = {"lopa_add", "lopa_concat", "lopa_max", "lopa_instance_only", "idpg_phm", "p_tuning_lstm", "p_tuning_v2"}
VARIANTS |= {"prefix_tuning", "ia3", "bias_only", "partial"}
# A method's tensors are those of tests/prompts/test_contract.py; to go through the command line these are enough.
BY_DEFAULT = {"lopa", "prompt_tuning", "lora"}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_a_variants_overlay_is_taken(variant: str) -> None:
    overlay = yaml.safe_load((ROOT / "configs" / "methods" / f"{variant}.yaml").read_text())["model"]["init_args"]
    resolved = resolve([str(RTE), str(ROOT / "configs" / "methods" / f"{variant}.yaml")])["model"]["init_args"]
    assert overlay.keys() <= resolved.keys()


@pytest.mark.parametrize(
    "method",
    [pytest.param(path, marks=[] if path.stem in BY_DEFAULT else [pytest.mark.slow]) for path in METHODS],
    ids=lambda path: path.stem,
)
def test_a_method_trains_saves_what_it_trained_and_loads(method: Path, tiny: Tiny, mini_glue: str) -> None:
    causal = ["--model.objective=causal_lm"] if method.stem == "lopa_adapted_copy" else []
    backbone = tiny("llama" if causal else "roberta")
    length = 80 if causal else 40  # its template is the longer one
    check_round_trip(
        method, f"--model.backbone.name={backbone}", *causal, f"--data.path={mini_glue}", f"--data.max_length={length}"
    )


# What a data set holds meets a method only in the backbone's and the instance encoder's inputs, and these meet LoPA's.
@pytest.mark.slow
@pytest.mark.real
def test_a_method_does_so_on_real_data(tiny: Tiny, real_data: Callable[[str], str]) -> None:
    data = [f"--data.path={real_data('nyu-mll/glue')}", "--data.max_length=40", "--data.max_train_examples=8"]
    lopa = ROOT / "configs" / "methods" / "lopa.yaml"
    check_round_trip(lopa, f"--model.backbone.name={tiny('roberta')}", *data, "--trainer.limit_val_batches=2")


def test_lora_adds_as_many_numbers_as_its_paper_says(tiny: Tiny, mini_glue: str) -> None:
    cli = fitted(
        ROOT / "configs" / "methods" / "lora.yaml",
        f"--model.backbone.name={tiny('roberta')}",
        *(f"--data.path={mini_glue}", "--data.max_length=40", "--trainer.fast_dev_run=true"),
    )
    layers, matrices, width, rank = 2, 2, 32, 8
    assert sum(p.numel() for p in cli.model.parameters() if p.requires_grad) == layers * matrices * 2 * width * rank


def test_nothing_to_train_is_refused(tiny: Tiny, mini_glue: str) -> None:
    Path("none.yaml").write_text(
        yaml.safe_dump({"model": {"init_args": {"prompt_encoder": "lopa_lightning.NoPrompt"}}})
    )
    with pytest.raises(LoPAError, match="nothing is trained"):
        fitted(
            Path("none.yaml"),
            f"--model.backbone.name={tiny('roberta')}",
            *(f"--data.path={mini_glue}", "--data.max_length=40", "--model.learning_rates={}"),
        )

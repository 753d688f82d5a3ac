"""What cannot be right ends in one line that names it, before weights are read, and leaves nothing behind."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau, StepLR

from lopa_lightning.cli import LoPACLI, main
from lopa_lightning.command_line.parser import UsageError
from lopa_lightning.command_line.ranges import check_options
from lopa_lightning.errors import LoPAError
from lopa_lightning.experiments.resolve import Resolver, resolve
from lopa_lightning.modules.dry_run import dry_run
from lopa_lightning.modules.schedule import warn_of_warmup
from tests.mini_glue import write_mini_glue

Refused = Callable[..., str]

CONFIGS = Path(__file__).parent.parent / "configs"
RTE = CONFIGS / "glue_rte.yaml"
SCHEDULERS = "torch.optim.lr_scheduler"
LOGGERS = "lightning.pytorch.loggers"

# Of the wrong type: what jsonargparse refuses.
WRONG_TYPE: dict[str, list[str]] = {
    "trainer.precision": ["fp16", "8"],
    "trainer.max_epochs": ["abc", "1.5", "[3]", "{a: 3}"],
    "trainer.max_steps": ["many"],
    "trainer.gradient_clip_val": ["abc"],
    "trainer.detect_anomaly": ["maybe"],
    "trainer.deterministic": ["sometimes"],
    "trainer.benchmark": ["7"],
    "trainer.limit_val_batches": ["all"],
    "trainer.accumulate_grad_batches": ["two", "1.5"],
    "trainer.logger": ["junk"],
    "trainer.callbacks": ["junk", "[junk]"],
    "trainer.plugins": ["junk", "[junk]"],
    "trainer.strategy.class_path": ["junk"],
    "trainer": ["3"],
    "seed_everything": ["abc", "1.5"],
    "model": ["junk", "lopa_lightning.Nope"],
    "model.class_path": ["junk"],
    "model.objective": ["maskd"],
    "model.placement": ["junk"],
    "model.nonfinite_loss": ["junk"],
    "model.warmup": ["abc", "[1]"],
    "model.learning_rates": ["abc", "[1]", "{head: abc}"],
    "model.learning_rates.head": ["abc"],
    "model.frozen_dropout": ["maybe"],
    "model.train_backbone": ["some", "1.5"],
    "model.optimizer": ["nope", "torch.optim.Nope"],
    "model.optimizer.lr": ["abc", "[1]"],
    "model.optimizer.weight_decay": ["abc"],
    "model.optimizer.init_args.betas": ["abc", "[a, b]"],
    "model.lr_scheduler": ["nope", f"{SCHEDULERS}.Nope"],
    "model.prompt_encoder": ["junk", "lopa_lightning.Nope", "os.system"],
    "model.prompt_encoder.rank": ["abc", "1.5", "[4]"],
    "model.prompt_encoder.num_virtual_tokens": ["abc"],
    "model.prompt_encoder.dropout": ["abc"],
    "model.prompt_encoder.init": ["zeros"],
    "model.backbone": ["roberta-large", "3"],
    "model.backbone.dtype": ["float9", "7"],
    "model.backbone.trust_remote_code": ["perhaps"],
    "model.instance_encoder": ["roberta-large"],
    "model.instance_encoder.pooling": ["sum"],
    "data": ["junk", "lopa_lightning.Nope"],
    "data.batch_size": ["abc", "2.5"],
    "data.max_length": ["abc", "[1]"],
    "data.num_workers": ["abc"],
    "data.truncation_side": ["middle"],
    "predictions.format": ["xml"],
    "monitor.enabled": ["maybe"],
    "checkpoint.save_top_k": ["all"],
    "last_checkpoint.every_n_train_steps": ["abc"],
}

# Of the right type and out of range: what options.py refuses.
OUT_OF_RANGE: dict[str, list[Any]] = {
    "trainer.max_epochs": [0, -2],
    "trainer.max_steps": [0, -2],
    "trainer.min_epochs": [-1],
    "trainer.min_steps": [-1],
    "trainer.accumulate_grad_batches": [0, -1],
    "trainer.check_val_every_n_epoch": [0, -1],
    "trainer.val_check_interval": [0, 0.0, -1, 1.5, float("nan")],
    "trainer.limit_train_batches": [0, 0.0, -1, 1.5, float("inf")],
    "trainer.limit_val_batches": [-1, 1.5],
    "trainer.limit_test_batches": [0],
    "trainer.limit_predict_batches": [0],
    "trainer.overfit_batches": [-1, 1.5],
    "trainer.gradient_clip_val": [-1, -0.5, float("nan"), float("inf")],
    "trainer.log_every_n_steps": [-1],
    "trainer.num_sanity_val_steps": [-2],
    "trainer.reload_dataloaders_every_n_epochs": [-1],
    "trainer.num_nodes": [0, -1],
    "trainer.fast_dev_run": [-1],
    "seed_everything": [-1, 2**32],
    "checkpoint.every_n_train_steps": [0],
    "checkpoint.every_n_epochs": [0],
    "checkpoint.save_top_k": [-2],
    "last_checkpoint.every_n_train_steps": [0, -1],
    "model.optimizer.lr": [0, 0.0, -1, float("nan"), float("inf")],
    "model.optimizer.weight_decay": [-1],
}

# What only the data, or the shapes of what is trained, show to be impossible: 12 rows of training data.
ONE_CYCLE = f"lr_scheduler={{class_path: {SCHEDULERS}.OneCycleLR, init_args: {{max_lr: 0.1, total_steps: 3}}}}"
REFUSED_WITH_DATA: list[tuple[list[str], str]] = [
    (["trainer.val_check_interval=4"], "trainer.val_check_interval must be at most the 3 batches of an epoch, got 4"),
    (["trainer.val_check_interval=3", "trainer.limit_train_batches=0.7"], "at most the 2 batches of an epoch, got 3"),
    (["trainer.limit_train_batches=1e-9"], "trainer.limit_train_batches must leave a batch of the 3 there are"),
    (["trainer.overfit_batches=1e-9"], "trainer.overfit_batches must leave a batch of the 3 there are, got 1e-09"),
    (
        ["model.optimizer=torch.optim.SparseAdam"],
        "optimizer: RuntimeError: SparseAdam does not support dense gradients",
    ),
    (["model.optimizer=torch.optim.LBFGS"], "optimizer: LBFGS doesn't support per-parameter options"),
    (
        [
            *("model.optimizer=torch.optim.LBFGS", "trainer.accumulate_grad_batches=2", "model.objective=masked_lm"),
            "model.prompt_encoder=PromptTuning",
        ],
        "trainer.accumulate_grad_batches must be 1 with an optimizer that computes the loss of a step several times",
    ),
    ([f"model.{ONE_CYCLE}", "trainer.max_steps=4"], "at least the 4 steps of the run, got 3"),
    ([f"model.{ONE_CYCLE}", "model.warmup=1"], "at least the 5 steps of the run after warmup 1, got 3"),
]

# Right by type and number: what Lightning refuses when a Trainer is built.
REFUSED_BY_LIGHTNING: list[tuple[str, str]] = [
    ("trainer.accelerator", "junk"),
    ("trainer.devices", "-1"),
    ("trainer.devices", "junk"),
    ("trainer.devices", "[5]"),
    ("trainer.max_time", "junk"),
    ("trainer.profiler", "junk"),
    ("trainer.gradient_clip_algorithm", "junk"),
    ("trainer.strategy", "junk"),
]

NOT_YAML: list[tuple[bytes, str]] = [
    (b"", "must hold options by name, such as trainer: {max_epochs: 3}; got nothing"),
    (b"# nothing\n", "got nothing"),
    (b"- a\n- b\n", "must hold options by name, such as trainer: {max_epochs: 3}; got ['a', 'b']"),
    (b"7", "got 7"),
    (b"just text", "got 'just text'"),
    (b"trainer: {max_epochs: 3", "bad.yaml, line 2, column 1 is not YAML: did not find expected ',' or '}'"),
    (b"trainer: max_epochs: 3", "line 1, column 20 is not YAML: mapping values are not allowed in this context"),
    (b"\ttrainer: 3", "line 1, column 1 is not YAML"),
    (b"trainer: *nothing", "line 1, column 10 is not YAML: found undefined alias"),
    (b"a: 1\n---\nb: 2\n", "line 2, column 1 is not YAML: but found another document"),
    (b"? [1, 2]\n: 3\n", "line 1, column 3 is not YAML: found unhashable key"),
    (b"a: !!python/object/apply:os.system [id]", "is not YAML: could not determine a constructor for the tag"),
    (b"[" * 100_000, "is not YAML"),
    (b"\xff\xfe\x00\x01", "must be text in UTF-8, got 0xff at byte 0"),
    (b"\x00\x01\x02", "control characters are not allowed"),
    ("trainer: {max_epochs: 3}  # übt".encode("latin-1"), "must be text in UTF-8, got 0xfc at byte 28"),
    ("trainer: {max_epochs: 3}".encode("utf-16"), "must be text in UTF-8, got 0xff at byte 0"),
    (b"trainer: {max_epochs: 3}\ntrainer: {max_steps: 4}\n", "key 'trainer' stands twice, in lines 1 and 2"),
    (b"model:\n  init_args:\n    warmup: 1\n    warmup: 2\n", "key 'warmup' stands twice, in lines 3 and 4"),
    (b"&a\ntrainer: *a\n", "the anchor in line 1 holds itself"),
    (b"trainer: &a\n  callbacks: [*a]\n", "holds itself"),
    (
        b"a: &a [x, x, x, x, x, x, x, x, x]\n"
        + b"".join(b"%c: &%c [%s]\n" % (c, c, b", ".join([b"*%c" % (c - 1)] * 9)) for c in b"bcdefghij"),
        "aliases stand for more than 100000 values",
    ),
]

COMMAND_LINES: list[tuple[list[str], str]] = [
    ([], "test, predict, compare, sweep, plan, chat, export, doctor, serve, configs, got nothing"),
    (["fitt"], "predict, compare, sweep, plan, chat, export, doctor, serve, configs, got fitt. Did you mean fit?"),
    (["--junk"], "unknown option junk"),
    (["fit"], "give a configuration: --config TASK.yaml, such as configs/own_csv.yaml (lopa fit --help)"),
    (["test"], "(lopa test --help)"),
    (["plan"], "give a configuration"),
    (["compare"], "methods, tasks must be given"),
    (["sweep"], "configs, space must be given"),
    (["compare", "--workers=abc"], "workers must be a whole number or null, got abc"),
    (["compare", "--seed=1"], "unknown option seed. Did you mean seeds"),
    (["plan", "--devices=abc"], "argument --devices: must be a whole number of at least 1, got abc"),
    (["fit", "--config"], "give a configuration: --config TASK.yaml"),
    (["fit", "--config="], "--config must be a YAML file with options by name, got nothing"),
    (["fit", "--config=nowhere.yaml"], "nowhere.yaml"),
    (["fit", f"--config={CONFIGS}"], f"not a file: '{CONFIGS}'"),
    (["fit", "--config={trainer: {}, trainer: {}}"], "config: key 'trainer' stands twice, in lines 1 and 1"),
    *(
        (["fit", "--config", str(CONFIGS / overlay)], f"{overlay} is an overlay, to be put over a task: --config TASK")
        for overlay in ("methods/lora.yaml", "methods/idpg.yaml", "trainer/ddp.yaml", "cpu_small.yaml")
    ),
    (["fit", "--config", str(RTE), "--print_config=junk"], "--print_config must be alone or "),
    (["fit", "--config", str(CONFIGS / "methods" / "lora.yaml"), "--config", str(RTE)], "model must be given a class"),
]

MISSPELT: list[tuple[str, str]] = [
    ("lr=3", "unknown option lr. Did you mean model.optimizer.lr?"),
    ("rank=3", "unknown option rank. Did you mean model.prompt_encoder.rank?"),
    ("max_epochs=3", "unknown option max_epochs. Did you mean trainer.max_epochs?"),
    ("batch_size=3", "unknown option batch_size. Did you mean data.batch_size?"),
    ("trainer.lr=3", "unknown option trainer.lr. Did you mean model.optimizer.lr?"),
    ("model.rank=3", "unknown option rank. Did you mean model.prompt_encoder.rank?"),
    ("model.backbone=roberta-large", "backbone has options of its own, got roberta-large; say backbone.name"),
    ("data.labels=[a, b]", "unknown option labels\n"),
    ("model.start_token=true", "unknown option start_token\n"),
    ("batch_sise=3", "unknown option batch_sise. Did you mean data.batch_size or data.eval_batch_size"),
    ("model.backbone.nam=x", "unknown option backbone.nam. Did you mean backbone.name?"),
    ("model.lr_scheduler=torch.optim.lr_scheduler.StepLR", "step_size must be given"),
    ("model.learning_rates={head: 1, head: 2}", "key 'head' stands twice, in lines 1 and 1"),
]


@pytest.fixture(scope="module")
def arguments(tiny: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A task that is right, of tiny models and data; in one file, since each option more takes a time to read."""
    folder = tmp_path_factory.mktemp("glue")
    settings = yaml.safe_load(RTE.read_text())
    settings["model"]["init_args"]["backbone"]["name"] = tiny("roberta")
    settings["data"]["init_args"] |= {"path": write_mini_glue(folder), "max_length": 40}
    settings["trainer"]["accelerator"] = "cpu"
    (folder / "right.yaml").write_text(yaml.safe_dump(settings))
    return ["--config", str(folder / "right.yaml")]


@pytest.fixture(scope="module")
def built() -> dict[Any, LoPACLI]:
    return {}


@pytest.fixture(autouse=True)
def _nothing_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, built: dict[Any, LoPACLI]) -> None:
    """Weights are never read; and one parser serves all tests, since building it takes most of the time."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights are read")

    build = LoPACLI.setup_parser

    def setup_parser(self: LoPACLI, *args: Any) -> None:
        if self._asked_for not in built:
            build(self, *args)
            built[self._asked_for] = self
        kept = built[self._asked_for]
        self.parser, self._subcommand_parsers = kept.parser, kept._subcommand_parsers
        self._subcommand_method_arguments = kept._subcommand_method_arguments

    monkeypatch.setattr("lopa_lightning.modules.builder.load_model", fail)
    monkeypatch.setattr(LoPACLI, "setup_parser", setup_parser)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs a command line that must be refused, and returns its one line."""

    def run(*command: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as stop:
            main(list(command))
        captured = capsys.readouterr()
        assert stop.value.code in (1, 2)
        assert captured.err.startswith("error: ")
        assert captured.err.count("\n") == 1, captured.err
        assert len(captured.err) < 700
        assert not {"Union subtypes", "NestedArg", "<class", "Traceback"} & set(captured.err.split("'"))
        assert sorted(tmp_path.rglob("*")) == before
        return captured.err

    return run


def cases(table: dict[str, list[Any]]) -> list[Any]:
    return [pytest.param(option, value, id=f"{option}={value}") for option in table for value in table[option]]


@pytest.mark.sampled(25)
@pytest.mark.parametrize(("option", "value"), cases(WRONG_TYPE))
def test_a_value_of_the_wrong_type(option: str, value: str, arguments: list[str], refused: Refused) -> None:
    said = refused("fit", *arguments, f"--{option}={value}")
    assert option.split(".")[-1] in said or option.split(".")[-2] in said
    assert value.strip("[]{}").split(": ")[-1].split(", ")[0] in said
    assert " must be " in said or ": " in said.removeprefix("error: ") or "; say" in said


def test_what_is_right_passes(arguments: list[str]) -> None:
    right = {
        "trainer.max_epochs": [1, -1],
        "trainer.max_steps": [1, -1],
        "trainer.limit_train_batches": [1, 1.0, 0.1, 1000],
        "trainer.limit_val_batches": [0, 0.0, 1.0],
        "trainer.val_check_interval": [1, 1.0, 0.25, 50],
        "trainer.gradient_clip_val": [0, 0.5, 10],
        "trainer.num_sanity_val_steps": [-1, 0],
        "trainer.fast_dev_run": [0, 3],
        "seed_everything": [0, 2**32 - 1],
        "checkpoint.save_top_k": [-1, 0, 3],
        "model.optimizer.lr": [1e-9, 3],
    }
    settings = _parsed(arguments)
    for option, values in right.items():
        for value in values:
            changed = settings.clone()
            changed[_whole(option)] = value
            check_options(changed)


def _whole(option: str) -> str:
    return option.replace("model.optimizer.", "model.init_args.optimizer.init_args.")


@functools.cache
def _settings(arguments: tuple[str, ...]) -> Any:
    class Parsed(LoPACLI):
        def _set_seed(self) -> None:
            """Leaves the process's random state alone."""

        def before_instantiate_classes(self) -> None:
            raise StopIteration(self.config.fit)

    try:
        Parsed(args=["fit", *arguments])
    except StopIteration as stop:
        return stop.value


def _parsed(arguments: list[str]) -> Any:
    return _settings(tuple(arguments))


@pytest.mark.parametrize(("option", "value"), cases(OUT_OF_RANGE))
def test_a_number_out_of_range(option: str, value: float, arguments: list[str]) -> None:
    settings = _parsed(arguments).clone()
    settings[_whole(option)] = value
    with pytest.raises(LoPAError, match=rf"^{option} must be .*, got {value}$"):
        check_options(settings)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("options", "message"), REFUSED_WITH_DATA)
def test_what_the_data_shows_to_be_impossible(
    options: list[str],
    message: str,
    arguments: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    common = ["--data.batch_size=4", "--data.eval_batch_size=6", "--trainer.max_epochs=2", "--model.warmup=0"]
    if "lr_scheduler" in options[0]:  # which is seen after instance vectors have been computed
        common.append("--model.instance_encoder.cache=false")
    with pytest.raises(SystemExit) as stop:
        main(["fit", *arguments, *common, "--model.learning_rates={}", *(f"--{option}" for option in options)])
    assert stop.value.code == 1
    last_line = capsys.readouterr().err.rstrip("\n").rpartition("\n")[2]
    assert last_line.startswith("error: ")
    assert message in last_line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("option", "message"), [("config", "--config must be a regular file"), ("ckpt_path", "pipe")])
def test_what_is_no_regular_file(
    option: str, message: str, arguments: list[str], tmp_path: Path, refused: Refused
) -> None:
    os.mkfifo(tmp_path / "pipe")
    said = refused("fit", *arguments, f"--{option}=pipe")
    assert message in said
    assert "regular file" in said


@pytest.mark.parametrize("name", ["hpc", "registry:mine"])
def test_names_that_lightning_resolves_are_files_like_others(name: str, arguments: list[str], refused: Refused) -> None:
    assert f"no checkpoint at '{name}'" in refused("fit", *arguments, f"--ckpt_path={name}")


# Through the whole command line a part of them: it takes a third of a second, and the table is the same.
@pytest.mark.parametrize("option", ["trainer.max_epochs", "trainer.val_check_interval", *list(OUT_OF_RANGE)[-2:]])
def test_the_command_line_refuses_a_number_out_of_range(option: str, arguments: list[str], refused: Refused) -> None:
    said = refused("fit", *arguments, f"--{option}={OUT_OF_RANGE[option][0]}")
    assert f"error: {option} must be " in said


@pytest.mark.sampled(2)
@pytest.mark.parametrize("subcommand", ["validate", "test", "predict", "plan"])
def test_every_subcommand_refuses_it(subcommand: str, arguments: list[str], refused: Refused) -> None:
    assert "trainer.max_epochs must be at least 1" in refused(subcommand, *arguments, "--trainer.max_epochs=0")


def test_runs_of_a_comparison_or_sweep_are_refused_alike(arguments: list[str]) -> None:
    with pytest.raises(LoPAError, match=r"^trainer.max_steps must be at least 1, or -1 for no limit, got 0"):
        resolve([], [*arguments, "--trainer.max_steps=0"])
    with pytest.raises(LoPAError, match=r"^trainer.max_steps must be a whole number, got abc$"):
        resolve([], [*arguments, "--trainer.max_steps=abc"])


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("option", "value"), REFUSED_BY_LIGHTNING)
def test_what_lightning_refuses(option: str, value: str, arguments: list[str], refused: Refused) -> None:
    said = refused("fit", *arguments, f"--{option}={value}")
    assert value in said
    assert option.removeprefix("trainer.max_").removeprefix("trainer.") in said or "duration" in said


def test_a_run_without_checkpoints_and_logs_is_refused(arguments: list[str], refused: Refused) -> None:
    assert "`Trainer(barebones=True, logger=" in refused("fit", *arguments, "--trainer.barebones=true")


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ("fsdp", "strategy 'fsdp' is FSDP1"),
        ("deepspeed", "strategy 'deepspeed' shards the trained tensors"),
        ("ddp_spawn", "a strategy that spawns or forks processes loses what is trained in them; use strategy: ddp"),
    ],
)
def test_a_strategy_that_cannot_serve(strategy: str, message: str, arguments: list[str], refused: Refused) -> None:
    assert message in refused("fit", *arguments, f"--trainer.strategy={strategy}")


@pytest.mark.parametrize("name", ["WandbLogger", "CometLogger", "MLFlowLogger"])
def test_a_logger_that_is_not_installed(name: str, arguments: list[str], refused: Refused) -> None:
    package = {"WandbLogger": "wandb", "CometLogger": "comet", "MLFlowLogger": "mlflow"}
    said = refused("fit", *arguments, f"--trainer.logger={LOGGERS}.{name}")
    assert package[name] in said


@pytest.mark.parametrize(("content", "message"), NOT_YAML)
def test_a_file_that_is_no_configuration(
    content: bytes, message: str, arguments: list[str], tmp_path: Path, refused: Refused
) -> None:
    (tmp_path / "bad.yaml").write_bytes(content)
    said = refused("fit", *arguments, "--config", "bad.yaml")
    assert "error: bad.yaml" in said
    assert message in said


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("trainer: {precision: fp16}", "trainer.precision must be one of 64, 32, 16"),
        ("model: {init_args: {optimizer: {init_args: {lr: abc}}}}", "lr must be a number, got abc"),
        ("model: {init_args: {backbone: {name: 3}}}", "backbone.name must be a text, got 3"),
        ("model: {init_args: {rnak: 3}}", "unknown option rnak"),
    ],
)
def test_a_file_with_a_wrong_value_is_named(
    content: str, message: str, arguments: list[str], tmp_path: Path, refused: Refused
) -> None:
    (tmp_path / "mine.yaml").write_text(content)
    said = refused("fit", *arguments, "--config", "mine.yaml")
    assert said.startswith(f"error: {message}")
    assert said.endswith(" (in mine.yaml)\n")


@pytest.mark.parametrize(("command", "message"), COMMAND_LINES)
def test_a_command_line_that_lacks_something(command: list[str], message: str, refused: Refused) -> None:
    assert message in refused(*command)


@pytest.mark.parametrize(("option", "message"), MISSPELT)
def test_an_option_in_the_wrong_place(option: str, message: str, arguments: list[str], refused: Refused) -> None:
    assert message in refused("fit", *arguments, f"--{option}")


def test_a_program_of_ones_own_gets_the_line_too(arguments: list[str]) -> None:
    with pytest.raises(UsageError, match=r"^trainer.max_epochs must be a whole number or null, got abc$"):
        LoPACLI(args=["fit", *arguments, "--trainer.max_epochs=abc"])


def groups(count: int) -> dict[str, list[torch.nn.Parameter]]:
    return {str(number): [torch.nn.Parameter(torch.zeros(5, 7))] for number in range(count)}


@pytest.mark.parametrize(
    ("optimizer", "scheduler", "message"),
    [
        (functools.partial(AdamW, lr=-1.0), None, "optimizer: Invalid learning rate: -1.0"),
        (functools.partial(AdamW, betas=(1.5, 0.9)), None, "optimizer: Invalid beta parameter at index 0: 1.5"),
        (functools.partial(AdamW, eps=-1.0), None, "optimizer: Invalid epsilon value: -1.0"),
        (torch.optim.SparseAdam, None, "optimizer: RuntimeError: SparseAdam does not support dense gradients"),
        (functools.partial(SGD, momentum=-1), None, "optimizer: Invalid momentum value: -1"),
        (AdamW, functools.partial(StepLR, step_size=0), "lr_scheduler: ZeroDivisionError"),
        (
            AdamW,
            functools.partial(OneCycleLR, max_lr=0.1, total_steps=-4),
            "lr_scheduler: Expected positive",
        ),
        (AdamW, functools.partial(ReduceLROnPlateau, factor=2.0), "lr_scheduler: Factor should be < 1.0"),
    ],
)
def test_an_optimizer_or_scheduler_that_refuses(optimizer: Any, scheduler: Any, message: str) -> None:
    with pytest.raises(LoPAError) as refused:
        dry_run(groups(1), optimizer, scheduler)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    "scheduler",
    [
        None,
        functools.partial(StepLR, step_size=1),
        functools.partial(ReduceLROnPlateau, patience=0),
    ],
)
@pytest.mark.parametrize("optimizer", [AdamW, SGD, torch.optim.Adafactor, torch.optim.LBFGS, torch.optim.Muon])
def test_an_optimizer_that_is_right(optimizer: Any, scheduler: Any) -> None:
    dry_run(groups(1), optimizer, scheduler)


def test_an_optimizer_is_tried_on_the_device_of_the_run() -> None:
    # Some, such as those in 8 bits, have no step on a CPU.
    tried = dry_run(groups(2), SGD, device=torch.device("meta"))
    assert {p.device.type for parameters in tried.parameters.values() for p in parameters} == {"meta"}


def test_a_scheduler_may_have_a_value_for_each_group() -> None:
    dry_run(groups(3), AdamW, functools.partial(OneCycleLR, max_lr=[0.1, 0.2, 0.3], total_steps=10))


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["model.optimizer.init_args.betas=[1.5, 0.9]"], "optimizer: Invalid beta parameter at index 0: 1.5"),
        ([f"model.lr_scheduler={{class_path: {SCHEDULERS}.StepLR, init_args: {{step_size: 0}}}}"], "ZeroDivisionError"),
        (["model.learning_rates={head: .nan}"], "learning_rates must be at least 0 and finite, got {'head': nan}"),
        (["model.warmup=.inf"], "warmup must be a number of steps, or a share of the run below 1; got inf"),
        (["model.warmup=-1"], "got -1"),
        (["data.num_workers=-1"], "num_workers must be at least 0, got -1"),
        (["data.max_length=0"], "max_length must be at least 1, got 0"),
        (["checkpoint.monitor=val/nothing"], "got 'val/nothing'"),
    ],
)
def test_what_the_module_or_the_data_refuses(
    options: list[str], message: str, arguments: list[str], refused: Refused
) -> None:
    assert message in refused("fit", *arguments, *(f"--{option}" for option in options))


@pytest.mark.parametrize(
    ("warmup", "steps", "fast", "warns"),
    [
        (10**9, 100, False, True),
        (100, 100, False, True),
        (99, 100, False, False),
        (0.5, 100, False, False),
        (10, float("inf"), False, False),
        (100, 1, True, False),
    ],
)
def test_a_warmup_longer_than_the_run(
    warmup: float, steps: float, fast: bool, warns: bool, recwarn: pytest.WarningsRecorder
) -> None:
    trainer: Any = SimpleNamespace(fast_dev_run=fast, estimated_stepping_batches=steps)
    warn_of_warmup(warmup, trainer)
    said = [str(warning.message) for warning in recwarn]
    expected = f"warmup {warmup:g} is not less than the 100 steps of the run: learning rates do not reach their value"
    assert said == ([expected] if warns else [])


def test_a_warmup_as_long_as_max_steps_is_refused(arguments: list[str]) -> None:
    settings = _parsed(arguments).clone()
    settings["trainer.max_steps"], settings["model.init_args.warmup"] = 50, 50.0
    with pytest.raises(LoPAError, match=r"^model.warmup must be less than trainer.max_steps, 50, got 50$"):
        check_options(settings)
    settings["model.init_args.warmup"] = 49.0
    check_options(settings)


def test_rates_of_an_optimizer_by_group_are_checked(arguments: list[str]) -> None:
    sgd = "{class_path: torch.optim.SGD, init_args: {lr: 0.0}}"
    with pytest.raises(LoPAError, match=r"^model.optimizers.head.lr must be above 0, and finite .*, got 0.0$"):
        _parsed([*arguments, f"--model.optimizers={{head: {sgd}}}"])


def test_a_home_folder_is_written_out(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert f"no checkpoint at '{tmp_path}/mine.ckpt'" in refused("fit", *arguments, "--ckpt_path=~/mine.ckpt")
    paths = ["trainer.default_root_dir", "trainer.logger.save_dir", "checkpoint.dirpath", "predictions.folder"]
    settings = Resolver(
        args=["fit", *arguments, *(f"--{path}=~/{path}" for path in paths), "--data.path=~/glue"]
    ).config_dump
    found = [settings["trainer"]["default_root_dir"], settings["trainer"]["logger"]["init_args"]["save_dir"]]
    found += [settings["checkpoint"]["dirpath"], settings["predictions"]["folder"]]
    assert found == [f"{tmp_path}/{path}" for path in paths]
    assert settings["data"]["init_args"]["path"] == f"{tmp_path}/glue"

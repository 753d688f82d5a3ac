"""Checks a run as it starts: its folders, that it has learned what it answers, and what padding does to it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torchmetrics import MetricCollection

from lopa_lightning import checkpoint as ckpt
from lopa_lightning.backbones.pretrained import in_eval_mode
from lopa_lightning.backbones.sharding import gathered
from lopa_lightning.backbones.text import TextBackbone
from lopa_lightning.callbacks import PredictionWriter, RunLogger
from lopa_lightning.errors import LoPAError
from lopa_lightning.files import check_writable
from lopa_lightning.instances.encoder import InstanceEncoderSpec
from lopa_lightning.modules.builder import SOURCE, Builder
from lopa_lightning.modules.checkpoint_loading import check_trained
from lopa_lightning.modules.dry_run import check_optimization
from lopa_lightning.modules.monitors import check_monitors
from lopa_lightning.modules.resume_check import check_restored
from lopa_lightning.modules.schedule import check_cosine, check_warmup
from lopa_lightning.prompts.base import UniformTokens
from lopa_lightning.strategies import check_strategy
from lopa_lightning.task import Side

if TYPE_CHECKING:
    from lopa_lightning.modules.base import LoPALightningModule


def check_before_weights(module: LoPALightningModule, stage: str) -> None:
    """Checks all of a run that needs no weights.

    Args:
        module: With its task and its Trainer.
        stage: ``fit``, ``validate``, ``test`` or ``predict``.

    Raises:
        LoPAError: If input and models do not go together, a learning rate or an optimizer names no group, a metric is
            unknown or a monitored one not logged, the optimizer or the scheduler refuses, the strategy or a callback
            cannot serve, nothing is trained or learned, a folder cannot be written to, or a checkpoint does not fit.
    """
    module.input_spec  # noqa: B018 - raises where input and models do not fit
    own = module.builder.skeleton.prompt_encoder.parameter_groups()
    groups = {*own, "head", "instance_readout", "instance_encoder", "backbone"}
    for option, given in (("learning_rates", module.learning_rates), ("optimizers", module.group_optimizers)):
        if unknown := sorted(set(given) - groups):
            raise LoPAError(f"{option} names {', '.join(unknown)}; the groups are {', '.join(sorted(groups))}")
    module.builder.check()
    check_warmup(module.warmup, module.trainer)
    check_strategy(module.trainer.strategy)
    trainer: Any = module.trainer
    if any(isinstance(callback, WeightAveraging | StochasticWeightAveraging) for callback in trainer.callbacks):
        raise LoPAError(
            "WeightAveraging and EMAWeightAveraging write checkpoints that cannot be loaded here, and "
            "StochasticWeightAveraging averages a copy that has no weights yet; leave them out"
        )
    if stage == "fit" and not module.is_trainable():
        raise LoPAError("nothing is trained: choose a prompt encoder, objective: head, adapter or train_backbone")
    if stage == "fit":
        check_init(module.builder)
        check_encoder(module)
        check_groups(module)
        if str(trainer.precision).endswith("16-true"):
            rank_zero_warn(
                f"precision {trainer.precision} rounds what is trained after each step: small changes are lost; "
                "backbone.dtype: bfloat16 with precision 32-true or bf16-mixed saves as much memory without that"
            )
    if stage in ("test", "predict") and not module.awaits_checkpoint:
        check_learned(module, stage)
    check_folders(module.trainer, stage)
    built = dict((module.configure_metrics() or MetricCollection([])).items())
    if stage == "fit":
        scheduler = check_optimization(module)
        check_cosine(scheduler, trainer)
        keys = ["loss", "score", *built, *module.more_logged()]
        second = ["train/instance_loss"] if module.instance_loss else []
        logged = ["train/loss", *second, *(f"val{suffix}/{key}" for suffix in module.eval_suffixes for key in keys)]
        check_monitors(module, scheduler, logged, built)
    if (saved := module.will_load) is not None:
        ckpt.check_identity(saved[ckpt.IDENTITY_KEY], module.known_identity(), weights=False)
        check_trained(saved, module)
        check_restored(saved, module, stage)
        module.will_load = None  # its tensors need not stay in memory


def check_init(builder: Builder) -> None:
    """Refuses initial values of words where the backbone reads none, as one of images does.

    Args:
        builder: Of the module that is to be trained.

    Raises:
        LoPAError: If there are no words.
    """
    backbone = builder.skeleton.backbone
    drawn = None if getattr(backbone, "tokenizer", None) is not None else backbone.vocabulary()
    if isinstance(drawn, UniformTokens):
        builder.skeleton.prompt_encoder.initialize(drawn)


def check_encoder(module: LoPALightningModule) -> None:
    """Refuses options of an instance encoder that is the backbone and loads as that says, and warns of unused ones.

    Args:
        module: That is to be trained; a run that goes on is as it began.

    Raises:
        LoPAError: If an option on how to load the instance encoder is another than the backbone's.
    """
    builder = module.builder
    if module.will_load is not None:
        return
    encoder, backbone, method = builder.instance_encoder, builder.backbone, builder.skeleton.prompt_encoder
    if not method.uses_instance:
        if idle := [name for name in ("adapter", "trainable", "dropout", "control") if getattr(encoder, name)]:
            unread = f"instance_encoder.{idle[0]} has no effect"
            rank_zero_warn(f"{unread}: {type(method).__name__} makes a soft prompt without an instance")
        return
    builder.kind.check_instance(builder.skeleton.backbone, builder.encoder_spec)
    lost = [name for name in ("quantization", "gradient_checkpointing") if getattr(backbone, name)]
    if builder.encoder_spec is not encoder and lost:
        rank_zero_warn(f"the instance encoder is a copy of the backbone, and without its {' and '.join(lost)}")
    for name in SOURCE[1:] if encoder.is_backbone else ():
        given, has = getattr(encoder, name), getattr(backbone, name)
        if given not in (getattr(InstanceEncoderSpec(), name), has):
            raise LoPAError(
                f"instance_encoder.{name} {given} is for a model of its own, and name: backbone is loaded by "
                f"backbone.{name} {has}; leave it out, or give the encoder the backbone's name or folder"
            )


def check_groups(module: LoPALightningModule) -> None:
    """Checks that all that has a gradient is trained, and comes back from a checkpoint.

    Args:
        module: With its task; no weights are needed.

    Raises:
        LoPAError: If a parameter is in no group, or is none of those that a checkpoint brings back.
    """
    grouped = {id(each) for group in module.shapes.parameter_groups().values() for each in group}
    built = {name: each for name, each in module.shapes.named_parameters(prefix="net") if each.requires_grad}
    named = [*built, *(name for name, each in module.named_parameters() if each.requires_grad and name not in built)]
    if lost := [name for name in named if name not in built or id(built[name]) not in grouped]:
        raise LoPAError(
            f"{ckpt.joined(lost)} would not be trained and saved: parameter_groups of a prompt encoder "
            "must name each of its parameters, and those of a task belong in its read-out (configure_readout)"
        )
    own = {"prompt_encoder", "readout", "instance_readout"}
    kept = [f"net.{name}" for name in module.shapes.state_dict() if name.partition(".")[0] in own]
    if lost := [name for name in kept if name not in built]:
        raise LoPAError(
            f"{ckpt.joined(lost)} would not be saved: a checkpoint has what is trained by a gradient alone. Make what "
            "else a prompt encoder or a read-out has from its arguments, as buffers with persistent=False"
        )


def check_folders(trainer: Any, stage: str) -> None:
    """Checks that the folders of a run can be written to.

    Args:
        trainer: Of the run. One process may be alone in calling this: nothing is sent to others.
        stage: ``fit``, ``validate``, ``test`` or ``predict``.

    Raises:
        LoPAError: If one cannot.
    """
    if not trainer.is_global_zero:
        return
    logged = [each.folder if isinstance(each, RunLogger) else each.save_dir for each in trainer.loggers]
    given = {"trainer.logger.save_dir": logged}
    elsewhere = None if any(logged) else trainer.default_root_dir
    if stage == "fit" and not trainer.fast_dev_run:
        kept = [each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)]
        given["dirpath"] = [each.dirpath or elsewhere for each in kept]
    elif stage in ("test", "predict"):
        writers = [each for each in trainer.callbacks if isinstance(each, PredictionWriter)]
        given["predictions.folder"] = [each.folder or elsewhere for each in writers]
    for name, folders in given.items():
        for folder in sorted({str(each) for each in folders if each}):
            if "://" not in folder:
                check_writable(Path(folder), name)


def check_with_weights(module: LoPALightningModule) -> None:
    """Checks a run's answers once weights and checkpoint are there and the model is on its device.

    Args:
        module: On every process.

    Raises:
        LoPAError: If it would answer from initial values, or virtual tokens and padding do not go together here.
    """
    if module.trainer.state.fn is not None:
        check_learned(module, module.trainer.state.fn.value)
    side: Side = "right" if module.data is None else module.data.padding_side
    check_states(module, {side, *module.padding_sides()})


def warn_of_rounding(module: LoPALightningModule) -> None:
    """Warns of pretrained weights that are trained in fewer bits than an optimizer's steps need.

    Args:
        module: With weights.
    """
    if str(module.trainer.precision).endswith("16-true"):  # said before weights are loaded
        return
    groups = module._net().parameter_groups()
    of_encoder = "backbone" if module.builder.instance_encoder.is_backbone else "instance_encoder"
    for name, owner in (("backbone", "backbone"), ("instance_encoder", of_encoder)):
        dtypes = {str(each.dtype).removeprefix("torch.") for each in groups.get(name, [])}
        for dtype in sorted(dtypes & {"bfloat16", "float16"}):
            rank_zero_warn(
                f"{name} is trained in {dtype}, which rounds it after each step: small changes are lost; "
                f"{owner}.dtype: float32 keeps them"
            )


def check_learned(module: LoPALightningModule, stage: str) -> None:
    """Refuses answers from initial values, and warns of a validation of them.

    Args:
        module: With its task; no weights are needed.
        stage: What is about to run, ``fit`` or one that answers.

    Raises:
        LoPAError: If something is to be trained, and was neither trained nor loaded.
    """
    if stage == "fit" or module.learned or not module.is_trainable():
        return
    if stage != "validate":
        raise LoPAError(
            f"nothing was trained or loaded, so {stage} would answer from initial values: name a checkpoint "
            "(--ckpt_path FILE, best or last; load_from_checkpoint in Python; after a training loop of your own set "
            "module.learned = True), or choose NoPrompt for the backbone without any"
        )
    rank_zero_warn("nothing was trained or loaded: this validates initial values; --ckpt_path names a checkpoint")


@contextlib.contextmanager
def answering(module: LoPALightningModule, what: str, sides: set[Side]) -> Iterator[None]:
    """Loads a module if it is not loaded, and keeps it in eval mode while it answers outside of a Trainer.

    Args:
        module: Of which something is asked.
        what: What it is, for messages.
        sides: Where its inputs are padded.

    Raises:
        LoPAError: If it would answer from initial values, or virtual tokens and padding do not go together here.
    """
    if module._trainer is None or module._trainer.state.fn != TrainerFn.FITTING:
        check_learned(module, what)
    module.configure_model()
    check_states(module, sides)
    with in_eval_mode(module):
        yield


def check_states(module: LoPALightningModule, sides: set[Side]) -> None:
    """Checks once for each side that padding leaves an input's hidden states alone.

    Args:
        module: With weights, on every process.
        sides: Where inputs are padded.

    Raises:
        LoPAError: If virtual tokens and padding do not go together here.
    """
    net = module._net()
    with gathered(net):  # and sharded again: a checkpoint may be loaded next
        net.run(lambda: net.backbone.check_padding(net.prompt_encoder.num_virtual_tokens, sides))
        if module.objective == "causal_lm" and isinstance(net.backbone, TextBackbone):
            net.run(net.backbone.check_causal)

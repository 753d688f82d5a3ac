"""What is checked as a run starts: its folders, that it has learned what it answers, and what padding does to it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn

from lopa_lightning.backbones.padding import Side
from lopa_lightning.backbones.sharding import gathered
from lopa_lightning.callbacks import PredictionWriter, RunLogger
from lopa_lightning.errors import LoPAError
from lopa_lightning.files import check_writable

if TYPE_CHECKING:
    from lopa_lightning.modules.base import LoPALightningModule


def check_before_weights(module: LoPALightningModule, stage: str) -> None:
    """Checks that a run can write its files and has something to train or, without a checkpoint, to answer from.

    Args:
        module: With its task.
        stage: ``fit``, ``validate``, ``test`` or ``predict``.

    Raises:
        LoPAError: If not.
    """
    if stage == "fit" and not module.is_trainable():
        raise LoPAError("nothing is trained: choose a prompt encoder, objective: head, adapter or train_backbone")
    if stage in ("test", "predict") and not module.awaits_checkpoint:
        check_learned(module, stage)
    check_folders(module.trainer, stage)


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


def check_learned(module: LoPALightningModule, stage: str) -> None:
    """Refuses answers from initial values. To validate these is a figure to compare with, and is warned of.

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
            "(--ckpt_path FILE, best or last; load_from_checkpoint in Python), or choose NoPrompt for the backbone "
            "as it comes"
        )
    rank_zero_warn("nothing was trained or loaded: this validates initial values; --ckpt_path names a checkpoint")


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

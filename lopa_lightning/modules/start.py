"""What is checked of a module as a run starts: that it has learned what it answers, and what padding does to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning.pytorch.utilities import rank_zero_warn

from lopa_lightning.backbones.padding import Side, check_padding
from lopa_lightning.backbones.sharding import gathered
from lopa_lightning.errors import LoPAError

if TYPE_CHECKING:
    from lopa_lightning.modules.base import LoPALightningModule


def check_before_weights(module: LoPALightningModule, stage: str) -> None:
    """Checks that a run has something to train or, where no checkpoint is to come, something to answer from.

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


def check_with_weights(module: LoPALightningModule) -> None:
    """Checks a run's answers once weights and checkpoint are there and the model is on its device.

    Args:
        module: On every process.

    Raises:
        LoPAError: If it would answer from initial values, or virtual tokens and padding do not go together here.
    """
    if module.trainer.state.fn is not None:
        check_learned(module, module.trainer.state.fn.value)
    side: Side = getattr(getattr(module.trainer, "datamodule", None), "padding_side", "right")
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
    """Checks once for each side that padding leaves a text's hidden states alone.

    Args:
        module: With weights, on every process.
        sides: Where texts are padded.

    Raises:
        LoPAError: If virtual tokens and padding do not go together here.
    """
    net, pad_id = module._net(), module.tokenizer.pad_token_id or 0
    new = sorted(sides - module.checked_sides)
    module.checked_sides |= sides

    def check() -> None:
        for side in new:
            check_padding(net.backbone, net.prompt_encoder.num_virtual_tokens, side, pad_id)

    if new:
        with gathered(net):  # and sharded again: a checkpoint may be loaded next
            net.run(check)

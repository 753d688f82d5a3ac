"""Lists what a task defines, in methods that a subclass of the module overrides."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from torchmetrics import MetricCollection

from lopa_lightning.backbones.base import Backbone, Batch, InputKind, Objective
from lopa_lightning.backbones.pretrained import PretrainedSpec
from lopa_lightning.backbones.text_spec import TextKind
from lopa_lightning.modules.readouts import Readout
from lopa_lightning.task import Side


class TaskHooks(ABC):
    """Lists what ``LoPALightningModule`` asks of a task, which must define two of the methods."""

    short_name: ClassVar[str | None] = None
    """What checkpoints call the class, which may then be moved and renamed; None for the path that it is imported from.
    Of the class itself: a subclass does not inherit it."""

    objective: Objective = "head"
    """How an answer is read from the backbone; decides which head it is loaded with."""

    eval_suffixes: tuple[str, ...] = ("",)
    """Name suffix of each evaluation set."""

    def input_kind(self, backbone: PretrainedSpec) -> InputKind:
        """Says what is read: text, unless a subclass has another kind of input.

        Args:
            backbone: Where the backbone comes from.
        """
        return TextKind(backbone, self.objective)

    @abstractmethod
    def configure_readout(self, backbone: Backbone) -> Readout:
        """Builds what reads outputs from the backbone's hidden states.

        Args:
            backbone: The backbone, for its sizes. It is on the meta device where weights are not read yet.
        """

    instance_loss: float = 0.0
    """Weight, beside the loss of the answers, of the loss of what is read from instance vectors."""

    def configure_instance_readout(self, instance_dim: int, backbone: Backbone) -> nn.Module | None:
        """Builds what reads outputs from instance vectors, where ``instance_loss`` is above 0; None for none.

        It is for training alone: it is saved, and not exported.

        Args:
            instance_dim: Width e of an instance vector.
            backbone: The backbone, as in :meth:`configure_readout`.
        """
        return None

    @abstractmethod
    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Computes the loss, in training and in evaluation.

        Args:
            outputs: The read-out's, ``[B, ...]``.
            batch: With ``labels``.

        Returns:
            A scalar, the mean over the batch.
        """

    def padding_sides(self) -> set[Side]:
        """Returns where inputs are padded that the task makes itself, beside the data module's batches."""
        return set()

    def loss_weight(self, outputs: Tensor, batch: Batch) -> Tensor | int:
        """Returns of how many things a batch's loss is the mean.

        The batches of an evaluation set, and those of an optimizer step, count as one large batch by it.

        Args:
            outputs: The read-out's, ``[B, ...]``.
            batch: The batch.
        """
        return len(batch["index"])

    def configure_metrics(self) -> MetricCollection | None:
        """Builds the metrics of one evaluation set; None to report the loss alone."""
        return None

    def more_logged(self) -> list[str]:
        """Returns names that a validation logs beside ``loss``, ``score`` and the metrics."""
        return []

    def official_metrics(self) -> list[str]:
        """Returns the metrics whose mean is logged as ``score``, the figure to choose a checkpoint by.

        If there are none, the score is the negative loss.
        """
        return []

    def predictions(self, outputs: Tensor) -> Tensor:
        """Returns what metrics compare with the labels.

        Args:
            outputs: The read-out's, ``[B, ...]``.
        """
        return outputs

    def prediction_rows(self, predicted: dict[str, Tensor]) -> list[dict[str, Any]]:
        """Returns a record for each example of what ``predict`` returned for a batch, as it is written to a file.

        Args:
            predicted: ``index`` and what :meth:`predict_outputs` gave.
        """
        return [dict(zip(predicted, values)) for values in zip(*(value.tolist() for value in predicted.values()))]

    def prediction_identity(self) -> dict[str, Any] | None:
        """Returns what predictions depend on, as plain data, where they are worth writing one batch at a time.

        A run that was interrupted then goes on where it stopped: what is there is put into the module's
        ``written``. None to write them all at the end.
        """
        return None

    def scoring_identity(self) -> dict[str, Any] | None:
        """Returns the same for what a test scores and writes: the ``results`` that ``test_step`` returns.

        With ``results_per_row``, where a row has several.
        """
        return None

    def predict_outputs(self, outputs: Tensor) -> dict[str, Tensor]:
        """Returns what ``predict`` gives for a batch, beside ``index``.

        Args:
            outputs: The read-out's, ``[B, ...]``.
        """
        return {"outputs": outputs}

    def task_identity(self) -> dict[str, Any]:
        """Returns what a checkpoint of this task must agree in, as plain data.

        An entry that is added later is left out where it is as it always was, or older checkpoints would not fit.
        """
        return {}

    def restore(self, hparams: Mapping[str, Any]) -> None:  # noqa: B027 - most tasks know all when they are made
        """Takes from a checkpoint's hyperparameters what was not known when the module was made.

        Args:
            hparams: The checkpoint's, plain data.
        """

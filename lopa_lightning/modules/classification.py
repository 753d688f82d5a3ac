"""Classifies texts, or predicts a number for each, by a language model's own words or a trained head."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, get_args

from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MetricCollection
from transformers import PreTrainedTokenizerBase

from lopa_lightning import checkpoint as ckpt
from lopa_lightning.backbones.base import Backbone, Batch, Objective
from lopa_lightning.backbones.text import TextBackbone
from lopa_lightning.backbones.text_spec import TextKind, TextSpec
from lopa_lightning.backbones.tokens import label_word_ids
from lopa_lightning.data.word_rows import words_of
from lopa_lightning.errors import LoPAError, at_least, one_of
from lopa_lightning.instances.encoder import Pooling
from lopa_lightning.metrics.classification import build_metrics
from lopa_lightning.modules.base import LoPALightningModule
from lopa_lightning.modules.predict import records, row_batches, row_encoder
from lopa_lightning.modules.readouts import (
    HeadReadout,
    LabelWordReadout,
    Readout,
    WordReadout,
    linear_head,
    set_to_words,
)
from lopa_lightning.modules.start import answering
from lopa_lightning.plain import built, plain
from lopa_lightning.task import IGNORED, Task, Verbalizer

LossOver = Literal["labels", "vocabulary"]


class ClassificationModule(LoPALightningModule):
    """Assigns a label (or, for regression, a number) to every text.

    Args:
        objective: ``masked_lm``: the label words' logits at the template's mask, the published setting;
            ``causal_lm``: the same at the last position, of the text or of virtual tokens after it;
            ``head``: a trained linear layer, for backbones without a language model head, and for regression.
        head_pooling: What the trained head reads, over the text's own tokens; with placement ``after`` over the virtual
            ones, which alone have seen both.
        task: Labels, words and metrics; None to take the data module's.
        loss_over: What the cross entropy of a label's word is taken over: the words of all ``labels``, or the whole
            ``vocabulary``, as in the paper's released code. What is predicted is a label in either case.
        instance_loss: Weight of a second loss in training: that of a linear layer which reads the label from the
            instance vector. A trained or adapted instance encoder learns the labels from it directly, and not by way of
            the soft prompt alone. The layer is in checkpoints, and not in what is exported. It begins small, or as the
            label words' rows of the head where a causal backbone's copy gives its last token's state.
        **kwargs: See :class:`~lopa_lightning.modules.base.LoPALightningModule`.

    Raises:
        LoPAError: If ``objective``, ``head_pooling`` or ``loss_over`` is unknown, a head is to have a loss over the
            vocabulary, or ``instance_loss`` is negative or goes with a frozen instance encoder.
    """

    short_name = "classification"

    head_poolings: ClassVar[tuple[str, ...]] = get_args(Pooling)
    """What ``head_pooling`` may be."""

    def __init__(
        self,
        objective: Objective = "masked_lm",
        head_pooling: Pooling = "mean",
        task: Task | None = None,
        loss_over: LossOver = "labels",
        instance_loss: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        one_of("objective", objective, get_args(Objective))
        one_of("loss_over", loss_over, get_args(LossOver))
        if loss_over == "vocabulary" and objective == "head":
            raise LoPAError("loss_over: vocabulary needs objective: masked_lm or causal_lm; a head has no vocabulary")
        one_of("head_pooling", head_pooling, self.head_poolings)
        if not 0 <= instance_loss < float("inf"):
            raise LoPAError(f"instance_loss must be at least 0 and finite, got {instance_loss}")
        if instance_loss and not self.instance_spec.is_trained:
            raise LoPAError("instance_loss teaches the instance encoder: it needs its trainable: true or its adapter")
        if instance_loss and loss_over == "vocabulary":
            raise LoPAError("instance_loss needs loss_over: labels; an instance vector has no vocabulary")
        self.objective = objective
        self.loss_over = loss_over
        self.instance_loss = instance_loss
        self.head_pooling: str = head_pooling
        self._set_task(task)

    def _set_task(self, task: Task | None) -> None:
        self.task = task
        self.eval_suffixes = tuple(task.suffixes) if task is not None else ("",)
        self.hparams["task"] = plain(task)

    def restore(self, hparams: Mapping[str, Any]) -> None:
        """Takes the task that the data module brought to the saved module."""
        if self.task is None:
            self._set_task(built(hparams.get("task"), Task | None, "task"))

    def required_task(self) -> Task:
        """Returns the task.

        Raises:
            LoPAError: If there is none yet.
        """
        if self.task is None:
            raise LoPAError("ClassificationModule needs a task: give one, or use a data module that has one")
        return self.task

    def setup(self, stage: str) -> None:
        """Takes the task from the data module and checks it, before weights are loaded.

        Raises:
            LoPAError: If there is no task, the data's labels are others than the module's, or the
                objective or the precision cannot serve the task.
        """
        data_task = None if self.data is None else self.data.task
        if self.task is None:
            self._set_task(data_task)
        super().setup(stage)
        task = self.required_task()
        if data_task is not None:
            if stage == "fit":
                task = _cut_as(task, data_task)
                self._set_task(task)
            lines = ckpt.differences(self._reading(task), self._reading(data_task), between=("the model", "the data"))
            if lines:
                raise LoPAError("the data's task is not the model's:\n  " + "\n  ".join(lines))
        if self.instance_loss and not self.builder.skeleton.prompt_encoder.uses_instance:
            raise LoPAError("instance_loss needs a prompt encoder that reads an instance vector, such as LoPA")
        if task.is_regression and stage != "predict" and str(self.trainer.precision).endswith("16-true"):
            raise LoPAError(
                f"precision {self.trainer.precision} rounds the numbers to be learned; backbone.dtype: bfloat16 with "
                "precision 32-true or bf16-mixed does not"
            )
        if task.per_word:
            self._check_answer_per_word()
        elif self.objective != "head":
            self._check_words(task)

    def _check_answer_per_word(self) -> None:
        if self.objective != "head" or self.head_pooling != "mean":
            raise LoPAError("a label for each word needs objective: head, and no head_pooling: each is read by itself")
        if self.placement == "after":
            raise LoPAError("a label for each word needs a soft prompt that the words see, and placement is 'after'")
        self._check_instance_loss()

    def _check_instance_loss(self) -> None:
        if self.instance_loss and self.required_task().per_word:
            raise LoPAError("instance_loss needs one answer for a text, and here each word has a label")

    def _check_words(self, task: Task) -> None:
        if task.is_regression:
            raise LoPAError(f"objective {self.objective!r} answers with words; regression needs objective: head")
        if task.words is None:
            raise LoPAError(f"objective {self.objective!r} needs label words, one for each of {task.labels}")
        self.word_ids(task.words)

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        kind = self.builder.kind
        if not isinstance(kind, TextKind):
            raise LoPAError(f"objective {self.objective!r} answers with words; this input needs objective: head")
        return kind.tokenizer

    def word_ids(self, words: list[str]) -> list[int]:
        """Returns the backbone's token of each label word: in running text, or at the start of a chat's answer."""
        spec = self.input_spec
        chat = spec.chat if isinstance(spec, TextSpec) and spec.chat.holds_prompt else None
        return label_word_ids(self._tokenizer(), words, None if chat is None else chat.answer_start)

    def configure_readout(self, backbone: Backbone) -> Readout:
        """Builds what reads label words at the mask or at the end, or a trained head."""
        task = self.required_task()
        if task.per_word:
            return WordReadout(backbone.hidden_dim, task.num_outputs)
        if self.objective == "head":
            return HeadReadout(backbone.hidden_dim, task.num_outputs, self.head_pooling)
        mask_id = self._tokenizer().mask_token_id if self.objective == "masked_lm" else None
        return LabelWordReadout(self.word_ids(task.words or []), mask_id, self.loss_over == "vocabulary")

    def configure_instance_readout(self, instance_dim: int, backbone: Backbone) -> nn.Module | None:
        """Builds a linear layer, with small initial values.

        Where words answer, and a causal backbone's copy that gives its last token's state is the encoder, it begins as
        those words' rows of the backbone's head. If that token is where the answer would follow, its first answers are
        the copy's own.

        Raises:
            LoPAError: If each word has a label.
        """
        self._check_instance_loss()
        task, encoder = self.required_task(), self.instance_spec
        layer = linear_head(instance_dim, task.num_outputs)
        if task.words and self.objective == "causal_lm" and encoder.is_backbone and encoder.pooling == "last":
            assert isinstance(backbone, TextBackbone)
            set_to_words(layer, backbone, self.word_ids(task.words))
        return layer

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Returns the cross entropy of the label, or on average of several labels; of a number the squared error.

        Where each word has a label, it is the mean over the words.
        """
        if self.required_task().is_regression:
            return F.mse_loss(outputs.squeeze(-1).float(), batch["labels"].float())
        if self.required_task().multi_label:
            return F.binary_cross_entropy_with_logits(outputs.float(), batch["labels"].float())
        if self.required_task().per_word:
            labels = batch["labels"].flatten()
            total = F.cross_entropy(outputs.float().flatten(0, 1), labels, ignore_index=IGNORED, reduction="sum")
            return total / (labels != IGNORED).sum().clamp(min=1)
        if self.loss_over == "vocabulary":
            return F.nll_loss(outputs, batch["labels"])
        return F.cross_entropy(outputs.float(), batch["labels"])

    def loss_weight(self, outputs: Tensor, batch: Batch) -> Tensor | int:
        """Returns the number of examples, or of words where each has a label."""
        if self.required_task().per_word:
            return (batch["labels"] != IGNORED).sum()
        return super().loss_weight(outputs, batch)

    def configure_metrics(self) -> MetricCollection:
        """Builds the task's official metrics, and with classes accuracy and the majority class's share."""
        task = self.required_task()
        word_labels = task.labels if task.per_word else []
        return build_metrics(task.official_metrics, len(task.labels), task.multi_label, word_labels)

    def official_metrics(self) -> list[str]:
        """Returns the task's."""
        return self.required_task().official_metrics

    def predictions(self, outputs: Tensor) -> Tensor:
        """Returns class indices ``[B]`` (of tokens ``[B, T]``), 1 at each of several ``[B, labels]``, or numbers."""
        task = self.required_task()
        if task.multi_label:
            return (outputs > 0).long()
        return outputs.squeeze(-1).float() if task.is_regression else outputs.argmax(-1)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Returns the predictions of a batch, and where each word has a label, which tokens are words'."""
        words = {name: batch[name] for name in ("words", "num_words") if name in batch}
        return {**super().predict_step(batch, batch_idx, dataloader_idx), **words}

    def predict_outputs(self, outputs: Tensor) -> dict[str, Tensor]:
        """Returns ``probabilities [B, labels]`` (of tokens ``[B, T, labels]``), or ``value [B]``."""
        task = self.required_task()
        if task.is_regression:
            return {"value": outputs.squeeze(-1).float()}
        return {"probabilities": outputs.float().sigmoid() if task.multi_label else outputs.float().softmax(-1)}

    def prediction_rows(self, predicted: dict[str, Tensor]) -> list[dict[str, Any]]:
        """Returns records with ``index``, and ``label`` (or ``labels``) and ``probabilities`` by name, or ``value``.

        Where each word has a label, these are ``labels`` and their ``probabilities`` in the words' order, None for
        words that were cut, or are no token.
        """
        task = self.required_task()
        if task.per_word:
            return _word_records(predicted, task.labels)
        rows = super().prediction_rows(predicted)
        for row in rows if task.labels else []:
            named = dict(zip(task.labels, row.pop("probabilities")))
            if task.multi_label:
                row["labels"] = [label for label, probability in named.items() if probability > 0.5]
            else:
                row["label"] = max(named, key=lambda label: named[label])
            row["probabilities"] = named
        return rows

    def predict(self, texts: Any, batch_size: int = 32) -> list[dict[str, Any]]:
        """Predicts for texts, read by the task's template and cut as in training.

        Args:
            texts: One row or a list of them. A row is a text; for a task on two texts, a tuple of both; where each word
                has a label, a list of words, or a text, split at whitespace; or a mapping of columns, whose other
                entries are not read.
            batch_size: Rows at a time, of like lengths.

        Returns:
            A record for each row, in their order: ``label`` (or ``labels``) and ``probabilities`` by name, or
            ``value``. Where each word has a label, ``words``, ``labels`` and ``probabilities``, None for words that
            were cut, or are no token.

        Raises:
            LoPAError: If a row has not the task's texts, or nothing was trained or loaded.
        """
        at_least(1, batch_size=batch_size)
        encoder, rows = row_encoder(self, texts)
        with answering(self, "predict", {"right"}):
            values = next(iter(rows.values()))
            found = records(self, row_batches(self, encoder, rows, batch_size), len(values), batch_size)
        if self.required_task().per_word:
            return [{"words": words_of(value), **record} for value, record in zip(values, found)]
        return found

    def task_identity(self) -> dict[str, Any]:
        """Returns objective, labels and what reads them."""
        return {"objective": self.objective, **self._reading(self.required_task())}

    def _reading(self, task: Task) -> dict[str, Any]:
        """Returns what of a task shapes what is learned for it."""
        # Named only where it is not the default, so that checkpoints from before there was a choice go on.
        says = task.verbalizer or Verbalizer()
        both = [*(says.template or []), says.causal_template]  # which of them an encoder reads its tokenizer tells
        reads = {"instance_reads": says.instance_reads, "instance_template": both}
        instance: dict[str, Any] = reads if says.instance_reads != "columns" else {}
        if self.objective == "head":
            several = {name: True for name in ("multi_label", "per_word") if getattr(task, name)}
            return {"labels": task.labels, "head_pooling": self.head_pooling, **several, **instance}
        template = [says.causal_template] if self.objective == "causal_lm" and says.causal_template else says.template
        return {"labels": task.labels, "words": says.words, "template": template, **instance}


def _word_records(predicted: dict[str, Tensor], names: list[str]) -> list[dict[str, Any]]:
    """Returns a record for each row, with label and probability of each of its words."""
    best = predicted["probabilities"].max(-1)
    columns = predicted["index"], predicted["num_words"], predicted["words"], best.indices, best.values
    rows = []
    for index, count, words, labels, probabilities in zip(*(column.tolist() for column in columns)):
        found = {word: (names[label], value) for word, label, value in zip(words, labels, probabilities) if word}
        read = [found.get(number, (None, None)) for number in range(1, count + 1)]
        rows.append({"index": index, "labels": [row[0] for row in read], "probabilities": [row[1] for row in read]})
    return rows


def _cut_as(task: Task, data_task: Task) -> Task:
    """Returns a module's task with the data's say on how texts are cut."""
    if task.verbalizer is None or (says := data_task.verbalizer) is None:
        return task
    cut = dataclasses.replace(task.verbalizer, max_length=says.max_length, truncation_side=says.truncation_side)
    return dataclasses.replace(task, verbalizer=cut)

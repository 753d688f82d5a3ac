"""Describes what data and model must agree on: labels, metrics, and the words that stand for labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from lopa_lightning.errors import LoPAError, at_least, one_of

IGNORED = -100
"""Label of a token that is not to be predicted."""

InstanceReads = Literal["columns", "template"]
Side = Literal["left", "right"]


@dataclass(frozen=True)
class Verbalizer:
    """Says how a text becomes a question to a language model, and which of its words are the answers.

    Args:
        words: One word for each label; None where a trained head answers.
        template: What the backbone reads, with ``{column}`` fields and ``{mask}``.
        causal_template: Its wording for causal LMs, where that is another.
        instance_reads: What the instance encoder reads: the text ``columns`` alone, or the ``template`` with its own
            tokenizer's mask, and without one up to the mask, in the wording for causal LMs.
        max_length: Tokens of a text for the backbone, virtual tokens not counted; None for as many as fit.
        truncation_side: Which end of a text too long is cut.

    Raises:
        LoPAError: If ``instance_reads`` or ``truncation_side`` is unknown, ``max_length`` below 1, or words repeat.
    """

    words: list[str] | None = None
    template: list[str] | None = None
    causal_template: str | None = None
    instance_reads: InstanceReads = "columns"
    max_length: int | None = None
    truncation_side: Side = "right"

    def __post_init__(self) -> None:
        one_of("instance_reads", self.instance_reads, get_args(InstanceReads))
        one_of("truncation_side", self.truncation_side, get_args(Side))
        at_least(1, max_length=self.max_length)
        if self.words is not None and len(set(self.words)) < len(self.words):
            raise LoPAError(f"label words must differ, got {self.words}")


@dataclass(frozen=True)
class Task:
    """Describes a classification or regression task.

    Args:
        labels: Names of the classes, in the order of their indices; empty for regression.
        metrics: Official metrics, see :func:`lopa_lightning.metrics.classification.build_metrics`.
        eval_sets: Name suffixes of the evaluation sets; MNLI has two.
        verbalizer: Of a task on text.
        multi_label: Whether an example may have several labels, or none.
        per_word: Whether each word of a text has a label.

    Raises:
        LoPAError: If there is one label only, labels repeat, there are more or fewer words than labels, or several
            labels, or one for each word, are to be answered by words or at once.
    """

    labels: list[str]
    metrics: list[str] | None = None
    eval_sets: list[str] | None = None
    verbalizer: Verbalizer | None = None
    multi_label: bool = False
    per_word: bool = False

    def __post_init__(self) -> None:
        if len(self.labels) == 1 or len(set(self.labels)) < len(self.labels):
            raise LoPAError(f"labels must be at least two different names, or none for regression; got {self.labels}")
        if self.words is not None and len(self.words) != len(self.labels):
            raise LoPAError(f"there must be one word for each label, got labels {self.labels} and words {self.words}")
        if self.multi_label and (self.words is not None or self.is_regression):
            raise LoPAError("multi_label needs labels, and no words: a word is one answer; use objective: head")
        if self.per_word and (self.words is not None or self.is_regression or self.multi_label):
            raise LoPAError("per_word needs labels, one for each word of a text, and neither words nor multi_label")

    @property
    def words(self) -> list[str] | None:
        """Returns the verbalizer's words."""
        return None if self.verbalizer is None else self.verbalizer.words

    @property
    def is_regression(self) -> bool:
        """Returns whether the answer is a number."""
        return not self.labels

    @property
    def num_outputs(self) -> int:
        """Returns how many numbers the model gives for an example."""
        return len(self.labels) or 1

    @property
    def official_metrics(self) -> list[str]:
        """Returns the metrics whose mean is the task's score."""
        default = ["pearson", "spearman"] if self.is_regression else ["f1"] if self.multi_label else ["accuracy"]
        if self.per_word and is_bio(self.labels):
            default = ["span_f1"]
        return default if self.metrics is None else self.metrics

    @property
    def suffixes(self) -> list[str]:
        """Returns the name suffixes of the evaluation sets; one empty suffix where none is given."""
        return self.eval_sets or [""]


def is_bio(labels: Sequence[str]) -> bool:
    """Returns whether labels mark spans of words: ``B-`` and ``I-`` with a type, ``O`` outside of spans.

    Example:
        >>> is_bio(["O", "B-PER", "I-PER"]), is_bio(["NOUN", "VERB", "O"])
        (True, False)
    """
    return set(labels) != {"O"} and all(label == "O" or (label[:2] in ("B-", "I-") and label[2:]) for label in labels)

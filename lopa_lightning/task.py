"""What data and model must agree on: the labels, their words, and how answers are scored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from lopa_lightning.errors import LoPAError

IGNORED = -100
"""Label of a token that is not to be predicted."""

InstanceReads = Literal["columns", "template"]


@dataclass(frozen=True)
class TextTask:
    """A classification or regression task on text.

    Args:
        labels: Names of the classes, in the order of their indices; empty for regression.
        words: The verbalizer: one word for each label, for the objectives that read a language model head.
        metrics: Official metrics, see :func:`lopa_lightning.metrics.classification.build_metrics`.
        eval_sets: Name suffixes of the evaluation sets; MNLI has two.
        template: What the backbone reads, with ``{column}`` fields and ``{mask}``.
        causal_template: Its wording for causal LMs, where that is another.
        instance_reads: What the instance encoder reads: the text ``columns`` alone, or the ``template`` with its own
            tokenizer's mask.

    Raises:
        LoPAError: If ``instance_reads`` is unknown, there is one label only, labels or words repeat, or their numbers
            differ.
    """

    labels: list[str]
    words: list[str] | None = None
    metrics: list[str] | None = None
    eval_sets: list[str] | None = None
    template: list[str] | None = None
    causal_template: str | None = None
    instance_reads: InstanceReads = "columns"

    def __post_init__(self) -> None:
        if self.instance_reads not in get_args(InstanceReads):
            choices = ", ".join(get_args(InstanceReads))
            raise LoPAError(f"instance_reads must be one of {choices}, got {self.instance_reads!r}")
        if len(self.labels) == 1 or len(set(self.labels)) < len(self.labels):
            raise LoPAError(f"labels must be at least two different names, or none for regression; got {self.labels}")
        if self.words is not None and len(set(self.words)) < len(self.words):
            raise LoPAError(f"label words must differ, got {self.words}")
        if self.words is not None and len(self.words) != len(self.labels):
            raise LoPAError(f"there must be one word for each label, got labels {self.labels} and words {self.words}")

    @property
    def is_regression(self) -> bool:
        """Whether the answer is a number."""
        return not self.labels

    @property
    def num_outputs(self) -> int:
        """Numbers that the model gives for an example."""
        return len(self.labels) or 1

    @property
    def official_metrics(self) -> list[str]:
        """The metrics whose mean is the task's score."""
        return self.metrics or (["pearson", "spearman"] if self.is_regression else ["accuracy"])

    @property
    def suffixes(self) -> list[str]:
        """Name suffixes of the evaluation sets; one without a suffix where none is given."""
        return self.eval_sets or [""]

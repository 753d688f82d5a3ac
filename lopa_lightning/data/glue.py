"""The nine tasks of GLUE (Wang et al. 2018): columns, labels, templates, words and metrics as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from lightning.pytorch.utilities import rank_zero_warn

from lopa_lightning.data.splits import Role
from lopa_lightning.data.template import Side, Template
from lopa_lightning.data.text_classification import TextClassificationDataModule
from lopa_lightning.errors import LoPAError
from lopa_lightning.task import InstanceReads

PairTemplate = Literal["mask_last", "mask_between"]


@dataclass(frozen=True)
class _Task:
    """A row of the table.

    Attributes:
        template: For masked LMs. Of a pair, the mask stands at the end.
        causal: For causal LMs, which continue it.
        labels: In the order of the data set's indices; none for regression.
        words: The verbalizer.
        metrics: The official ones; the score is their mean.
        submission: File name (without ending) of each test set in a submission.
        submit_index: Whether a submission has label indices, not names.
        eval_splits: Splits to evaluate on, with the suffix of each.
    """

    template: tuple[str, ...]
    causal: str
    labels: tuple[str, ...]
    words: tuple[str, ...]
    metrics: tuple[str, ...]
    submission: tuple[str, ...]
    submit_index: bool = False
    eval_splits: tuple[tuple[str, str], ...] = (("", "validation"),)


_PAIR = ("{sentence1}", "{sentence2} {mask}")
_IS_SAME = "{sentence1}\n{sentence2}\nQuestion: Do both mean the same? Yes or No?\nAnswer: {mask}"
_FOLLOWS = "{sentence1}\nQuestion: {sentence2} Yes or No?\nAnswer: {mask}"

GLUE_TASKS = {
    "cola": _Task(
        ("{sentence} . This is {mask} .",),
        "{sentence} . This is {mask}",
        ("unacceptable", "acceptable"),
        ("incorrect", "correct"),
        ("matthews",),
        ("CoLA",),
        submit_index=True,
    ),
    "sst2": _Task(
        ("{sentence} . It was {mask} .",),
        "{sentence} . It was {mask}",
        ("negative", "positive"),
        ("terrible", "great"),
        ("accuracy",),
        ("SST-2",),
        submit_index=True,
    ),
    "mrpc": _Task(
        _PAIR,
        _IS_SAME,
        ("not_equivalent", "equivalent"),
        ("No", "Yes"),
        ("accuracy", "f1"),
        ("MRPC",),
        submit_index=True,
    ),
    "qqp": _Task(
        ("{question1}", "{question2} {mask}"),
        "{question1}\n{question2}\nQuestion: Do both mean the same? Yes or No?\nAnswer: {mask}",
        ("not_duplicate", "duplicate"),
        ("No", "Yes"),
        ("accuracy", "f1"),
        ("QQP",),
        submit_index=True,
    ),
    "stsb": _Task(_PAIR, _IS_SAME, (), (), ("pearson", "spearman"), ("STS-B",)),
    "mnli": _Task(
        ("{premise}", "{hypothesis} {mask}"),
        "{premise}\nQuestion: {hypothesis} Yes, No or Maybe?\nAnswer: {mask}",
        ("entailment", "neutral", "contradiction"),
        ("Yes", "Maybe", "No"),
        ("accuracy",),
        ("MNLI-m", "MNLI-mm"),
        eval_splits=(("", "validation_matched"), ("_mismatched", "validation_mismatched")),
    ),
    "qnli": _Task(
        ("{question}", "{sentence} {mask}"),
        "{sentence}\nQuestion: Does that answer: {question} Yes or No?\nAnswer: {mask}",
        ("entailment", "not_entailment"),
        ("Yes", "No"),
        ("accuracy",),
        ("QNLI",),
    ),
    "rte": _Task(_PAIR, _FOLLOWS, ("entailment", "not_entailment"), ("Yes", "No"), ("accuracy",), ("RTE",)),
    "wnli": _Task(
        _PAIR, _FOLLOWS, ("not_entailment", "entailment"), ("No", "Yes"), ("accuracy",), ("WNLI",), submit_index=True
    ),
}


def _mask_between(task: str, row: _Task) -> str:
    """The released code's template of a pair: no question mark between two that are questions themselves."""
    first, second = Template(row.template).columns
    return f"{{{first}}} {'' if task == 'qqp' else '? '}{{mask}} , {{{second}}}"


class GLUEDataModule(TextClassificationDataModule):
    """A GLUE task with its official metrics.

    ``validate`` and ``test`` use the validation splits, whose labels are public; ``predict`` the test
    splits, for a submission.

    Args:
        task: ``cola``, ``sst2``, ``mrpc``, ``qqp``, ``stsb``, ``mnli``, ``qnli``, ``rte`` or ``wnli``.
        path: Hub id, or a folder in that layout.
        revision: Branch, tag or commit on the hub.
        template: In place of the task's own.
        pair_template: Of a task with two texts: ``mask_last``, a pair with the tokenizer's separators and the mask at
            its end; ``mask_between``, one text with the mask in its middle, as in the paper's released code.
        causal_template: In place of the task's own.
        max_train_examples: Train on at most that many examples, drawn at random.
        shots_per_label: Train on that many examples of each label, drawn at random.
        subset_seed: Of these draws.
        validation_from_train: Share of the training examples to validate on in place of the validation split,
            see :class:`~lopa_lightning.data.text_classification.TextClassificationDataModule`.
        batch_size: See :class:`~lopa_lightning.data.text.TextDataModule`, like the ones below.
        eval_batch_size: Examples in a batch that is not trained on.
        max_length: Tokens of a text for the backbone.
        instance_reads: See :class:`~lopa_lightning.data.text_classification.TextClassificationDataModule`.
        truncation_side: Which end of a text too long is cut.
        padding_side: Where the backbone's padding goes.
        num_workers: Processes that load batches.
        batch_tokens: Most tokens in a batch, in place of ``batch_size``.

    Raises:
        LoPAError: If there is no such task or ``pair_template``, or two templates are given.
    """

    allow_empty_text = True  # a few of QQP's questions are

    def __init__(
        self,
        task: str,
        path: str = "nyu-mll/glue",
        revision: str | None = None,
        template: Sequence[str] | None = None,
        causal_template: str | None = None,
        max_train_examples: int | None = None,
        shots_per_label: int | None = None,
        subset_seed: int = 0,
        validation_from_train: float = 0.0,
        batch_size: int = 16,
        eval_batch_size: int | None = None,
        max_length: int | None = None,
        truncation_side: Side = "right",
        padding_side: Side = "right",
        num_workers: int | None = None,
        batch_tokens: int | None = None,
        pair_template: PairTemplate = "mask_last",
        instance_reads: InstanceReads = "columns",
    ) -> None:
        if task not in GLUE_TASKS:
            raise LoPAError(f"task must be one of {', '.join(GLUE_TASKS)}, got {task!r}")
        if pair_template not in get_args(PairTemplate):
            raise LoPAError(f"pair_template must be one of {', '.join(get_args(PairTemplate))}, got {pair_template!r}")
        row = self.row = GLUE_TASKS[task]
        if pair_template == "mask_between" and len(row.template) == 2:
            if template is not None:
                raise LoPAError("give template or pair_template: mask_between, not both")
            template = [_mask_between(task, row)]
        super().__init__(
            path=path,
            name=task,
            revision=revision,
            labels=row.labels,
            words=row.words or None,
            template=template or row.template,
            causal_template=causal_template or row.causal,
            metrics=row.metrics,
            max_train_examples=max_train_examples,
            shots_per_label=shots_per_label,
            subset_seed=subset_seed,
            validation_from_train=validation_from_train,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            max_length=max_length,
            truncation_side=truncation_side,
            padding_side=padding_side,
            num_workers=num_workers,
            batch_tokens=batch_tokens,
            instance_reads=instance_reads,
        )
        assert self.task is not None
        suffixes = [""] if validation_from_train else [suffix for suffix, _ in row.eval_splits]
        self.task = replace(self.task, eval_sets=suffixes)

    def splits_of(self, role: Role) -> list[str]:
        """Splits by GLUE's own rules."""
        if role == "train" or (role == "val" and self.validation_from_train):
            return ["train"]
        validation = [split for _, split in self.row.eval_splits]
        if role == "predict":
            return [split.replace("validation", "test") for split in validation]
        assert self.task is not None
        return validation[: len(self.task.suffixes)]

    def submission(self, set_index: int, rows: list[dict[str, Any]]) -> tuple[str, str] | None:
        """What the GLUE server takes for a test set.

        Args:
            set_index: Which of the test sets.
            rows: Predictions in the input's order, with ``label`` or ``value``.

        Returns:
            File name and content, or None (with a warning) if not every row was predicted.
        """
        wanted = len(self.datasets["predict"][set_index])
        if [row["index"] for row in rows] != list(range(wanted)):
            rank_zero_warn(f"no file for the GLUE server: {len(rows)} of {wanted} rows were predicted")
            return None
        assert self.task is not None
        answers = [row["value"] if self.task.is_regression else row["label"] for row in rows]
        if self.row.submit_index:
            answers = [self.row.labels.index(answer) for answer in answers]
        lines = ["index\tprediction", *(f"{index}\t{answer}" for index, answer in enumerate(answers))]
        return f"{self.row.submission[set_index]}.tsv", "\n".join(lines) + "\n"

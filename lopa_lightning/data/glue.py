"""The nine tasks of GLUE (Wang et al. 2018): columns, labels, templates, words and metrics as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from lightning.pytorch.utilities import rank_zero_warn

from lopa_lightning.data.splits import Role
from lopa_lightning.data.template import Template
from lopa_lightning.data.text_classification import TextClassificationDataModule
from lopa_lightning.errors import LoPAError, one_of
from lopa_lightning.task import Task

PairTemplate = Literal["mask_last", "mask_between"]


@dataclass(frozen=True)
class _Task:
    """A row of the table.

    Attributes:
        template: For masked LMs. Of a pair, the mask stands at the end.
        causal: For causal LMs, which continue it.
        labels: In the order of the data set's indices; none for regression.
        submission: File name (without ending) of each test set in a submission.
        words: The verbalizer.
        metrics: The official ones; the score is their mean.
        submit_index: Whether a submission has label indices, not names.
        eval_splits: Splits to evaluate on, with the suffix of each.
    """

    template: tuple[str, ...]
    causal: str
    labels: tuple[str, ...]
    submission: tuple[str, ...]
    words: tuple[str, ...] = ("Yes", "No")
    metrics: tuple[str, ...] = ("accuracy",)
    submit_index: bool = False
    eval_splits: tuple[tuple[str, str], ...] = (("", "validation"),)


_PAIR = ("{sentence1}", "{sentence2} {mask}")
_FOLLOWS = "{sentence1}\nQuestion: {sentence2} Yes or No?\nAnswer: {mask}"
_IS_SAME = "{sentence1}\n{sentence2}\nQuestion: Do both mean the same? Yes or No?\nAnswer: {mask}"
_SAME: dict[str, Any] = {"words": ("No", "Yes"), "metrics": ("accuracy", "f1"), "submit_index": True}
_ENTAILS = ("entailment", "not_entailment")

GLUE_TASKS = {
    "cola": _Task(
        template=("{sentence} . This is {mask} .",),
        causal="{sentence} . This is {mask}",
        labels=("unacceptable", "acceptable"),
        submission=("CoLA",),
        words=("incorrect", "correct"),
        metrics=("matthews",),
        submit_index=True,
    ),
    "sst2": _Task(
        template=("{sentence} . It was {mask} .",),
        causal="{sentence} . It was {mask}",
        labels=("negative", "positive"),
        submission=("SST-2",),
        words=("terrible", "great"),
        submit_index=True,
    ),
    "mrpc": _Task(_PAIR, _IS_SAME, ("not_equivalent", "equivalent"), ("MRPC",), **_SAME),
    "qqp": _Task(
        template=("{question1}", "{question2} {mask}"),
        causal=_IS_SAME.replace("sentence", "question"),
        labels=("not_duplicate", "duplicate"),
        submission=("QQP",),
        **_SAME,
    ),
    "stsb": _Task(_PAIR, _IS_SAME, (), ("STS-B",), words=(), metrics=("pearson", "spearman")),
    "mnli": _Task(
        template=("{premise}", "{hypothesis} {mask}"),
        causal="{premise}\nQuestion: {hypothesis} Yes, No or Maybe?\nAnswer: {mask}",
        labels=("entailment", "neutral", "contradiction"),
        submission=("MNLI-m", "MNLI-mm"),
        words=("Yes", "Maybe", "No"),
        eval_splits=(("", "validation_matched"), ("_mismatched", "validation_mismatched")),
    ),
    "qnli": _Task(
        template=("{question}", "{sentence} {mask}"),
        causal="{sentence}\nQuestion: Does that answer: {question} Yes or No?\nAnswer: {mask}",
        labels=_ENTAILS,
        submission=("QNLI",),
    ),
    "rte": _Task(_PAIR, _FOLLOWS, _ENTAILS, ("RTE",)),
    "wnli": _Task(_PAIR, _FOLLOWS, _ENTAILS[::-1], ("WNLI",), words=("No", "Yes"), submit_index=True),
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
        template: In place of the task's own, of causal language models too unless ``causal_template`` is given.
        pair_template: Of a task with two texts, for masked language models: ``mask_last``, a pair with the tokenizer's
            separators and the mask at its end; ``mask_between``, one text with the mask in its middle, as in the
            paper's released code.
        causal_template: In place of the task's own.
        splits: ``{predict: validation}`` to predict examples whose labels are public.
        **kwargs: See :class:`~lopa_lightning.data.text_classification.TextClassificationDataModule`.

    Raises:
        LoPAError: If there is no such task or ``pair_template``, two templates are given, or another split.
    """

    task: Task

    allow_empty_text = True  # a few of QQP's questions are

    def __init__(
        self,
        task: str,
        path: str = "nyu-mll/glue",
        template: Sequence[str] | None = None,
        causal_template: str | None = None,
        pair_template: PairTemplate = "mask_last",
        splits: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        one_of("task", task, GLUE_TASKS)
        one_of("pair_template", pair_template, get_args(PairTemplate))
        row = self.row = GLUE_TASKS[task]
        if splits and (set(splits) != {"predict"} or splits["predict"] not in ("validation", "test")):
            raise LoPAError(f"splits must be {{predict: validation}} or {{predict: test}} for GLUE, got {splits}")
        own_causal = row.causal if template is None else None
        if pair_template == "mask_between" and len(row.template) == 2:
            if template is not None:
                raise LoPAError("give template or pair_template: mask_between, not both")
            template = [_mask_between(task, row)]
        super().__init__(
            path=path,
            name=task,
            data_files=None,
            splits=splits,
            text_columns=(),
            label_column="label",
            labels=row.labels,
            label_values=None,
            words=row.words or None,
            template=template or row.template,
            causal_template=causal_template or own_causal,
            metrics=row.metrics,
            multi_label=False,
            per_word=False,
            **kwargs,
        )
        suffixes = [""] if self.validation_from_train else [suffix for suffix, _ in row.eval_splits]
        self.task = replace(self.task, eval_sets=suffixes)

    def splits_of(self, role: Role) -> list[str]:
        """Returns splits by GLUE's own rules."""
        if role == "train" or (role == "val" and self.validation_from_train):
            return ["train"]
        validation = [split for _, split in self.row.eval_splits]
        if role == "predict" and self.splits["predict"] == "test":
            return [split.replace("validation", "test") for split in validation]
        return validation if role == "predict" else validation[: len(self.task.suffixes)]

    def submission(self, set_index: int, rows: list[dict[str, Any]]) -> tuple[str, str] | None:
        """What the GLUE server takes for a test set.

        Args:
            set_index: Which of the test sets.
            rows: Predictions in the input's order, with ``label`` or ``value``.

        Returns:
            File name and content, or None (with a warning) if not every row was predicted.
        """
        if self.splits["predict"] != "test":
            return None
        wanted = len(self.datasets["predict"][set_index])
        if [row["index"] for row in rows] != list(range(wanted)):
            rank_zero_warn(f"no file for the GLUE server: {len(rows)} of {wanted} rows were predicted")
            return None
        answers = [row["value"] if self.task.is_regression else row["label"] for row in rows]
        if self.row.submit_index:
            answers = [self.row.labels.index(answer) for answer in answers]
        lines = ["index\tprediction", *(f"{index}\t{answer}" for index, answer in enumerate(answers))]
        return f"{self.row.submission[set_index]}.tsv", "\n".join(lines) + "\n"

"""CRUXEval (Gu et al. 2024, https://arxiv.org/abs/2401.03065): what a function gives, or what it was given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from lopa_lightning.data.code.base import CodeDataModule, InstanceReads, checked, halves
from lopa_lightning.data.code.programs import cruxeval_answer, cruxeval_answer_program, is_skipped
from lopa_lightning.data.completion_rows import Example, Layout
from lopa_lightning.data.splits import Role
from lopa_lightning.data.types import DatasetDict
from lopa_lightning.errors import one_of

Predict = Literal["input", "output"]

# The published direct prompts, word for word: https://github.com/facebookresearch/cruxeval/blob/main/prompts.py
_TASK: dict[str, str] = {
    "output": (
        "You are given a Python function and an assertion containing an input to the function. Complete the "
        "assertion with a literal (no unsimplified expressions, no function calls) containing the output when "
        "executing the provided code on the given input, even if the function is incorrect or incomplete. Do NOT "
        "output any extra information. Provide the full assertion with the correct output in [ANSWER] and [/ANSWER] "
        "tags, following the examples."
    ),
    "input": (
        "You will be given a function f and an output in the form f(??) == output. Find any input such that "
        "executing f on the input leads to the given output. There may be multiple answers, but you should only "
        "output one. In [ANSWER] and [/ANSWER] tags, complete the assertion with one such input that will produce the "
        "output when executing the function."
    ),
}
_SHOTS: dict[str, list[tuple[str, str, str]]] = {
    "output": [("def f(n):\n    return n", "17", "17"), ('def f(s):\n    return s + "a"', '"x9j"', '"x9ja"')],
    "input": [
        (
            "def f(my_list):\n    count = 0\n    for i in my_list:\n        if len(i) % 2 == 0:\n"
            "            count += 1\n    return count",
            '["mq", "px", "zy"]',
            "3",
        ),
        ("def f(s1, s2):\n    return s1 + s2", '"ba", "nana"', '"banana"'),
    ],
}


@dataclass(frozen=True)
class CRUXEvalLayout:
    """Makes the published direct prompt with its two examples.

    Attributes:
        predict: ``output``, or ``input``.
        instance_reads: ``question``, or the whole ``prompt``.
    """

    columns = ("code", "input", "output")

    predict: Predict
    instance_reads: InstanceReads

    def question(self, code: str, given: str, output: str) -> str:
        """Returns the function and the assertion to complete."""
        asked = f"f({given}) == ??" if self.predict == "output" else f"f(??) == {output}"
        return f"{code}\nassert {asked}"

    def __call__(self, row: Mapping[str, Any]) -> Example:
        """Makes an example of a row."""
        shots = "".join(
            f"[PYTHON]\n{self.question(*shot)}\n[/PYTHON]\n[ANSWER]\n{_answer(shot[1], shot[2])}\n\n"
            for shot in _SHOTS[self.predict]
        )
        question = self.question(row["code"], row["input"], row["output"])
        prompt = f"{_TASK[self.predict]}\n\n{shots}[PYTHON]\n{question}\n[/PYTHON]\n[ANSWER]\n"
        instance = question if self.instance_reads == "question" else prompt
        return Example(prompt, _answer(row["input"], row["output"]), instance)


def _answer(given: str, output: str) -> str:
    return f"assert f({given}) == {output}\n[/ANSWER]"


class CRUXEvalDataModule(CodeDataModule):
    """CRUXEval with the published direct prompt; the first 400 functions train, the other 400 test, as in the paper.

    A tenth of the training half is validated on. Answers are read, run and counted as by the benchmark's own harness,
    which skips what is no answer: of several samples of a problem that one solves, these are left out of pass@k.

    Args:
        predict: ``output``: what a function gives for an input; ``input``: an input that gives an output.
        path: Hub id, or a folder in that layout.
        **kwargs: See :class:`~lopa_lightning.data.code.base.CodeDataModule`.

    Raises:
        LoPAError: If ``predict`` is neither.
    """

    def __init__(self, predict: Predict = "output", path: str = "cruxeval-org/cruxeval", **kwargs: Any) -> None:
        one_of("predict", predict, get_args(Predict))
        super().__init__(path=path, **kwargs)
        self.predict = predict

    def load(self) -> DatasetDict:
        """Reads the problems and halves them."""
        columns = dict.fromkeys(("code", "input", "output"), "texts")
        return halves(checked(super().load(), columns, ["test"])["test"])

    def layout(self, role: Role) -> Layout:
        """Returns the published prompt's layout."""
        return CRUXEvalLayout(self.predict, self.instance_reads)

    def program(self, row: dict[str, Any], completion: str) -> str:
        """Joins the function and the answer that the completion holds."""
        answer = self.answer(completion)
        return cruxeval_answer_program(row["code"], row["input"], row["output"], answer, self.predict)

    def skips(self, row: dict[str, Any], completion: str) -> bool:
        """Returns whether the answer is none by the rules of the benchmark's own harness."""
        return is_skipped(row["input"], self.answer(completion), self.predict)

    def answer(self, completion: str) -> str:
        """Returns the literal, or the call, that stands in a completion."""
        return cruxeval_answer(completion, self.predict)

"""Programs that pass if an answer is right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from lopa_lightning.data.code.extraction import Mode
from lopa_lightning.errors import LoPAError


def mbpp_program(code: str, tests: Sequence[str], setup: str = "") -> str:
    r"""A solution of an MBPP problem with the problem's tests.

    Args:
        code: The solution; for a completion, the prompt and the completion.
        tests: ``test_list``, and ``challenge_test_list`` where wanted: one statement each.
        setup: What the tests need beside the solution: ``test_setup_code``, which uses what the solution defines.

    Example:
        >>> print(mbpp_program("def f(x):\n    return x", ["assert f(1) == 1"]))
        def f(x):
            return x
        assert f(1) == 1
    """
    return "\n".join(part.replace("\r\n", "\n") for part in (code, setup, *tests) if part)


def cruxeval_program(code: str, input: str, output: str) -> str:
    """CRUXEval's function with one input and one output.

    Args:
        code: The function ``f``.
        input: Its arguments, as the data set has them: ``[1, 2], 3``.
        output: A literal.

    Returns:
        A program that passes if ``f(input) == output``.
    """
    return f"{code}\nassert f({input}) == {output}"


def is_skipped(input: str, answer: str, mode: Mode) -> bool:
    """Whether CRUXEval's own harness passes over an answer, without running it.

    So it does with an answer that is no call of ``f`` where an input was asked for, and with one that repeats the
    call where its value was asked for. They are right by no means; how they count is said by
    :class:`~lopa_lightning.metrics.pass_at_k.PassAtK`.

    Args:
        input: The arguments that the data set has.
        answer: What :func:`~lopa_lightning.data.code.extraction.cruxeval_answer` found.
        mode: What was asked for.

    Raises:
        LoPAError: If ``mode`` is unknown.
    """
    if mode not in get_args(Mode):
        raise LoPAError(f"mode must be one of {', '.join(get_args(Mode))}, got {mode!r}")
    return "f(" not in answer if mode == "input" else f"f({input})" in answer


def cruxeval_answer_program(code: str, input: str, output: str, answer: str, mode: Mode) -> str:
    r"""CRUXEval's function with a model's answer, by the rules of the benchmark's own harness.

    Args:
        code: The function ``f``.
        input: The arguments that the data set has.
        output: The literal that the data set has.
        answer: What :func:`~lopa_lightning.data.code.extraction.cruxeval_answer` found.
        mode: What was asked for.

    Returns:
        A program that passes if the answer is right; one that fails if the harness skips it, see :func:`is_skipped`.

    Raises:
        LoPAError: If ``mode`` is unknown.

    Example:
        >>> print(cruxeval_answer_program("def f(n):\n    return n * n", "3", "9", "f(-3)", "input"))
        def f(n):
            return n * n
        assert 9 == f(-3)
    """
    if is_skipped(input, answer, mode):
        what = "does not call f" if mode == "input" else "repeats the call"
        return f"assert False, 'the answer {what}'"
    return f"{code}\nassert {output} == {answer}"

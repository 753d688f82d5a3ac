"""Finds the answer in what a model generated, as each benchmark reads it, and makes a program that tests it.

Nothing here runs an answer, or parses it with Python's parser.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, get_args

from lopa_lightning.errors import one_of

Mode = Literal["input", "output"]

# A string that is not closed ends with its line, or with the text if it has three quotes. A gap is the end of a line,
# with the blank and comment lines that follow.
_TOKEN = re.compile(
    r"""
    (?P<skip> \#[^\n]* | \\\n
      | \"{3} (?: \\. | [^\\] | \\\Z )*? (?: \"{3} | \Z )
      | '{3} (?: \\. | [^\\] | \\\Z )*? (?: '{3} | \Z )
      | " (?: \\. | [^"\\\n] )* "?
      | ' (?: \\. | [^'\\\n] )* '? )
    | (?P<open> [(\[{] ) | (?P<close> [)\]}] )
    | (?P<gap> \n (?: [ \t]* (?: \#[^\n]* )? \n )* )
    """,
    re.VERBOSE | re.DOTALL,
)
_FENCE = re.compile(r"```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)


def first_function(completion: str) -> str:
    r"""Returns the rest of a function whose signature and docstring were the prompt, cut where the function ends.

    It ends before the first line of code that is not indented; where a bracket or a string is open, no line
    ends. The first line goes on with the prompt's last one, so it belongs to the function in any case.

    Args:
        completion: What the model generated after the docstring.

    Returns:
        The completion up to the end of the function, ending with a line break; without blank and comment
        lines between it and what follows.

    Example:
        >>> first_function("\n    return a + b\n\n\ndef g():\n    pass")
        '\n    return a + b\n'
    """
    text = completion.replace("\r\n", "\n").replace("\r", "\n")
    depth, end = 0, len(text)
    for token in _TOKEN.finditer(text):
        if token["open"]:
            depth += 1
        elif token["close"]:
            depth = max(depth - 1, 0)
        elif token["gap"] and depth == 0 and text[token.end() : token.end() + 1] not in ("", " ", "\t", "#"):
            end = token.start()
            break
    body = text[:end].rstrip()
    return body + "\n" if body else ""


def code_block(text: str) -> str:
    r"""Returns the program in an answer to a prompt in words.

    What stands after MBPP's ``[DONE]`` is dropped, and what stands before ``[BEGIN]``; of what is left, the first
    fenced block of Markdown, if there is one. A fence that was never closed reaches to the end.

    Example:
        >>> code_block("Here it is:\n```python\ndef f():\n    return 1\n```\nThat is all.\n[DONE]")
        'def f():\n    return 1\n'
    """
    text = text.replace("\r\n", "\n")
    text = text.split("[DONE]")[0].split("[BEGIN]")[-1]
    if block := _FENCE.search(text):
        text = block[1]
    return text.strip("\n").rstrip() + "\n" if text.strip() else ""


def cruxeval_answer(text: str, mode: Mode) -> str:
    r"""Returns the answer in a reply to CRUXEval's prompts, by the rules of the benchmark's own harness.

    The reply ends at ``[/ANSWER]``, and starts after ``[ANSWER]`` where the model thought aloud first. An
    output is what stands after the first ``==`` (up to a second one), an input the call before it and after
    ``assert f``, from that ``f`` on.

    Args:
        text: The reply, without the prompt.
        mode: What was asked for.

    Returns:
        An expression: the output's literal, or the call ``f(...)`` with the input.

    Raises:
        LoPAError: If ``mode`` is unknown.

    Example:
        >>> cruxeval_answer("assert f(17) == 18\n[/ANSWER]", "output")
        '18'
        >>> cruxeval_answer("assert f(17) == 18\n[/ANSWER]", "input")
        'f(17)'
    """
    one_of("mode", mode, get_args(Mode))
    text = text.split("[/ANSWER]")[0]
    if "[ANSWER]" in text:
        text = text.split("[ANSWER]")[1]
    if "==" in text:
        text = text.split("==")[1 if mode == "output" else 0]
    if mode == "input" and "assert f" in text:
        text = "f" + text.split("assert f")[1].strip()
    return text.strip()


def mbpp_program(code: str, tests: Sequence[str], setup: str = "") -> str:
    r"""Joins a solution of an MBPP problem and the problem's tests.

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


def is_skipped(input: str, answer: str, mode: Mode) -> bool:
    """Returns whether CRUXEval's own harness skips an answer, without running it.

    It skips an answer that is no call of ``f`` where an input was asked for, and one that repeats the call where its
    value was asked for. Neither is ever right; how they count is said by
    :class:`~lopa_lightning.metrics.pass_at_k.PassAtK`.

    Args:
        input: The arguments that the data set has.
        answer: What :func:`cruxeval_answer` found.
        mode: What was asked for.

    Raises:
        LoPAError: If ``mode`` is unknown.
    """
    one_of("mode", mode, get_args(Mode))
    return "f(" not in answer if mode == "input" else f"f({input})" in answer


def cruxeval_answer_program(code: str, input: str, output: str, answer: str, mode: Mode) -> str:
    r"""Joins CRUXEval's function and a model's answer, by the rules of the benchmark's own harness.

    Args:
        code: The function ``f``.
        input: The arguments that the data set has.
        output: The literal that the data set has.
        answer: What :func:`cruxeval_answer` found.
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

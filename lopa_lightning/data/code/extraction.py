"""The answer in what a model wrote, as each benchmark reads it. Nothing here runs or parses it with Python's parser."""

from __future__ import annotations

import re
from typing import Literal, get_args

from lopa_lightning.errors import LoPAError

Mode = Literal["input", "output"]

# A string that is not closed ends with its line, or with the text if it has three quotes.
_TOKEN = re.compile(
    r"""
    (?P<skip> \#[^\n]* | \\\n
      | \"{3} (?: \\. | [^\\] | \\\Z )*? (?: \"{3} | \Z )
      | '{3} (?: \\. | [^\\] | \\\Z )*? (?: '{3} | \Z )
      | " (?: \\. | [^"\\\n] )* "?
      | ' (?: \\. | [^'\\\n] )* '? )
    | (?P<open> [(\[{] ) | (?P<close> [)\]}] ) | (?P<newline> \n )
    """,
    re.VERBOSE | re.DOTALL,
)
_FENCE = re.compile(r"```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
_INDENT = re.compile(r"[ \t]*")


def first_function(completion: str) -> str:
    r"""The rest of a function whose signature and docstring were the prompt, cut where the function ends.

    It ends before the first line of code that is not indented; where a bracket or a string is open, no line
    ends. The first line goes on with the prompt's last one, so it belongs to the function in any case.

    Args:
        completion: What the model wrote after the docstring.

    Returns:
        The completion up to the end of the function, ending with a line break; without blank and comment
        lines between it and what follows.

    Example:
        >>> first_function("\n    return a + b\n\n\ndef g():\n    pass")
        '\n    return a + b\n'
    """
    text = completion.replace("\r\n", "\n").replace("\r", "\n")
    depth, end, last = 0, len(text), -1  # last: where the last line of code ended, while none has followed
    for token in _TOKEN.finditer(text):
        if token["open"]:
            depth += 1
        elif token["close"]:
            depth = max(depth - 1, 0)
        elif token["newline"] and depth == 0:
            last = token.end() if last < 0 else last
            indent = _INDENT.match(text, token.end())
            start = indent.end() if indent else token.end()
            if start == len(text) or text[start] in "#\n":
                continue
            if start == token.end():
                end = last
                break
            last = -1
    body = text[:end].rstrip()
    return body + "\n" if body else ""


def code_block(text: str) -> str:
    r"""The program in an answer to a prompt in words.

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
    r"""The answer in a reply to CRUXEval's prompts, by the rules of the benchmark's own harness.

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
    if mode not in get_args(Mode):
        raise LoPAError(f"mode must be one of {', '.join(get_args(Mode))}, got {mode!r}")
    text = text.split("[/ANSWER]")[0]
    if "[ANSWER]" in text:
        text = text.split("[ANSWER]")[1]
    if "==" in text:
        text = text.split("==")[1 if mode == "output" else 0]
    if mode == "input" and "assert f" in text:
        text = "f" + text.split("assert f")[1].strip()
    return text.strip()

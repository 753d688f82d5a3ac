"""Talks with a checkpoint of a language model, line by line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence

from lopa_lightning.command_line.parser import Options
from lopa_lightning.errors import LoPAError, at_least
from lopa_lightning.modules import CausalLMModule, LoPALightningModule
from lopa_lightning.serving.device import best_device
from lopa_lightning.signals import stoppable

_AGAIN = "/new"


def options() -> argparse.ArgumentParser:
    """Returns what reads the options."""
    parser = Options("chat", "Answers each line that is read; ends with Ctrl-D.")
    parser.add_argument("--ckpt_path", required=True, help="checkpoint, or folder of a bundle")
    parser.add_argument("--max_new_tokens", type=int, help="tokens of an answer at most (default: the module's)")
    return parser


def main(args: Sequence[str]) -> None:
    """Runs ``lopa chat``.

    Args:
        args: What follows on the command line.

    Raises:
        LoPAError: If the checkpoint cannot be used, or is none of a language model.
    """
    given = options().parse_args(args)
    at_least(1, max_new_tokens=given.max_new_tokens)
    with stoppable():
        module = LoPALightningModule.load_from_checkpoint(given.ckpt_path)
        if not isinstance(module, CausalLMModule):
            raise LoPAError(f"{type(module).__name__} generates no text; lopa predict answers for texts and files")
        module.to(best_device())
    generation = {} if given.max_new_tokens is None else {"max_new_tokens": given.max_new_tokens}
    try:
        for answer in answers(module, _lines(), generation):
            print(answer, flush=True)
    except KeyboardInterrupt:
        print()


def answers(module: CausalLMModule, lines: Iterable[str], generation: dict[str, int]) -> Iterator[str]:
    """Yields the answer to each line.

    Where the soft prompt stands in a chat, a line goes on with the chat so far, and ``/new`` begins another one.
    Otherwise each line is a prompt of its own, which the answer continues.

    Args:
        module: Loaded.
        lines: What is said; blank ones are passed over.
        generation: Over the module's own.
    """
    chat: list[dict[str, str]] = []
    is_chat = module.input_spec.chat.holds_prompt
    for line in lines:
        if line.strip() in ("", _AGAIN):
            chat = [] if line.strip() == _AGAIN else chat
            continue
        asked = [*chat, {"role": "user", "content": line}]
        try:
            ((said,),) = module.generate(asked if is_chat else line, generation, 1)
        except LoPAError as error:
            if not chat:
                raise
            sys.stderr.write(f"error: {error}{f'; {_AGAIN} begins another chat' if is_chat else ''}\n")
            continue
        chat = [*asked, {"role": "assistant", "content": said.strip()}]
        yield said.strip()


def _lines() -> Iterator[str]:
    """Yields the lines of the standard input, with a prompt on a terminal."""
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return

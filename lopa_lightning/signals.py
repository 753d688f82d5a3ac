"""Ends the program where SIGTERM or Ctrl-C asks for it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from lightning.pytorch.utilities.exceptions import SIGTERMException

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(SIGTERMException):
    """Says that a signal has ended a run, with 128 + the signal's number as exit status, as for a shell.

    Attributes:
        number: The signal's.
        outcome: What was saved, and how to go on.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number
        self.outcome = "nothing was there to save"

    def __str__(self) -> str:
        return f"ended by {signal.Signals(self.number).name}: {self.outcome}"


class StopHandler:
    """Ends the process that made it, not its forks: a loader's workers end with the process that they work for.

    Args:
        waits: Is given the signal's number; says whether what is at hand is finished first.
    """

    def __init__(self, waits: Callable[[int], bool] = lambda number: False) -> None:
        self._waits, self._process = waits, os.getpid()

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handles a signal.

        Raises:
            Stopped: If nothing is to be finished.
        """
        if os.getpid() == self._process and not self._waits(number):
            raise Stopped(number)


def is_ours_to_handle(handler: Any) -> bool:
    """Returns whether a signal has no handler that the calling program chose, nor is ignored, as after ``nohup``."""
    return handler in (signal.SIG_DFL, signal.default_int_handler) or isinstance(handler, StopHandler)


@contextmanager
def stoppable() -> Iterator[None]:
    """Lets SIGTERM and Ctrl-C raise :class:`Stopped` within the block."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    if threading.current_thread() is not threading.main_thread():  # Python lets no other thread set handlers
        before = {}
    before = {number: handler for number, handler in before.items() if is_ours_to_handle(handler)}
    for number in before:
        signal.signal(number, StopHandler())
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

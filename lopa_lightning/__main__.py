"""Runs ``lopa``, also as ``python -m lopa_lightning``; its imports take seconds, in which it can be stopped as well."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

from lopa_lightning.command_line.front import answer


def main() -> None:
    """Runs ``lopa``."""
    answer(sys.argv[1:])
    numbers = [number for number in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, _end) for number in numbers}
    from lopa_lightning.cli import main as run

    for number, handler in before.items():
        signal.signal(number, handler)
    run()


def _end(number: int, frame: FrameType | None) -> None:
    # No exception: within an import it may be taken for the module's.
    sys.stderr.write(f"ended by {signal.Signals(number).name}: nothing was there to save\n")
    sys.stderr.flush()
    os._exit(128 + number)


if __name__ == "__main__":
    main()

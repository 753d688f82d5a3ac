"""What the commands of this folder share: options, and the device that answers."""

from __future__ import annotations

import argparse
from typing import NoReturn

import torch

from lopa_lightning.command_line.parser import UsageError


class Options(argparse.ArgumentParser):
    """Reads a command line, and raises what is wrong as a :class:`UsageError`, in one line.

    Args:
        command: Of ``lopa``.
        description: What it does.
    """

    def __init__(self, command: str, description: str) -> None:
        super().__init__(f"lopa {command}", description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raises the error."""
        raise UsageError(f"{message} ({self.prog} --help)")


def best_device() -> torch.device:
    """Returns the machine's accelerator; the CPU where there is none."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu") if found is None else found

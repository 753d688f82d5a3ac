"""Chooses the device that answers."""

from __future__ import annotations

import torch

from lopa_lightning.errors import LoPAError, one_line


def best_device() -> torch.device:
    """Returns the machine's accelerator; the CPU where there is none."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu") if found is None else found


def usable(name: str) -> str:
    """Returns the name of a device.

    Raises:
        LoPAError: If there is none of this name here.
    """
    try:
        torch.empty(1, device=name).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch raises one or another
        raise LoPAError(f"device {name!r} cannot be used: {one_line(error)}") from error
    return name

"""Chooses the device that answers."""

from __future__ import annotations

import torch


def best_device() -> torch.device:
    """Returns the machine's accelerator; the CPU where there is none."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu") if found is None else found

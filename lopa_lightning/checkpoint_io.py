"""Writes and reads checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.strategies import Strategy

from lopa_lightning.checkpoint import read
from lopa_lightning.errors import LoPAError
from lopa_lightning.files import causes_of, replacing


class WholeFiles(TorchCheckpointIO):
    """Keeps checkpoints that are whole or not there, however a write ends.

    Lightning's own goes by the system's folder for temporary files, and from there to another file
    system a rename is a copy, which a killed process leaves half done under the checkpoint's name.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Writes a checkpoint.

        Raises:
            LoPAError: If it cannot be written; what was there before is as it was.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        try:
            with replacing(path) as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:  # torch's writer makes one of the other
            causes = (cause.strerror for cause in causes_of(error) if isinstance(cause, OSError))
            reason = next(filter(None, causes), str(error).splitlines()[0])
            kept = "the one before is kept" if path.is_file() else "there is none yet"
            raise LoPAError(f"checkpoint {str(path)!r} cannot be written ({reason}); {kept}") from error

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """Reads a checkpoint; nothing in it is run.

        Raises:
            LoPAError: If it is not there, is damaged, or is not a checkpoint of this package.
        """
        return read(path, map_location)


def write_whole_checkpoints(strategy: Strategy) -> None:
    """Lets a strategy write checkpoints that are whole or not there, unless it was given a way of its own.

    Args:
        strategy: A Trainer's.
    """
    if type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = WholeFiles()

"""The checkpoint that a run goes on from, whatever ended it."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lopa_lightning.errors import LoPAError


class LastCheckpoint(ModelCheckpoint):
    """Keeps the last state of a run: at the end of each epoch, every so many steps, and on SIGTERM.

    Args:
        dirpath: Folder; by default the run's.
        filename: Name of the file, without its ending.
        every_n_train_steps: Steps between saves within an epoch; None for none.
        **kwargs: See Lightning's ``ModelCheckpoint``.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        filename: str = "last",
        every_n_train_steps: int | None = None,
        **kwargs: Any,
    ) -> None:
        options = {"enable_version_counter": False, "save_on_train_epoch_end": True, **kwargs}
        super().__init__(dirpath, filename, every_n_train_steps=every_n_train_steps, **options)
        self._end = self._requeue = 0

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Checks that checkpoints can be written, before anything is trained.

        Raises:
            LoPAError: If not.
        """
        super().setup(trainer, pl_module, stage)
        if stage != "fit" or trainer.fast_dev_run or "://" in str(self.dirpath):
            return
        folder = Path(str(self.dirpath))
        try:
            if trainer.is_global_zero:
                folder.mkdir(parents=True, exist_ok=True)
                writable = os.access(folder, os.W_OK)
            else:
                writable = True
        except OSError:
            writable = False
        if not writable:
            raise LoPAError(f"checkpoints cannot be written to {str(folder)!r}: not a folder that this user may write")

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Lets signals ask for something after the step at hand, instead of doing it anywhere.

        Lightning's own handlers save, and talk to the other processes, from within whatever these are
        sending each other, each at a step of its own.
        """
        super().on_train_start(trainer, pl_module)
        connector = trainer._signal_connector
        self._end = self._requeue = 0

        def end(number: int, frame: FrameType | None) -> None:
            if not self._end and trainer.strategy.launcher is not None:
                trainer.strategy.launcher.kill(number)
            self._end = number

        def requeue(number: int, frame: FrameType | None) -> None:
            self._requeue = number

        if not callable(connector._original_handlers.get(signal.SIGTERM)):  # else it is the calling program's
            connector._register_signal(signal.SIGTERM, end)
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue and environment.requeue_signal:
            connector._register_signal(environment.requeue_signal, requeue)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Saves where it is time to, and does on all processes what a signal to one has asked for.

        Raises:
            SIGTERMException: If the run is to end.
        """
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        asked = torch.tensor([float(self._end), float(self._requeue)], device=pl_module.device)
        end, requeue = trainer.strategy.reduce(asked, reduce_op="sum").tolist()
        if requeue:
            self._requeue = 0
            trainer._signal_connector._slurm_sigusr_handler_fn(signal.SIGUSR1, None)
        if end:
            raise SIGTERMException

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Saves, also where it saves by steps too."""
        super().on_train_epoch_end(trainer, pl_module)
        if self._every_n_train_steps and not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Saves where the run was asked to end, which all processes are at the same step. No other error is worth it.

        A step that failed may have spoilt what is trained.
        """
        if isinstance(exception, SIGTERMException) and not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

"""Keeps a run's checkpoints: the best, and the one to go on from, whatever ended the run."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from lopa_lightning.callbacks.run_folder import RunLogger, start_run
from lopa_lightning.errors import LoPAError
from lopa_lightning.files import Claim, clear_unfinished
from lopa_lightning.signals import SIGNALS, StopHandler, Stopped, is_ours_to_handle


class BestCheckpoint(ModelCheckpoint):
    """Keeps the best checkpoints as Lightning does, but none whose score is NaN or infinite.

    Args:
        dirpath: Folder; by default the run's.
        filename: Name of the files, without their ending.
        save_top_k: How many are kept; -1 for all.
        enable_version_counter: Whether files of one name are numbered.
        **kwargs: See Lightning's ``ModelCheckpoint``.

    Raises:
        LoPAError: If several are to be kept under one name, where each would replace the one before.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        filename: str | None = None,
        save_top_k: int = 1,
        enable_version_counter: bool = True,
        **kwargs: Any,
    ) -> None:
        if save_top_k not in (0, 1) and not enable_version_counter and filename is not None and "{" not in filename:
            raise LoPAError(
                f"save_top_k {save_top_k} needs a filename with a field, such as 'best-{{step}}', got {filename!r}"
            )
        super().__init__(
            dirpath, filename, save_top_k=save_top_k, enable_version_counter=enable_version_counter, **kwargs
        )

    def check_monitor_top_k(self, trainer: Any, current: Tensor | None = None) -> bool:
        """Returns whether a score is among the best so far.

        Args:
            trainer: The Trainer.
            current: The score.
        """
        return current is not None and bool(current.isfinite()) and super().check_monitor_top_k(trainer, current)


def best_checkpoint(trainer: Any) -> ModelCheckpoint | None:
    """Returns what keeps a run's best checkpoint: ours, or else the first that is not for going on; None without any.

    Args:
        trainer: Of the run.
    """
    kept = [each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)]
    kept = [each for each in kept if not isinstance(each, LastCheckpoint)]
    return next((each for each in kept if isinstance(each, BestCheckpoint)), kept[0] if kept else None)


class LastCheckpoint(ModelCheckpoint):
    """Keeps the last state of a run, and saves it when SIGTERM or Ctrl-C ends the run.

    It is saved before each validation, at the end of each epoch, and every so many steps.

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
        self._end = self._requeue = self._saved_step = 0
        self._claims: list[Claim] = []

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Makes sure that no other run writes to the same folder, and no other callback to the same file.

        Raises:
            LoPAError: If not.
        """
        asked = self.dirpath
        super().setup(trainer, pl_module, stage)
        for other in (each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)):
            is_here = asked is None if other.dirpath is None else str(other.dirpath) == str(self.dirpath)
            names = {other.filename, other.CHECKPOINT_NAME_LAST if other.save_last else None}
            if other is not self and is_here and self.filename in names:
                raise LoPAError(f"two checkpoints would be one file, {self.filename}.ckpt: give one another filename")
        self._end = self._requeue = self._saved_step = 0
        if stage != "fit" or trainer.fast_dev_run or not trainer.is_global_zero:
            return
        runs = trainer.logger.folder if isinstance(trainer.logger, RunLogger) else None
        given = {str(each.dirpath) for each in trainer.checkpoint_callbacks if each.dirpath is not None}
        for folder in sorted(path for path in given if "://" not in path):
            if runs is None or Path(runs) not in Path(folder).parents:  # else it is made for this run alone
                self._claims.append(Claim(Path(folder), "dirpath"))
                clear_unfinished(Path(folder))

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Lets other runs have the folders."""
        while self._claims:
            self._claims.pop().release()

    def _take_signals(self, trainer: Any, pl_module: Any) -> None:
        """Lets signals end a step when it is done, and anything else at once.

        Lightning's own handlers save, and talk to the other processes, from within whatever these are
        sending each other, each at a step of its own; and ``predict`` does not look at them.
        """
        connector, launcher = trainer._signal_connector, trainer.strategy.launcher

        def waits(number: int) -> bool:
            first, self._end = not self._end, self._end or number
            if first and number == signal.SIGTERM and launcher is not None:
                launcher.kill(number)  # a terminal sends SIGINT to all processes itself
            return trainer.training if first else number == signal.SIGTERM  # which may well come twice

        def requeue(number: int, frame: FrameType | None) -> None:
            self._requeue = number

        for number in SIGNALS:
            if is_ours_to_handle(connector._original_handlers.get(number)):
                connector._register_signal(number, StopHandler(waits))
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue and environment.requeue_signal:
            connector._register_signal(environment.requeue_signal, requeue)

    on_test_start = on_predict_start = _take_signals

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Makes the run's folder, and takes over the signals."""
        start_run(trainer)
        super().on_train_start(trainer, pl_module)
        self._take_signals(trainer, pl_module)

    def _asked(self, trainer: Any, pl_module: Any) -> int:
        """Does what SLURM has asked for, and returns the signal that is to end the run, or 0: on all processes alike.

        All are at the same step.
        """
        end, requeue = self._end, self._requeue
        if trainer.world_size > 1:  # else nothing waits for the device
            asked = torch.tensor([float(end), float(requeue)], device=pl_module.device)
            end, requeue = map(int, trainer.strategy.reduce(asked, reduce_op="max").tolist())
        if requeue:
            self._requeue = 0
            trainer._signal_connector._slurm_sigusr_handler_fn(signal.SIGUSR1, None)
        return end

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Says what is left of a run that was asked to end. No other error is worth a checkpoint.

        A step that failed may have spoilt what is trained.
        """
        if isinstance(exception, Stopped):
            if self._saved_step:
                path = self.best_model_path
                exception.outcome = (
                    f"{path} holds step {self._saved_step}, and the same command with --ckpt_path {path} goes on there"
                )
        elif isinstance(exception, SIGTERMException) and trainer.training:  # the calling program handles SIGTERM
            self._save(trainer)
        self.teardown(trainer, pl_module, "fit")  # Lightning does not call it

    def _save(self, trainer: Any) -> None:
        """Saves even what was saved at the same step: a validation or an epoch may have ended since."""
        self._last_global_step_saved = 0
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    def _save_checkpoint(self, trainer: Any, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        self._saved_step = trainer.global_step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Saves where it is time to, and after the step in which a signal has asked the run to end.

        Raises:
            Stopped: If the run is to end.
        """
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        is_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch
        if is_step and (end := self._asked(trainer, pl_module)):
            self._save(trainer)
            raise Stopped(end)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Saves, so that a signal may end a validation anywhere, and on each process for itself."""
        self._take_signals(trainer, pl_module)
        self._save(trainer)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Saves, also where it saves by steps too."""
        self._last_global_step_saved = 0  # before the validation, which has ended since
        super().on_train_epoch_end(trainer, pl_module)
        if self._every_n_train_steps:
            self._save(trainer)

"""Makes a run's folder when the run starts, and for it alone."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyExperiment, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from lopa_lightning.files import clear_unfinished, is_full_disk, name_file


class RunLogger(TensorBoardLogger):
    """Logs to TensorBoard, in a folder that is made when a run starts, and that no other run gets.

    Lightning's makes it before anything is checked, and two runs that are started together get the same one.
    Arguments are Lightning's.
    """

    _is_started = _is_free = False

    @property
    def version(self) -> int | str:
        """Returns the run's number, which may change until it starts, or what the user gave."""
        if self._version is None:
            self._version, self._is_free = self._get_next_version(), True
        return self._version

    @property
    def folder(self) -> str:
        """Returns the run's folder."""
        version = self.version if isinstance(self.version, str) else f"version_{self.version}"
        return os.path.join(self.save_dir, self.name, version)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """Returns TensorBoard's writer; before the run's start one that writes nothing."""
        return super().experiment if self._is_started else DummyExperiment()

    @rank_zero_only
    def start(self) -> None:
        """Makes the folder; where another run has made it meanwhile, it is the next one's."""
        while not self._is_started:
            try:
                if "://" not in self.folder:
                    Path(self.folder).mkdir(parents=True, exist_ok=not self._is_free)
                self._is_started = True
            except FileExistsError:
                if not self._is_free:
                    raise
                self._version = self._get_next_version()
        self.save()

    @rank_zero_only
    def save(self) -> None:
        """Writes what is logged, once there is a folder."""
        if self._is_started:
            super().save()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Closes the files; on a full disk that fails, too, and is not what a run has failed with."""
        with suppress(*([OSError] if status == "failed" else [])):
            super().finalize(status)

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Logs numbers, which only a run has that has started."""
        self.start()
        super().log_metrics(metrics, step)


def start_run(trainer: Any) -> None:
    """Makes the run's folder, in which its checkpoints go, and clears what runs beside it left that were killed.

    Args:
        trainer: Of the run; all its processes call this, as often as they like.
    """
    logger = trainer.logger
    if not isinstance(logger, RunLogger):
        return
    planned = trainer.strategy.broadcast(logger.folder)
    logger.start()
    logger._version, folder = trainer.strategy.broadcast((logger.version, logger.folder))
    for callback in trainer.checkpoint_callbacks:
        path = str(callback.dirpath)
        if folder != planned and path.startswith(os.path.join(planned, "")):
            callback.dirpath = folder + path[len(planned) :]
    if trainer.is_global_zero and "://" not in folder:
        for checkpoints in Path(folder).parent.glob("*/checkpoints"):
            clear_unfinished(checkpoints)


class RunConfig(SaveConfigCallback):
    """Saves the configuration in the run's folder when the run starts."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leaves it for later: much may still be refused."""

    def _start(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking and not self.already_saved:
            start_run(trainer)
            log_dir = trainer.log_dir
            path = os.path.join(log_dir or trainer.default_root_dir, self.config_filename)
            # Other loggers, or none, have one folder for all runs, in which a file may be the user's own.
            self.overwrite = isinstance(trainer.logger, TensorBoardLogger | CSVLogger)
            self.already_saved = trainer.strategy.broadcast(not self.overwrite and os.path.exists(path))
            if self.already_saved:
                rank_zero_warn(f"{path} is there already and stays as it is: the run's configuration is not saved")
            if log_dir is None and not self.already_saved:  # of a logger without a folder, as Lightning has them
                self.save_to_log_dir = False
                if trainer.is_global_zero:
                    os.makedirs(os.path.dirname(path), exist_ok=True)
                    self.parser.save(self.config, path, skip_none=False, multifile=False)
            super().setup(trainer, pl_module, str(trainer.state.fn))

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Names the run's folder where a disk is full, which TensorBoard's writer does not."""
        if is_full_disk(exception) and isinstance(trainer.logger, RunLogger):
            name_file(exception, f"{trainer.logger.folder}, which trainer.logger.init_args.save_dir moves")

    on_train_start = on_validation_start = on_test_start = on_predict_start = _start

"""Runs ``lopa``: fit, validate, test, predict, compare, sweep and plan from YAML."""

from __future__ import annotations

import glob
import importlib
import logging
import os
import re
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import Callback, ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lopa_lightning import checkpoint
from lopa_lightning.callbacks import (
    BestCheckpoint,
    EpochBar,
    FitSummary,
    LastCheckpoint,
    PredictionWriter,
    PromptMonitor,
    RunConfig,
    RunRecord,
)
from lopa_lightning.callbacks.defaults import BEST, LAST
from lopa_lightning.command_line.front import answer, home_of
from lopa_lightning.command_line.messages import folded
from lopa_lightning.command_line.parser import Parser, UsageError
from lopa_lightning.command_line.ranges import check_options, expand_home
from lopa_lightning.errors import LoPAError
from lopa_lightning.files import is_full_disk
from lopa_lightning.modules import LoPALightningModule
from lopa_lightning.signals import Stopped, stoppable
from lopa_lightning.strategies import check_strategy

_TRAINER_DEFAULTS: dict[str, Any] = {
    "logger": {
        "class_path": "lopa_lightning.callbacks.RunLogger",
        "init_args": {"save_dir": "runs", "name": "lopa", "default_hp_metric": False},
    },
    "log_every_n_steps": 10,
    "enable_model_summary": False,  # FitSummary has a table
}

_EXPECTED_WARNINGS = (
    r"Found \d+ module\(s\) in eval mode",  # the frozen ones, as they should be
    r".*does not have many workers",  # batches of token ids are made faster than they could be handed over
    r"The dirpath has changed",  # of course: another run's checkpoint is evaluated
    r"`isinstance\(treespec, LeafSpec\)`",  # Lightning's own use of torch
    r"FSDP2-wrapped module \(FSDPPromptedModel\) returned a view",  # nothing writes to outputs in place
)


class TaskParser(Parser, LightningArgumentParser):
    """Parses the options of a task: those of a model, of data and of a Trainer."""


class CountingTrainer(Trainer):
    """Lightning's Trainer, whose numbers of batches are read as whole numbers first.

    ``typing`` may give an annotation of ``Union[int, float]`` back as the ``Union[float, int]`` that another library
    made before; 1 batch would then be read as the share 1.0, which is all of them.
    """

    def __init__(
        self,
        *,
        limit_train_batches: int | float | None = None,
        limit_val_batches: int | float | None = None,
        limit_test_batches: int | float | None = None,
        limit_predict_batches: int | float | None = None,
        overfit_batches: int | float = 0.0,
        val_check_interval: int | float | str | timedelta | dict[str, int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            limit_train_batches=limit_train_batches,
            limit_val_batches=limit_val_batches,
            limit_test_batches=limit_test_batches,
            limit_predict_batches=limit_predict_batches,
            overfit_batches=overfit_batches,
            val_check_interval=val_check_interval,
            **kwargs,
        )


class LoPACLI(LightningCLI):
    """Lightning's CLI with our defaults: prompt-only checkpoints by score, TensorBoard, prediction files.

    Args:
        args: Arguments; None for the command line's.
        callbacks: More callbacks of the trainer, beside the configuration's.
        **kwargs: See Lightning.
    """

    _saved: dict[str, Any] | None

    def __init__(self, args: ArgsType = None, callbacks: Sequence[Callback] = (), **kwargs: Any) -> None:
        given = sys.argv[1:] if args is None else args
        first = given[0] if isinstance(given, list) and given else None
        self._asked_for = first if first in self.subcommands() else None
        super().__init__(
            LoPALightningModule,
            LightningDataModule,
            trainer_class=CountingTrainer,
            args=args,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            seed_everything_default=42,
            trainer_defaults={**_TRAINER_DEFAULTS, "callbacks": list(callbacks)},
            parser_class=TaskParser,
            save_config_callback=RunConfig,
            save_config_kwargs={"overwrite": True},
            **kwargs,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the callbacks that every run has; each is configured by a key of its own."""
        parser.add_lightning_class_args(BestCheckpoint, "checkpoint")
        parser.add_lightning_class_args(LastCheckpoint, "last_checkpoint")
        parser.add_lightning_class_args(PromptMonitor, "monitor")
        parser.add_lightning_class_args(PredictionWriter, "predictions")
        parser.add_lightning_class_args(FitSummary, "summary")
        for name, defaults in (("checkpoint", BEST), ("last_checkpoint", LAST)):
            parser.set_defaults({f"{name}.{key}": value for key, value in defaults.items()})

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """Leaves the parsers of subcommands that are not asked for empty: each takes a tenth of a second to build."""
        if self._asked_for in (None, subcommand):
            return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        return self.init_parser(**kwargs)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parses the command line, and refuses what cannot be right before anything is built.

        Raises:
            LoPAError: If a number is out of range or a strategy cannot serve.
            UsageError: If the command line, or a file that it names, is wrong in another way.
        """
        self.config = parser.parse_args(args) if args is None or isinstance(args, list) else parser.parse_object(args)
        if self.config.get("subcommand"):
            expand_home(self.config[self.config.subcommand])
            check_options(self.config[self.config.subcommand])

    def instantiate_classes(self) -> None:
        """Builds model, data, callbacks and Trainer; none of them reads weights yet.

        Raises:
            LoPAError: If one of their classes refuses an option; the message names it and its value.
        """
        try:
            super().instantiate_classes()
        except (ImportError, TypeError, ValueError, MisconfigurationException) as error:
            if expected_cause(error) is not None and not isinstance(error, MisconfigurationException):
                raise
            raise LoPAError(self._refused(error)) from error
        # So that one that does not fit is refused before weights are read.
        self.model.will_load = self._saved
        self._saved = None

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Builds the Trainer, with a progress bar that counts epochs from 1 where no other one is given."""
        given = self._get(self.config_init, "trainer", default={})
        callbacks = given.get("callbacks") or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        if given.get("enable_progress_bar") is not False and not any(
            isinstance(each, ProgressBar) for each in callbacks
        ):
            callbacks = [*callbacks, EpochBar()]
        trainer = super().instantiate_trainer(callbacks=callbacks, **kwargs)
        check_strategy(trainer.strategy)  # before there are other processes, whose errors are long
        return trainer

    def _refused(self, error: Exception) -> str:
        """Says what a class of another library refuses, with the options of the Trainer that it names."""
        causes = [error]
        while isinstance(cause := causes[-1].__cause__, Exception):
            causes.append(cause)
        missing = [cause for cause in causes if isinstance(cause, ImportError)]
        said = folded(str((missing or causes)[-1]))
        trainer = self.config[self.subcommand].trainer if self.subcommand else self.config.trainer
        named = [name for name in re.findall(r"\w+", said) if isinstance(trainer.get(name), (str, int, float, list))]
        named = [name for name in named if str(trainer[name]) not in said]
        given = ", ".join(f"trainer.{name} {trainer[name]}" for name in dict.fromkeys(named))
        return f"{given}: {said}" if given else said

    def before_instantiate_classes(self) -> None:
        """Refuses a checkpoint that is wrong before anything is built or loaded, and says where runs go."""
        self._saved = None
        if self.subcommand is None:
            return
        config = self.config[self.subcommand]
        logger, usual = config.trainer.logger, _TRAINER_DEFAULTS["logger"]["init_args"]["save_dir"]
        is_usual = isinstance(logger, Namespace) and (logger.get("init_args") or {}).get("save_dir") == usual
        if config.trainer.default_root_dir and is_usual:
            logger.init_args.save_dir = config.trainer.default_root_dir
        kinds = {"best": config.checkpoint, "last": config.last_checkpoint}
        if config.get("ckpt_path") in kinds:
            config.ckpt_path = self._newest(config, kinds[config.ckpt_path])
        if (path := config.get("ckpt_path")) is not None:
            self._saved = checkpoint.read(path)

    def before_test(self) -> None:
        """Tells the module whether a checkpoint will be loaded, so that it need not read weights to refuse."""
        self.model.awaits_checkpoint = self.config_init[self.subcommand].get("ckpt_path") is not None

    before_predict = before_test

    def _newest(self, config: Any, kept: Any) -> str | None:
        """Returns the newest ``best`` or ``last`` checkpoint under the folder that runs go to.

        Lightning would look in the new run's folder alone. None where ``fit`` finds no ``last`` one yet.
        """
        logger = config.trainer.logger
        options = (logger.get("init_args") if isinstance(logger, Namespace) else None) or {}
        save_dir = options.get("save_dir") or config.trainer.default_root_dir or "."
        folder, name = Path(kept.dirpath or Path(save_dir, options.get("name") or "")), f"{kept.filename}.ckpt"
        found = [path for path in folder.rglob(glob.escape(name)) if path.is_file()]
        if found:
            newest = str(max(found, key=lambda path: path.stat().st_mtime))
            rank_zero_info(f"--ckpt_path {config.ckpt_path} is {newest}")
            return newest
        if self.subcommand != "fit" or config.ckpt_path != "last":
            raise LoPAError(f"no checkpoint {name} under {folder}; name one with --ckpt_path")
        rank_zero_warn(f"no checkpoint {name} under {folder} yet: the run starts from scratch")
        return None

    def after_fit(self) -> None:
        """Writes the result of a run that is one of many."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, RunRecord):
                callback.finish(self.trainer, self.model, self.datamodule)

    def _parse_ckpt_path(self) -> None:
        """Leaves the configuration alone.

        Lightning would put the checkpoint's hyperparameters over it, without a word. Here the
        configuration says what is run, and a checkpoint that does not fit is refused.
        """


def main(args: Sequence[str] | None = None) -> None:
    """Runs ``lopa``. Set ``LOPA_TRACEBACK=1`` in the environment to see where an error was raised.

    Args:
        args: Arguments; None for the command line's.
    """
    given = sys.argv[1:] if args is None else args
    try:
        answer(given)
        given = ["--help" if each == "--help.all" else each for each in given]
        with _said_shortly():
            if (home := home_of(given)) is None:
                with stoppable():
                    LoPACLI(args=given)
            else:  # imported when asked for: the modules of experiments run this command line
                importlib.import_module(f"lopa_lightning.{home}").main(given[1:])
    except Stopped as stopped:
        rank_zero_only(sys.stderr.write)(f"{stopped}\n")
        raise
    except UsageError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from None
    except Exception as error:
        expected = expected_cause(error)
        if expected is None or os.environ.get("LOPA_TRACEBACK"):
            raise
        hint = "" if isinstance(expected, LoPAError) or is_full_disk(expected) else " (LOPA_TRACEBACK=1 shows where)"
        sys.stderr.write(f"error: {folded(str(expected))}{hint}\n")
        raise SystemExit(1) from error


@contextmanager
def _said_shortly() -> Iterator[None]:
    """Shows a warning as its text alone, and neither what Lightning warns of in every run of ours nor what it sells.

    Leaves a full disk to the error that ends the command: TensorBoard's thread would print a traceback besides.
    """
    format_before, hook = warnings.formatwarning, threading.excepthook
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    ignore_expected_warnings()
    warnings.formatwarning = lambda message, *_, **__: f"warning: {folded(str(message))}\n"
    threading.excepthook = lambda args: None if is_full_disk(args.exc_value) else hook(args)
    logger.addFilter(_is_no_tip)
    try:
        yield
    finally:
        warnings.formatwarning, threading.excepthook = format_before, hook
        logger.removeFilter(_is_no_tip)


def ignore_expected_warnings() -> None:
    """Silences what Lightning says of every run of ours."""
    for message in _EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message)


def _is_no_tip(record: logging.LogRecord) -> bool:
    return "Tip: " not in str(record.msg)


def expected_cause(error: BaseException | None) -> BaseException | None:
    """Returns the expected error behind an exception: the parser wraps what a class raises when it is built.

    Args:
        error: Any.

    Returns:
        A cause whose message says all; None for an error in the program.
    """
    while error is not None and not isinstance(error, (LoPAError, MisconfigurationException, OSError)):
        error = error.__cause__
    return error


if __name__ == "__main__":
    raise SystemExit("error: run `python -m lopa_lightning`")

"""Configurations merged, checked and changed, as plain data."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lopa_lightning.cli import LoPACLI, expected_cause
from lopa_lightning.errors import LoPAError
from lopa_lightning.parsing import UsageError

Config = dict[str, Any]
"""What ``lopa fit`` takes, every option filled in."""


class _Resolver(LoPACLI):
    """Builds everything that ``lopa fit`` builds, and runs nothing."""

    def _set_seed(self) -> None:
        """Leaves the parent's random state and environment alone."""

    def _run_subcommand(self, subcommand: str) -> None:
        self._dump_config()


def resolve(configs: Sequence[str], options: Sequence[str] = ()) -> Config:
    """Merges configurations as ``lopa fit`` does, and builds model, data and trainer to see that it can.

    Nothing is loaded: a missing model or data set shows when it is run.

    Args:
        configs: YAML files, each put over the one before.
        options: Of the command line, put over these.

    Returns:
        The whole configuration.

    Raises:
        LoPAError: If ``lopa fit`` would refuse it.
    """
    arguments = ["fit", *(part for config in configs for part in ("--config", config)), *options]
    try:
        with _quiet():
            resolver = _Resolver(args=arguments)
    except UsageError as error:
        raise LoPAError(str(error)) from None
    except Exception as error:
        raise LoPAError(reason(error)) from error
    dumped: Config = resolver.config_dump
    return dumped


def built(options: Sequence[str]) -> tuple[Any, Any]:
    """Model and data of a configuration, brought together, with nothing loaded.

    Args:
        options: Of ``lopa fit``, ``--config`` included. Devices and strategy are not looked for here;
            precision is the Trainer's.

    Returns:
        The module and the data module.

    Raises:
        LoPAError: If ``lopa fit`` would refuse it.
    """
    here = ("accelerator=cpu", "devices=1", "num_nodes=1", "strategy=auto", "logger=false")
    arguments = ["fit", *options, *(f"--trainer.{option}" for option in here)]
    with _quiet():
        cli = _Resolver(args=arguments)
    module, data = cli.model, cli.datamodule
    cli.trainer.strategy.connect(module)
    cli.trainer._data_connector.attach_data(module, datamodule=data)
    cli.trainer._data_connector.attach_datamodule(data)
    module.setup("fit")
    return module, data


def reason(error: BaseException) -> str:
    """An error in a line.

    Args:
        error: Any.

    Example:
        >>> reason(KeyError("a"))
        "KeyError: 'a'"
        >>> reason(LoPAError("rank must be at least 1"))
        'rank must be at least 1'
    """
    expected = expected_cause(error)
    if expected is not None:
        return " ".join(str(expected).split()) or type(expected).__name__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def with_rates_times(config: Config, factor: float) -> Config:
    """A configuration with every learning rate multiplied: the optimizer's and each group's.

    Args:
        config: As from :func:`resolve`.
        factor: The multiplier.

    Raises:
        LoPAError: If no learning rate is named.
    """
    if factor == 1:
        return config
    changed = copy.deepcopy(config)
    model = changed["model"]["init_args"]
    optimizer = model.get("optimizer")
    if not isinstance(optimizer, dict) or optimizer.get("init_args", {}).get("lr") is None:
        raise LoPAError(f"a rate factor of {factor:g} needs model.init_args.optimizer.init_args.lr, which is not given")
    optimizer["init_args"]["lr"] *= factor
    if model.get("learning_rates"):
        model["learning_rates"] = {name: rate * factor for name, rate in model["learning_rates"].items()}
    return changed


def placed_in(config: Config, folder: Path, record: dict[str, Any]) -> Config:
    """Returns a configuration whose logs, checkpoints and result go into a folder, without progress bars.

    Args:
        config: As from :func:`resolve`.
        folder: The run's.
        record: Arguments of :class:`~lopa_lightning.callbacks.run_record.RunRecord`.
    """
    placed = copy.deepcopy(config)
    trainer = placed["trainer"]
    trainer["default_root_dir"] = str(folder)
    if trainer["logger"]:
        trainer["logger"] = {
            "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
            "init_args": {"save_dir": str(folder), "name": "logs", "version": "", "default_hp_metric": False},
        }
    if trainer["enable_progress_bar"] is None:
        trainer["enable_progress_bar"] = False
    callbacks = trainer["callbacks"] or []
    recorder = {"class_path": "lopa_lightning.callbacks.RunRecord", "init_args": record}
    trainer["callbacks"] = [*(callbacks if isinstance(callbacks, list) else [callbacks]), recorder]
    for name in ("checkpoint", "last_checkpoint"):
        placed[name]["dirpath"] = str(folder / "checkpoints")
    placed["last_checkpoint"]["filename"] = "last"
    return placed


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what a Trainer says of the devices it found."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)

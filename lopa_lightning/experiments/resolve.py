"""Merges, checks and changes configurations, as plain data."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import Any

from lopa_lightning.cli import LoPACLI, expected_cause
from lopa_lightning.command_line.messages import folded
from lopa_lightning.command_line.parser import UsageError
from lopa_lightning.errors import LoPAError

Config = dict[str, Any]
"""What ``lopa fit`` takes, every option filled in."""


_GOES_ON = "each run starts from the beginning, or resumes from its own last checkpoint"
_SCHEDULED = {"max_lr", "base_lr", "min_lr", "eta_min"}
"""Learning rates of torch's schedulers: OneCycleLR, CyclicLR, ReduceLROnPlateau, CosineAnnealingLR."""


class Resolver(LoPACLI):
    """Builds everything that ``lopa fit`` builds, and runs nothing."""

    def _set_seed(self) -> None:
        """Leaves the parent's random state and environment alone."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Keeps the configuration."""
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
        LoPAError: If ``lopa fit`` would refuse it, it validates on nothing, so that it would have no result, or says
            what a run among many has of its own: its folder, its logger, its device, a checkpoint to go on from.
    """
    if given := [option for option in options if option.partition("=")[0] == "--ckpt_path"]:
        raise LoPAError(f"{given[0]}: {_GOES_ON}; leave it out")
    try:
        resolver = _resolver([*(part for config in configs for part in ("--config", config)), *options])
    except UsageError as error:
        raise LoPAError(str(error)) from None
    except Exception as error:
        if (expected := expected_cause(error)) is None:
            raise
        raise LoPAError(folded(str(expected))) from error
    if resolver.trainer.limit_val_batches == 0:
        raise LoPAError("trainer.limit_val_batches must be above 0: a run's result is that of its last validation")
    config: Config = resolver.config_dump
    _check_own(config)
    return config


def _check_own(config: Config) -> None:
    """Raises a LoPAError that names what each run has of its own."""
    trainer, wrong = config["trainer"], None
    logger, devices = trainer.get("logger"), str(trainer.get("devices")).strip("[] ,")
    if config.get("ckpt_path") is not None:
        wrong = f"ckpt_path {config['ckpt_path']}: {_GOES_ON}"
    elif isinstance(logger, list) or (isinstance(logger, dict) and not logger["class_path"].endswith(".RunLogger")):
        wrong = "trainer.logger: each run logs into its folder by TensorBoard, or not at all with logger: false"
    elif folder := next((each for each in _folders(config) if each is not None), None):
        wrong = f"dirpath {folder}: each run has a folder of its own"
    elif "," in devices or (devices.isdecimal() and int(devices) > 1) or int(trainer.get("num_nodes") or 1) > 1:
        wrong = f"trainer.devices {devices} on {trainer.get('num_nodes')} nodes: each run has one device"
    if wrong is not None:
        raise LoPAError(f"{wrong}; leave it out")


def _folders(config: Config) -> list[str | None]:
    """Returns the folder of each checkpoint that is kept; None where none is given."""
    given = config["trainer"].get("callbacks") or []
    options = [each.get("init_args") or {} for each in (given if isinstance(given, list) else [given])]
    return [each.get("dirpath") for each in (config["checkpoint"], config["last_checkpoint"], *options)]


def built(options: Sequence[str]) -> tuple[Any, Any]:
    """Builds model and data of a configuration and brings them together, with nothing loaded.

    Args:
        options: Of ``lopa fit``, ``--config`` included. Devices and strategy are not looked for here;
            precision is the Trainer's.

    Returns:
        The module and the data module.

    Raises:
        LoPAError: If ``lopa fit`` would refuse it.
    """
    here = ("accelerator=cpu", "devices=1", "num_nodes=1", "strategy=auto", "logger=false")
    resolver = _resolver([*options, *(f"--trainer.{option}" for option in here)])
    module, data = resolver.model, resolver.datamodule
    resolver.trainer.strategy.connect(module)
    resolver.trainer._data_connector.attach_data(module, datamodule=data)
    resolver.trainer._data_connector.attach_datamodule(data)
    module.setup("fit")
    return module, data


def with_rates_times(config: Config, multiplier: float) -> Config:
    """Returns a configuration with every learning rate multiplied: each optimizer's, each group's and the schedule's.

    Args:
        config: As from :func:`resolve`.
        multiplier: The multiplier.

    Raises:
        LoPAError: If no learning rate is named.
    """
    changed = copy.deepcopy(config)
    model = changed["model"]["init_args"]
    if multiplier == 1:
        return changed
    by_group = {f"optimizers.{name}": spec for name, spec in (model.get("optimizers") or {}).items()}
    for name, spec in {"optimizer": model.get("optimizer"), **by_group}.items():
        if not isinstance(spec, dict) or spec.get("init_args", {}).get("lr") is None:
            raise LoPAError(f"a rate multiplier of {multiplier:g} needs model.init_args.{name}.init_args.lr, not given")
        spec["init_args"]["lr"] *= multiplier
    if model.get("learning_rates"):
        model["learning_rates"] = {name: rate * multiplier for name, rate in model["learning_rates"].items()}
    scheduled = (model.get("lr_scheduler") or {}).get("init_args") or {}
    for name in _SCHEDULED & {*scheduled}:
        rates = scheduled[name]
        scheduled[name] = [rate * multiplier for rate in rates] if isinstance(rates, list) else rates * multiplier
    return changed


def _resolver(options: Sequence[str]) -> Resolver:
    """Builds everything, without what a Trainer says of the devices it found."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        return Resolver(args=["fit", *options])
    finally:
        logger.setLevel(level)

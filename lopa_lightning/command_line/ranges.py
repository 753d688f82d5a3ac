"""Checks the numbers and paths of a configuration before anything is built."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from jsonargparse import Namespace

from lopa_lightning.errors import LoPAError
from lopa_lightning.strategies import check_strategy_name

_Allowed = tuple[Callable[[Any], bool], str]


def _at_least(least: float, most: float = float("inf")) -> _Allowed:
    text = f"at least {least}" if most == float("inf") else f"from {least} to {most}"
    return lambda value: least <= value <= most and value < float("inf"), text


def _part_of(zero: bool = False) -> _Allowed:
    """Allows a part of an epoch: so many batches, or a share of them."""
    text = "a number of batches or a share up to 1.0" + ("" if zero else ", above 0")
    return lambda value: (value == 0 and zero) or 0 < value <= (1 if isinstance(value, float) else float("inf")), text


_COUNT, _OR_NONE = _at_least(1), _at_least(0)
_ENDLESS = (lambda value: value == -1 or 1 <= value < float("inf"), "at least 1, or -1 for no limit")
_TRAINER = {
    **dict.fromkeys(("max_epochs", "max_steps"), _ENDLESS),
    **dict.fromkeys(("accumulate_grad_batches", "check_val_every_n_epoch", "num_nodes"), _COUNT),
    **dict.fromkeys(("min_epochs", "min_steps", "log_every_n_steps", "reload_dataloaders_every_n_epochs"), _OR_NONE),
    **dict.fromkeys(("gradient_clip_val", "fast_dev_run"), _OR_NONE),
    **dict.fromkeys(("limit_train_batches", "limit_test_batches", "limit_predict_batches"), _part_of()),
    **dict.fromkeys(("limit_val_batches", "overfit_batches"), _part_of(zero=True)),
    "val_check_interval": _part_of(),
    "num_sanity_val_steps": _at_least(-1),
}
_SAVING = dict.fromkeys(("every_n_train_steps", "every_n_epochs"), _COUNT)
_OPTIMIZER: dict[str, _Allowed] = {
    "lr": (lambda value: 0 < value < float("inf"), "above 0, and finite (learning_rates may give a group 0)"),
    "weight_decay": _OR_NONE,
}
_ALLOWED: dict[str, dict[str, _Allowed]] = {
    "": {"seed_everything": _at_least(0, 2**32 - 1)},
    "trainer": _TRAINER,
    "checkpoint": {**_SAVING, "save_top_k": _at_least(-1)},
    "last_checkpoint": _SAVING,
    "model.init_args.optimizer.init_args": _OPTIMIZER,
}
_PATHS = ("ckpt_path", "default_root_dir", "save_dir", "root_dir", "dirpath", "folder", "path", "data_files", "name")


def check_options(config: Namespace) -> None:
    """Refuses numbers out of range and strategies that cannot serve.

    Args:
        config: Of a subcommand, parsed.

    Raises:
        LoPAError: If there is one; the message names the option and what is allowed.
    """
    named = config.get("model.init_args.optimizers") or ()
    by_group = {f"model.init_args.optimizers.{name}.init_args": _OPTIMIZER for name in named}
    for place, options in {**_ALLOWED, **by_group}.items():
        for name, (is_allowed, allowed) in options.items():
            key = f"{place}.{name}" if place else name
            value = config.get(key)
            if isinstance(value, (int, float)) and not isinstance(value, bool) and not is_allowed(value):
                raise LoPAError(f"{key.replace('.init_args', '')} must be {allowed}, got {value}")
    strategy = config.get("trainer.strategy")
    if strategy is not None:
        check_strategy_name(strategy if isinstance(strategy, str) else strategy.class_path)
    steps, warmup = config.get("trainer.max_steps"), config.get("model.init_args.warmup")
    if isinstance(warmup, (int, float)) and isinstance(steps, int) and 1 <= steps <= warmup:
        raise LoPAError(f"model.warmup must be less than trainer.max_steps, {steps}, got {warmup:g}")


def expand_home(config: Any, is_path: bool = False) -> Any:
    """Returns a configuration with ``~`` in its paths written out; mappings are changed in place.

    Args:
        config: A parsed configuration, or a value in it.
        is_path: Whether the value is of an option that is a path.

    Example:
        >>> expand_home({"text": "~/a", "data_files": {"train": "/a.csv"}})
        {'text': '~/a', 'data_files': {'train': '/a.csv'}}
    """
    if isinstance(config, str):
        return os.path.expanduser(config) if is_path and config.startswith("~") else config
    if isinstance(config, list):
        return [expand_home(value, is_path) for value in config]
    if isinstance(config, (dict, Namespace)):
        for key, value in list(vars(config).items() if isinstance(config, Namespace) else config.items()):
            config[key] = expand_home(value, is_path or key in _PATHS)
    return config

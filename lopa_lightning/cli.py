"""``lopa``: fit, validate, test and predict from YAML."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import re
import sys
import warnings
from typing import Any, NoReturn

from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from lopa_lightning.callbacks import FitSummary, PredictionWriter, PromptMonitor
from lopa_lightning.errors import LoPAError
from lopa_lightning.modules import LoPALightningModule

_TRAINER_DEFAULTS: dict[str, Any] = {
    "logger": {
        "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
        "init_args": {"save_dir": "runs", "name": "lopa", "default_hp_metric": False},
    },
    "log_every_n_steps": 10,
}
_BEST: dict[str, Any] = {"monitor": "val/score", "mode": "max", "filename": "best"}
# A checkpoint callback of its own: Lightning's save_last follows the best one, not the run.
_LAST: dict[str, Any] = {"filename": "last", "enable_version_counter": False, "save_on_train_epoch_end": True}
_MISSPELT = re.compile(r"[Oo]ption '([^']+)'|unrecognized arguments: --(\S+)")
_CLASS_PATH = re.compile(r"class_path[ =]'([\w.]+)'")

_EXPECTED_WARNINGS = (
    r"Found \d+ module\(s\) in eval mode",  # the frozen ones, as they should be
    r".*does not have many workers",  # batches of token ids are made faster than they could be handed over
    r"`isinstance\(treespec, LeafSpec\)`",  # Lightning's own use of torch
)


class Parser(LightningArgumentParser):
    """Says what was misspelt in a line or two, not in a page of usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints the error, with the options that were perhaps meant, and exits with status 2."""
        hints = [
            self._hint(name.split("=")[0], message) for pair in _MISSPELT.findall(message) for name in pair if name
        ]
        text = "\n".join(dict.fromkeys([message.strip(), *filter(None, hints)]))
        sys.stderr.write(f"error: {text}\nSee {self.prog.split(' [')[0]} --help for all options.\n")
        raise SystemExit(2)

    def _hint(self, misspelt: str, message: str) -> str | None:
        parsers = [self, *getattr(self._subcommands_action, "_name_parser_map", {}).values()]
        known = {action.dest for parser in parsers for action in parser._actions}
        for class_path in _CLASS_PATH.findall(message):
            known |= set(_parameters(class_path))
        # By the part that is wrong: of model.init_args.rnak that is rnak, of trainer.max_epoch max_epoch.
        parts = [part for part in misspelt.split(".") if part not in ("init_args", "class_path")]
        names = {name.rpartition(".")[2]: name for name in known}
        for part in parts:
            if part not in names and (close := difflib.get_close_matches(part, names, n=3)):
                return f"Did you mean {' or '.join(names[name] for name in close)}?"
        return None


class LoPACLI(LightningCLI):
    """Lightning's CLI with our defaults: prompt-only checkpoints by score, TensorBoard, prediction files."""

    def __init__(self, args: ArgsType = None, **kwargs: Any) -> None:
        super().__init__(
            LoPALightningModule,
            LightningDataModule,
            args=args,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            seed_everything_default=42,
            trainer_defaults=_TRAINER_DEFAULTS,
            parser_class=Parser,
            save_config_kwargs={"overwrite": True},
            **kwargs,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the callbacks that every run has; each is configured by a key of its own."""
        for name, defaults in {"checkpoint": _BEST, "last_checkpoint": _LAST}.items():
            parser.add_lightning_class_args(ModelCheckpoint, name)
            parser.set_defaults({f"{name}.{key}": value for key, value in defaults.items()})
        parser.add_lightning_class_args(PromptMonitor, "monitor")
        parser.add_lightning_class_args(PredictionWriter, "predictions")
        parser.add_lightning_class_args(FitSummary, "summary")

    def _parse_ckpt_path(self) -> None:
        """Leaves the configuration alone.

        Lightning would put the checkpoint's hyperparameters over it, without a word. Here the
        configuration says what is run, and a checkpoint that does not fit is refused.
        """


def _parameters(class_path: str) -> list[str]:
    module, _, name = class_path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return []
    classes = [base for base in inspect.getmro(found) if base is not object] if isinstance(found, type) else [found]
    return [parameter for base in classes for parameter in inspect.signature(base).parameters]


def main(args: ArgsType = None) -> None:
    """Runs ``lopa``. Set ``LOPA_TRACEBACK=1`` in the environment to see where an error was raised.

    Args:
        args: Arguments; None for the command line's.
    """
    for message in _EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message)
    try:
        LoPACLI(args=args)
    except Exception as error:
        ours = _cause(error)
        if ours is None or os.environ.get("LOPA_TRACEBACK"):
            raise
        sys.stderr.write(f"error: {ours}\n")
        raise SystemExit(1) from error


def _cause(error: BaseException | None) -> LoPAError | None:
    """The LoPAError behind an exception: the parser wraps what a class raises when it is built."""
    while error is not None and not isinstance(error, LoPAError):
        error = error.__cause__
    return error


if __name__ == "__main__":
    main()

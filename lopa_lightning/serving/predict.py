"""Answers a checkpoint's task for texts, files of them, or an image, with no other configuration."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lopa_lightning.command_line.parser import UsageError
from lopa_lightning.data.stored import read_rows
from lopa_lightning.data.task_rows import task_template
from lopa_lightning.errors import LoPAError
from lopa_lightning.files import check_writable, write_whole
from lopa_lightning.modules import CausalLMModule, ClassificationModule, ImageClassificationModule, LoPALightningModule
from lopa_lightning.serving.command import Options, best_device
from lopa_lightning.stopping import stoppable

_PROMPT = "prompt"  # column of what is to be completed


def options() -> argparse.ArgumentParser:
    """Returns what reads the options."""
    what = "Answers for texts or an image, one line of JSON each; with --config, for a data set's test split."
    parser = Options("predict", what)
    parser.add_argument("--ckpt_path", required=True, help="checkpoint, or folder of a bundle")
    parser.add_argument("--text", action="append", metavar="TEXT", help="a text; may be given several times")
    parser.add_argument(
        "--file", help="CSV, JSON lines or Parquet with the task's columns (completions: prompt); or an image"
    )
    parser.add_argument("--output", help="where the lines go (default: standard output)")
    parser.add_argument("--batch_size", type=int, default=32, help="rows at a time (default: 32)")
    return parser


def main(args: Sequence[str]) -> None:
    """Runs ``lopa predict`` for texts or a file.

    Args:
        args: What follows on the command line.

    Raises:
        LoPAError: If the checkpoint, the file or its texts cannot be used.
        UsageError: If the command line is wrong.
    """
    given = options().parse_args(args)
    if (given.text is None) == (given.file is None):
        raise UsageError("give --text or --file, and not both")
    if given.output is not None:
        check_writable(Path(given.output).absolute().parent, "the folder of --output")
    with stoppable():
        module = LoPALightningModule.load_from_checkpoint(given.ckpt_path)
        rows = _rows(module, given.text, given.file)
        found = answer(module.to(best_device()), rows, given.batch_size)
    lines = [
        json.dumps({"input": row, **record}, ensure_ascii=False, default=str) + "\n" for row, record in zip(rows, found)
    ]
    if given.output is None:
        sys.stdout.writelines(lines)
    else:
        write_whole(Path(given.output), "".join(lines))


def answer(module: LoPALightningModule, rows: Sequence[Any], batch_size: int) -> list[dict[str, Any]]:
    """Returns a record for each row.

    Args:
        module: Loaded.
        rows: With the columns that the module's task reads; of images their files.
        batch_size: Rows at a time.
    """
    if isinstance(module, CausalLMModule):
        completions = module.generate([row[_PROMPT] for row in rows], batch_size=batch_size)
        return [{"completions": texts} for texts in completions]
    assert isinstance(module, ClassificationModule)
    return module.predict(rows, batch_size)


def _rows(module: LoPALightningModule, texts: list[str] | None, file: str | None) -> Sequence[Any]:
    if isinstance(module, ImageClassificationModule):
        if file is None:
            raise LoPAError("the model reads images: give an image as --file, or a folder of them by --config FILE")
        return [file]
    columns = _columns(module)
    return _of_file(str(file), columns) if texts is None else _of_texts(texts, columns)


def _columns(module: LoPALightningModule) -> list[str]:
    if isinstance(module, CausalLMModule):
        return [_PROMPT]
    if not isinstance(module, ClassificationModule):
        raise LoPAError(f"{type(module).__name__} is no task on texts alone; give its configuration: --config FILE")
    return task_template(module.required_task()).columns


def _of_texts(texts: list[str], columns: list[str]) -> list[dict[str, Any]]:
    if len(columns) > 1:
        raise LoPAError(f"the task reads {', '.join(columns)}: give a --file with these columns, in place of --text")
    return [{columns[0]: text} for text in texts]


def _of_file(file: str, columns: list[str]) -> list[dict[str, Any]]:
    data = read_rows(None, None, None, {"predict": file}, columns)["predict"]
    if missing := [name for name in columns if name not in data.column_names]:
        raise LoPAError(f"{file}: no column {', '.join(missing)}; there are {', '.join(data.column_names)}")
    rows: list[dict[str, Any]] = data.to_list()
    return rows

"""Answers a checkpoint's task for texts, files of them, or images, with no other configuration."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lopa_lightning import checkpoint
from lopa_lightning.command_line.parser import Options, UsageError
from lopa_lightning.data.columns import ColumnError, RowError, check_columns, whole_rows
from lopa_lightning.data.completion_rows import CHATS, fault_of_chat, unanswered
from lopa_lightning.data.labels import named_class
from lopa_lightning.data.pixels import image_files
from lopa_lightning.data.rows import check_texts
from lopa_lightning.data.stored import read_rows
from lopa_lightning.data.task_rows import task_template
from lopa_lightning.data.word_rows import check_words
from lopa_lightning.errors import LoPAError, at_least, shown
from lopa_lightning.files import check_writable, write_whole
from lopa_lightning.modules import CausalLMModule, ClassificationModule, ImageClassificationModule, LoPALightningModule
from lopa_lightning.modules.checkpoint_loading import checked, rebuilt
from lopa_lightning.modules.predict import check_rows, image_sources
from lopa_lightning.serving.device import best_device
from lopa_lightning.signals import stoppable

_PROMPT = "prompt"  # column of what is to be completed


def options() -> argparse.ArgumentParser:
    """Returns what reads the options."""
    what = "Answers for texts or images, one line of JSON each; with --config, for a data set's test split."
    parser = Options("predict", what)
    parser.add_argument("--ckpt_path", required=True, help="checkpoint, or folder of a bundle")
    parser.add_argument("--text", action="append", metavar="TEXT", help="a text; may be given several times")
    parser.add_argument(
        "--file",
        nargs="+",
        action="extend",
        help="CSV, JSON lines or Parquet with the task's columns (completions: prompt, or messages); or images and "
        "folders of them",
    )
    parser.add_argument("--sep", help="what parts the columns of a CSV (default: a comma; a tab in TSV)")
    parser.add_argument("--encoding", help="of the file (default: UTF-8)")
    parser.add_argument("--drop_empty", action="store_true", help="drop rows of the file with an empty cell")
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
    if given.text is not None and (unread := _reading(given)):
        raise UsageError(f"--{', --'.join(unread)} is for a --file, got --text")
    at_least(1, batch_size=given.batch_size)
    if given.output is not None:
        check_writable(Path(given.output).absolute().parent, "the folder of --output")
        if Path(given.output).is_dir():
            raise LoPAError(f"--output must be a file, got the folder {given.output}")
    with stoppable():
        kind: Any = LoPALightningModule
        saved, name = checkpoint.read(given.ckpt_path), shown(given.ckpt_path)
        rows = _rows(checked(kind, saved, name), given)
        module = rebuilt(kind, saved, name)
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
        prompts = [row[_PROMPT] if _PROMPT in row else unanswered(row[CHATS]) for row in rows]
        column = module.instance_column
        instances = None if column is None else [row[column] for row in rows]
        completions = module.generate(prompts, instance_texts=instances, batch_size=batch_size)
        return [{"completions": texts} for texts in completions]
    assert isinstance(module, ClassificationModule)
    return module.predict(rows, batch_size)


def _rows(module: LoPALightningModule, given: argparse.Namespace) -> Sequence[Any]:
    if isinstance(module, ImageClassificationModule):
        if given.file is None:
            raise LoPAError("the model reads images: give images, or a folder of them, as --file")
        if unread := _reading(given):
            raise LoPAError(f"--{', --'.join(unread)} is for a file of texts, and the model reads images")
        return image_sources(image_files(given.file))
    columns = _columns(module)
    if given.text is not None:
        return _of_texts(given.text, columns)
    if len(given.file) > 1:
        raise LoPAError(f"the model reads texts: give one --file with rows, got {len(given.file)}")
    reader = {name: value for name, value in _reading(given).items() if name != "drop_empty"}
    per_word = isinstance(module, ClassificationModule) and module.required_task().per_word
    return _of_file(given.file[0], columns, reader, given.drop_empty, per_word)


def _reading(given: argparse.Namespace) -> dict[str, Any]:
    """Returns the options on how a file of texts is read, those that are given."""
    return {name: value for name in ("sep", "encoding", "drop_empty") if (value := getattr(given, name))}


def _columns(module: LoPALightningModule) -> list[str]:
    if isinstance(module, CausalLMModule):
        return [_PROMPT, *([module.instance_column] if module.instance_column is not None else [])]
    if not isinstance(module, ClassificationModule):
        raise LoPAError(f"{type(module).__name__} is no task on texts alone; give its configuration: --config FILE")
    return task_template(module.required_task()).columns


def _of_texts(texts: list[str], columns: list[str]) -> list[dict[str, Any]]:
    if len(columns) > 1:
        raise LoPAError(f"the task reads {', '.join(columns)}: give a --file with these columns, in place of --text")
    check_rows({columns[0]: texts})
    return [{columns[0]: text} for text in texts]


def _of_file(
    file: str, columns: list[str], reader: dict[str, str], drop_empty: bool, per_word: bool
) -> list[dict[str, Any]]:
    """Returns the rows of a file, labels of a data set on the hub by their names.

    Raises:
        LoPAError: If a column is not there, or a row has not what is read.
    """
    data = read_rows(None, None, None, {"predict": file}, columns, reader)["predict"]
    if columns == [_PROMPT] and _PROMPT not in data.column_names and CHATS in data.column_names:
        columns = [CHATS]
    check_columns(data, columns, file)
    kept, features = whole_rows(data, columns, file) if drop_empty else None, data.features
    read = data if kept is None else data.select(kept)
    rows = [{name: named_class(features[name], value) for name, value in row.items()} for row in read]
    try:
        if per_word:
            check_words(columns[0], [row[columns[0]] for row in rows])
        elif columns != [CHATS]:
            check_texts({name: [row[name] for row in rows] for name in columns})
        elif bad := next((row for row in rows if fault_of_chat(row[CHATS])), None):
            raise RowError({CHATS: bad[CHATS]}, str(fault_of_chat(bad[CHATS])))
    except (ColumnError, RowError) as error:
        raise error.named(file, data) from None
    return rows

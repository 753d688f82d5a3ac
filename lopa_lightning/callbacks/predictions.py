"""Writes predictions to files, in the input's order."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch.distributed
from lightning.pytorch.callbacks import Callback

from lopa_lightning.callbacks.run_folder import start_run
from lopa_lightning.callbacks.streamed_predictions import PredictionStream, json_lines
from lopa_lightning.errors import one_of
from lopa_lightning.files import write_whole
from lopa_lightning.signals import Stopped

Format = Literal["jsonl", "csv"]


class PredictionWriter(Callback):
    """Writes what ``predict`` found, GLUE's submission files where the data is GLUE's, and what ``test`` scored.

    Predictions that take long, of modules with a ``prediction_identity``, are written as they come, and an
    interrupted run into the same folder goes on. So are a test's scored completions, to ``results.jsonl``.

    Args:
        folder: Where to; by default the run's log folder.
        format: ``jsonl`` or ``csv``.

    Raises:
        LoPAError: If ``format`` is unknown.
    """

    def __init__(self, folder: str | None = None, format: Format = "jsonl") -> None:
        one_of("format", format, get_args(Format))
        self.folder = folder
        self.format: Format = format
        self._stream: PredictionStream | None = None
        self._rows: dict[int, list[dict[str, Any]]] = {}  # new ones of this process, by set

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        """Looks for what an interrupted run has left."""
        self._start(trainer, pl_module, "predict", "predictions", pl_module.prediction_identity())

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """Looks for what an interrupted run has left."""
        self._start(trainer, pl_module, "test", "results", pl_module.scoring_identity())

    def _start(self, trainer: Any, pl_module: Any, role: str, name: str, identity: dict[str, Any] | None) -> None:
        self._stream, self._rows, pl_module.written = None, {}, {}
        start_run(trainer)
        self._folder = Path(self.folder or trainer.log_dir or trainer.default_root_dir)
        if identity is None or trainer.fast_dev_run:
            return
        data = {} if pl_module.data is None else pl_module.data.datasets
        identity = {**identity, "rows": [rows._fingerprint for rows in data.get(role, [])]}
        lines = identity.get("results_per_row", 1)
        self._stream = PredictionStream(self._folder, name, identity, trainer.global_rank, lines)
        self._stream.open()
        for row in self._stream.found:
            pl_module.written.setdefault(row["index"], []).append(row)
        trainer.strategy.barrier()
        self._stream.start()
        trainer.strategy.barrier()

    def on_predict_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keeps a batch's predictions, and writes them where that is done as they come."""
        self._add(pl_module.prediction_rows(outputs), dataloader_idx)

    def on_test_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any, **__: Any) -> None:
        """Does so with what a test scored."""
        self._add(outputs.get("results", []) if isinstance(outputs, dict) else [])

    def _add(self, rows: list[dict[str, Any]], set_index: int = 0) -> None:
        self._rows.setdefault(set_index, []).extend(rows)
        if self._stream is not None:
            self._stream.add(rows)

    def _all_rows(self, set_index: int = 0) -> list[dict[str, Any]]:
        """Returns the rows of all processes, and those of an interrupted run."""
        found = self._stream.found if self._stream is not None else []
        return [*_gathered(self._rows.get(set_index, [])), *found]

    def on_test_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Writes what a test scored, one line for each completion."""
        rows = self._all_rows()
        if rows and trainer.is_global_zero and not trainer.fast_dev_run:
            rows.sort(key=lambda row: (row["index"], row["sample"]))
            write_whole(self._folder / "results.jsonl", _formatted(rows, "jsonl"))
            print(f"{len(rows)} scored completions in {self._folder / 'results.jsonl'}")
            if self._stream is not None:
                self._stream.close()

    def on_predict_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Writes all processes' predictions, one file for each set."""
        if trainer.fast_dev_run:
            return
        for set_index, suffix in enumerate(_suffixes(pl_module, len(trainer.num_predict_batches))):
            rows = self._all_rows(set_index)
            if not trainer.is_global_zero:
                continue
            rows = list({row["index"]: row for row in sorted(rows, key=lambda row: row["index"])}.values())
            if pl_module.data is not None:
                rows = pl_module.data.named(set_index, rows)
            files = {f"predictions{suffix}.{self.format}": _formatted(rows, self.format)}
            submission = None if pl_module.data is None else pl_module.data.submission(set_index, rows)
            files |= [submission] if submission is not None else []
            for name, content in files.items():
                write_whole(self._folder / name, content)
                print(f"{len(rows)} predictions in {self._folder / name}")
            if self._stream is not None:
                self._stream.close()
                if self.format != "jsonl":
                    self._stream.path.unlink()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Says how to go on after what was written as it came."""
        if self._stream is None:
            return
        self._stream.release()
        if isinstance(exception, Stopped):
            exception.outcome = (
                f"{self._stream.path} holds what was done, and the same command with "
                f"--predictions.folder {self._folder} goes on after it"
            )


def _suffixes(module: Any, count: int) -> Sequence[str]:
    """Returns what the file names of so many sets end in: as metrics do, where as many are evaluated."""
    if count == 1:
        return [""]
    if count <= len(module.eval_suffixes):
        return cast(Sequence[str], module.eval_suffixes[:count])
    names = range(count) if module.data is None else module.data.splits_of("predict")
    return [f"_{name}" for name in names]


def _gathered(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return rows
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, rows)
    return [row for part in parts for row in part]


def _formatted(rows: list[dict[str, Any]], format: Format) -> str:
    if format == "jsonl":
        return json_lines(rows)
    flat = [
        {
            f"{key}_{name}" if name else key: item
            for key, value in row.items()
            for name, item in (value.items() if isinstance(value, dict) else [("", value)])
        }
        for row in rows
    ]
    out = io.StringIO()
    names = dict.fromkeys(name for row in flat for name in row)  # not each row need have a file
    writer = csv.DictWriter(out, fieldnames=[*names] or ["index"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return out.getvalue()

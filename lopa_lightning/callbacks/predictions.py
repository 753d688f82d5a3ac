"""Predictions as files, in the input's order."""

from __future__ import annotations

import csv
import io
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch.distributed
from lightning.pytorch.callbacks import BasePredictionWriter

from lopa_lightning.callbacks.run_folder import start_run
from lopa_lightning.callbacks.streamed_predictions import PredictionStream
from lopa_lightning.errors import LoPAError
from lopa_lightning.files import write_whole
from lopa_lightning.stopping import Stopped

Format = Literal["jsonl", "csv"]


class PredictionWriter(BasePredictionWriter):
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
        super().__init__(write_interval="batch_and_epoch")
        if format not in get_args(Format):
            raise LoPAError(f"format must be one of {', '.join(get_args(Format))}, got {format!r}")
        self.folder = folder
        self.format: Format = format
        self._stream: PredictionStream | None = None
        self._results: list[dict[str, Any]] = []

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Silences what Lightning says of indices."""
        # Lightning's indices of a batch are not read: every batch has its own.
        warnings.filterwarnings("ignore", "Couldn't infer the batch indices")

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        """Looks for what an interrupted run has left."""
        self._open_stream(trainer, pl_module, "predict", "predictions", pl_module.prediction_identity())

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """Looks for what an interrupted run has left."""
        self._open_stream(trainer, pl_module, "test", "results", pl_module.scoring_identity())

    def _open_stream(self, trainer: Any, pl_module: Any, role: str, name: str, identity: dict[str, Any] | None) -> None:
        self._stream, pl_module.written = None, {}
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

    def write_on_batch_end(
        self,
        trainer: Any,
        pl_module: Any,
        prediction: Any,
        batch_indices: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Writes a batch's predictions, where they are written as they come."""
        if self._stream is not None:
            self._stream.add(pl_module.prediction_rows(prediction))

    def on_test_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keeps what a test scored, and writes what is new."""
        results = outputs.get("results", []) if isinstance(outputs, dict) else []
        self._results += results
        if self._stream is not None:
            self._stream.add(row for row in results if row["index"] not in pl_module.written)

    def on_test_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Writes what a test scored, one line for each completion."""
        rows, self._results = _gathered(self._results), []
        if rows and trainer.is_global_zero and not trainer.fast_dev_run:
            rows.sort(key=lambda row: (row["index"], row["sample"]))
            write_whole(self._folder / "results.jsonl", _formatted(rows, "jsonl"))
            print(f"{len(rows)} scored completions in {self._folder / 'results.jsonl'}")
            if self._stream is not None:
                self._stream.close()

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

    def write_on_epoch_end(
        self,
        trainer: Any,
        pl_module: Any,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any],
    ) -> None:
        """Gathers all processes' predictions and writes them, one file for each set."""
        sets = [predictions] if predictions and isinstance(predictions[0], dict) else predictions
        suffixes = pl_module.eval_suffixes if len(sets) > 1 else [""]
        for set_index, (suffix, batches) in enumerate(zip(suffixes, sets)):
            rows = _gathered([row for batch in batches for row in pl_module.prediction_rows(batch)])
            if not trainer.is_global_zero:
                continue
            rows += self._stream.found if self._stream is not None else []
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


def _gathered(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return rows
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, rows)
    return [row for part in parts for row in part]


def _formatted(rows: list[dict[str, Any]], format: Format) -> str:
    if format == "jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    flat = [
        {
            f"{key}_{name}" if name else key: item
            for key, value in row.items()
            for name, item in (value.items() if isinstance(value, dict) else [("", value)])
        }
        for row in rows
    ]
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(flat[0]) if flat else ["index"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return out.getvalue()

"""Writes predictions to disk as soon as they are made, so that an interrupted run can go on."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lopa_lightning.files import Claim, name_file, write_whole


class PredictionStream:
    """Appends predictions to a file for each process while a run goes on.

    Beside it lies, until the run is done, what the predictions depend on. Another run in the same folder
    goes on where the last one stopped if it depends on the same, and starts over if not.

    Args:
        folder: Where predictions go.
        name: Of the file, without its ending.
        identity: What they depend on, as plain data.
        rank: Of this process; the first one's file is ``NAME.jsonl`` itself.
        lines: Of each row of the data; a row with fewer was cut off while it was written.
    """

    def __init__(self, folder: Path, name: str, identity: Mapping[str, Any], rank: int, lines: int = 1) -> None:
        self.folder, self.name, self.rank, self.lines = folder, name, rank, lines
        self.identity = json.loads(json.dumps(identity, sort_keys=True))
        self.path = folder / (f"{name}.jsonl" if rank == 0 else f"{name}.rank{rank}.jsonl")
        self.state = folder / f".{name}.unfinished.json"
        self.found: list[dict[str, Any]] = []
        self._claim: Claim | None = None

    def open(self) -> None:
        """Reads what an interrupted run left, on every process.

        Raises:
            LoPAError: If another command is writing there.
        """
        if self.rank == 0:
            self._claim = Claim(self.folder, "predictions.folder", f".{self.name}.lock")
        if not self.state.is_file():
            return
        identity = _parsed(self.state.read_text(encoding="utf-8", errors="replace"))
        if identity == self.identity:
            found = [row for path in self._files() for row in _whole_rows(path)]
            count = Counter(row["index"] for row in found)
            self.found = [row for row in found if count[row["index"]] == self.lines]
        else:
            whose = "of another checkpoint or setting" if identity else f"but its {self.state.name} is damaged"
            rank_zero_warn(f"{self.folder} holds {self.name} {whose}: starting over")

    def start(self) -> None:
        """Puts the files in order; to be called once every process has read them."""
        if self.rank == 0:
            for path in self._files():
                path.unlink()
            write_whole(self.path, json_lines(self.found))
            write_whole(self.state, json.dumps(self.identity))
        if self.found:
            rank_zero_info(f"{len(self.found)} {self.name} are in {self.path} already; going on after them")

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Appends rows to this process's file."""
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json_lines(rows))
        except OSError as error:
            name_file(error, self.path)
            raise

    def close(self) -> None:
        """Removes what is only there while a run goes on; to be called by the first process at the end."""
        for path in self._files():
            if path != self.path:
                path.unlink()
        self.state.unlink(missing_ok=True)
        self.release()

    def release(self) -> None:
        """Lets another command go on, whether this one is done or not."""
        if self._claim is not None:
            self._claim.release()
            self._claim = None

    def _files(self) -> list[Path]:
        first = self.folder / f"{self.name}.jsonl"
        return [path for path in (first, *sorted(self.folder.glob(f"{self.name}.rank*.jsonl"))) if path.is_file()]


def json_lines(rows: Iterable[dict[str, Any]]) -> str:
    r"""Returns rows as lines of JSON; what JSON has no type for, as text.

    Example:
        >>> import datetime
        >>> json_lines([{"id": datetime.date(2024, 1, 31)}])
        '{"id": "2024-01-31"}\n'
    """
    return "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)


def _whole_rows(path: Path) -> list[dict[str, Any]]:
    """Returns the whole rows of a file of which any line may be cut off: the last, or on a full disk others."""
    rows = map(_parsed, path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1])
    return [row for row in rows if "index" in row]


def _parsed(text: str) -> dict[str, Any]:
    """Reads a JSON object; an empty one for anything else."""
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}

"""What is kept of a run."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from lopa_lightning.files import write_whole

RESULT_FILE = "result.json"


@dataclass(frozen=True)
class Result:
    """A run that has ended.

    Attributes:
        status: ``done`` or ``failed``.
        config_hash: Of the configuration that was run.
        reason: Why it failed, in a line.
        tags: What the caller said of the run.
        history: For each validation ``samples`` (trained on so far), ``step``, ``epoch`` and ``metrics``.
        trained: Number of trained parameters.
        frozen: Number of frozen ones.
        checkpoint_bytes: Size of the last checkpoint.
        seconds_per_step: Median over training steps.
        seconds: The whole run, with loading and validation.
        peak_mb: Peak memory.
        peak_of: ``cuda`` for the GPU's memory, ``process`` for the resident memory of the process.
    """

    status: Literal["done", "failed"]
    config_hash: str
    reason: str = ""
    tags: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    trained: int | None = None
    frozen: int | None = None
    checkpoint_bytes: int | None = None
    seconds_per_step: float | None = None
    seconds: float | None = None
    peak_mb: float | None = None
    peak_of: str | None = None

    @property
    def done(self) -> bool:
        """Whether the run ended well."""
        return self.status == "done"

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics of the last validation, by full name.

        Of the last and not the best one: to choose an epoch by the split that is reported would make
        the figure too good.
        """
        return dict(self.history[-1]["metrics"]) if self.history else {}

    @property
    def score(self) -> float:
        """``val/score`` of the last validation; NaN if there is none."""
        return self.metrics.get("val/score", math.nan)

    @property
    def best_score(self) -> float:
        """The highest ``val/score`` of all validations; NaN if there is none."""
        scores = [entry["metrics"].get("val/score", math.nan) for entry in self.history]
        return max((score for score in scores if not math.isnan(score)), default=math.nan)

    def write(self, folder: Path) -> None:
        """Writes ``result.json``, whole or not at all.

        Args:
            folder: The run's.
        """
        shown = {**asdict(self), "metrics": self.metrics}
        write_whole(folder / RESULT_FILE, json.dumps(shown, indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Result | None:
        """Reads what :meth:`write` wrote; None if there is nothing, or nothing that can be read.

        Args:
            folder: The run's.
        """
        try:
            values = json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
            return cls(**{key: value for key, value in values.items() if key != "metrics"})
        except (OSError, ValueError, TypeError):
            return None

"""A folder in the layout of GLUE's on the hub, with a few rows in every split of every task."""

from __future__ import annotations

from pathlib import Path

from datasets import ClassLabel, Dataset, Features, Value

from lopa_lightning.data.glue import GLUE_TASKS
from lopa_lightning.data.template import Template

_TEXTS = ["the film was great", "a terrible story", "it was good and the cast was good", "No , it was bad", "Yes"]


def write_mini_glue(folder: Path, rows: int = 12) -> str:
    """Writes all nine tasks, with their columns, label features and splits, and returns the folder."""
    header = ["---", "configs:"]
    for name, task in GLUE_TASKS.items():
        splits = ["train", *(split for _, split in task.eval_splits)]
        splits += [split.replace("validation", "test") for split in splits[1:]]
        header += [f"- config_name: {name}", "  data_files:"]
        for split in splits:
            path = folder / name / f"{split}-00000-of-00001.parquet"
            path.parent.mkdir(exist_ok=True)
            _split(name, rows, split.startswith("test")).to_parquet(path)
            header += [f"  - split: {split}", f"    path: {name}/{split}-*"]
    (folder / "README.md").write_text("\n".join([*header, "---", ""]))
    return str(folder)


def _split(name: str, rows: int, is_test: bool) -> Dataset:
    labels = list(GLUE_TASKS[name].labels)
    label = ClassLabel(names=labels) if labels else Value("float32")
    values = (
        [-1 if is_test else i % len(labels) for i in range(rows)] if labels else [float(i % 6) for i in range(rows)]
    )
    texts = {
        column: [_TEXTS[(i + k) % len(_TEXTS)] for i in range(rows)]
        for k, column in enumerate(Template(GLUE_TASKS[name].template).columns)
    }
    features = {**{column: Value("string") for column in texts}, "label": label, "idx": Value("int32")}
    return Dataset.from_dict({**texts, "label": values, "idx": list(range(rows))}, features=Features(features))

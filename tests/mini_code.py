"""Folders in the layouts of MBPP's and CRUXEval's on the hub, with a few rows."""

from __future__ import annotations

import json
from pathlib import Path

from datasets import Dataset


def write_mini_cruxeval(folder: Path, rows: int = 12) -> str:
    """Functions that add a number."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        {"code": f"def f(n):\n    return n + {i}", "input": "1", "output": str(i + 1), "id": f"sample_{i}"}
        for i in range(rows)
    ]
    (folder / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    header = ["---", "configs:", "- config_name: default", "  data_files:", "  - split: test", "    path: test.jsonl"]
    (folder / "README.md").write_text("\n".join([*header, "---", ""]))
    return str(folder)


def write_mini_mbpp(folder: Path) -> str:
    """The four splits, out of order as on the hub."""
    header = ["---", "configs:", "- config_name: full", "  data_files:"]
    (folder / "full").mkdir(parents=True, exist_ok=True)
    for split, ids in {
        "train": range(13, 17),
        "test": range(5, 11),
        "validation": (11, 12),
        "prompt": range(1, 5),
    }.items():
        problems = [
            {
                "task_id": i,
                "text": f"Write a function to add {i}.",
                "code": f"def add(x):\r\n    return x + {i}",
                "test_list": [f"assert add({k}) == {k + i}" for k in range(3)],
                "test_setup_code": "",
                "challenge_test_list": [],
            }
            for i in ids
        ]
        Dataset.from_list(problems).to_parquet(folder / "full" / f"{split}-00000-of-00001.parquet")
        header += [f"  - split: {split}", f"    path: full/{split}-*"]
    (folder / "README.md").write_text("\n".join([*header, "  default: true", "---", ""]))
    return str(folder)

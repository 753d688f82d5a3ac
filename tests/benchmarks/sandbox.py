"""Every reference solution of MBPP and CRUXEval through the sandbox: how many pass, and how long that takes.

``python -m tests.benchmarks.sandbox [folder]``, where the folder holds the data sets as on the hub.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import datasets

from lopa_lightning.data.code.programs import cruxeval_answer_program, mbpp_program
from lopa_lightning.sandbox.run import isolation, run_programs


def references(folder: Path) -> dict[str, str]:
    """974 programs of MBPP with all their tests, and 800 of CRUXEval, by name."""
    stored = datasets.load_dataset(str(folder / "google-research-datasets" / "mbpp"), "full")
    rows = datasets.concatenate_datasets(list(stored.values())).sort("task_id")
    found = {
        f"MBPP {row['task_id']}": mbpp_program(
            row["code"], row["test_list"] + row["challenge_test_list"], row["test_setup_code"]
        )
        for row in rows
    }
    lines = (folder / "cruxeval-org" / "cruxeval" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    for row in map(json.loads, lines):
        call = f"f({row['input']})"
        program = cruxeval_answer_program(row["code"], row["input"], row["output"], call, "input")
        found[f"CRUXEval {row['id']}"] = program
    return found


def main() -> None:
    """Prints the figures, the slowest programs, and whatever did not pass."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else os.environ.get("LOPA_REAL_DATA", "../shared/hub/datasets"))
    programs = references(folder)
    print(f"isolation: {', '.join(isolation())}")
    started, used = time.monotonic(), os.times()
    outcomes = dict(zip(programs, run_programs(list(programs.values()))))
    seconds, now = time.monotonic() - started, os.times()
    cpu = now.children_user + now.children_system - used.children_user - used.children_system
    for name in ("MBPP", "CRUXEval"):
        passed = [outcome.passed for key, outcome in outcomes.items() if key.startswith(name)]
        print(f"{name}: {sum(passed)} of {len(passed)} passed")
    print(f"{len(programs)} programs in {seconds:.1f} s, {cpu:.1f} s of CPU")
    for name in sorted(outcomes, key=lambda name: -outcomes[name].seconds)[:5]:
        print(f"slow: {name}, {outcomes[name].seconds:.2f} s")
    for name, outcome in outcomes.items():
        if not outcome.passed:
            print(f"{name}: {outcome.status}\n{outcome.stderr}")


if __name__ == "__main__":
    main()

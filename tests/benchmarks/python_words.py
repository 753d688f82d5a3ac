"""Writes lines of Python's own standard library as words with a label each, for ``configs/own_tokens.yaml``.

The labels are the parser's: spans (BIO) of what is called, and of what is assigned to. Splits are by
file: no file is in two of them, and a line that stands in several files is kept once.
"""

from __future__ import annotations

import ast
import hashlib
import io
import json
import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

LIBRARIES = ("asyncio", "email", "http", "importlib", "logging", "multiprocessing", "unittest", "xml", "json", "urllib")
SHORTEST, LONGEST, TRAINING_ROWS, OTHER_ROWS = 5, 30, 3000, 600
_SKIPPED = {tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER, tokenize.COMMENT}


def spans(node: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """Yields what has a label in a statement, and its type."""
    for each in ast.walk(node):
        if isinstance(each, ast.Call) and isinstance(each.func, (ast.Name, ast.Attribute)):
            yield each.func, "CALL"
        elif isinstance(each, (ast.Name, ast.Attribute)) and isinstance(each.ctx, ast.Store):
            yield each, "TARGET"


def rows_of(source: str) -> Iterator[dict[str, list[str]]]:
    """Yields the statements of a file that stand in one line."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.stmt) or node.lineno != node.end_lineno or not lines[node.lineno - 1].isascii():
            continue
        line = lines[node.lineno - 1].strip()
        try:
            found = [t for t in tokenize.generate_tokens(io.StringIO(line).readline) if t.type not in _SKIPPED]
        except (tokenize.TokenError, SyntaxError):
            continue
        shift = len(lines[node.lineno - 1]) - len(lines[node.lineno - 1].lstrip())
        tags = ["O"] * len(found)
        for each, kind in spans(node):
            start, end = each.col_offset - shift, each.end_col_offset - shift  # type: ignore[attr-defined]
            inside = [number for number, t in enumerate(found) if start <= t.start[1] and t.end[1] <= end]
            if all(found[number].type == tokenize.NAME or found[number].string == "." for number in inside):
                for number in inside:
                    tags[number] = f"{'B' if number == inside[0] else 'I'}-{kind}"
        words = [t.string for t in found]
        if SHORTEST <= len(words) <= LONGEST and not any(" " in word for word in words):
            yield {"tokens": words, "ner_tags": tags}


def main(folder: Path) -> None:
    """Writes ``train.jsonl``, ``validation.jsonl`` and ``test.jsonl``."""
    library, splits, seen = Path(sysconfig.get_paths()["stdlib"]), {}, set()
    files = [file for name in LIBRARIES for file in sorted((library / name).rglob("*.py"))]
    for file in files:
        tenth = hashlib.sha256(str(file.relative_to(library)).encode()).digest()[0] % 10
        split = {0: "validation", 1: "test"}.get(tenth, "train")
        for row in rows_of(file.read_text("utf-8")):
            text = " ".join(row["tokens"])
            if text not in seen:
                seen.add(text)
                splits.setdefault(split, []).append((hashlib.sha256(text.encode()).hexdigest(), row))
    for split, rows in splits.items():
        chosen = sorted(rows, key=lambda row: row[0])[: TRAINING_ROWS if split == "train" else OTHER_ROWS]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for _, row in chosen))
        print(f"{split}: {len(chosen)} of {len(rows)} rows")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

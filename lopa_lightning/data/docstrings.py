"""A data set that every machine has: the docstrings of Python's own standard library."""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lopa_lightning.data.text_classification import TextClassificationDataModule
from lopa_lightning.data.types import DatasetDict
from lopa_lightning.errors import LoPAError

LIBRARIES = ("asyncio", "email", "http", "importlib", "logging", "multiprocessing", "unittest", "xml")
_MIN_CHARACTERS = 20
_TEST_FOLDERS = {"test", "tests"}


class DocstringDataModule(TextClassificationDataModule):
    """Which library of the standard library does a docstring belong to?

    Functions, methods and classes are read from source; nothing is imported. Splits are by a hash of
    the text: equal docstrings are one example, and no text is in two splits. Of ten texts, eight are
    for training, one for validation, one for test.

    Args:
        libraries: Names of modules or packages, the labels.
        **kwargs: See :class:`~lopa_lightning.data.text_classification.TextClassificationDataModule`.

    Raises:
        LoPAError: If a library has no source here.
    """

    def __init__(self, libraries: Sequence[str] = LIBRARIES, **kwargs: Any) -> None:
        folder = Path(sysconfig.get_paths()["stdlib"])
        super().__init__(path=str(folder), labels=libraries, label_column="library", **kwargs)
        self.libraries = libraries
        if missing := [name for name in libraries if not _sources(folder, name)]:
            raise LoPAError(f"the standard library in {folder} has no source of {', '.join(missing)}")

    def load(self) -> DatasetDict:
        """Gathers the docstrings."""
        from datasets import Dataset, DatasetDict

        rows: dict[str, list[dict[str, str]]] = {"train": [], "validation": [], "test": []}
        for text, library in sorted(self._examples().items()):
            rows[_split_of(text)].append({"text": text, "library": library})
        return DatasetDict({split: Dataset.from_list(members) for split, members in rows.items()})

    def _examples(self) -> dict[str, str]:
        """Text to library. A text that stands in two libraries tells nothing and is left out."""
        owners: dict[str, set[str]] = {}
        for library in self.libraries:
            for source in _sources(Path(str(self.path)), library):
                for text in _docstrings(source):
                    owners.setdefault(text, set()).add(library)
        return {text: libraries.pop() for text, libraries in owners.items() if len(libraries) == 1}


def _sources(folder: Path, library: str) -> list[Path]:
    module = folder / f"{library}.py"
    if module.is_file():
        return [module]
    files = sorted((folder / library).rglob("*.py"))
    return [file for file in files if not _TEST_FOLDERS & set(file.relative_to(folder).parts)]


def _docstrings(source: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(source.read_bytes())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            text = " ".join((ast.get_docstring(node) or "").split())
            if len(text) >= _MIN_CHARACTERS:
                yield text


def _split_of(text: str) -> str:
    tenth = hashlib.sha256(text.encode()).digest()[0] % 10
    return {0: "validation", 1: "test"}.get(tenth, "train")

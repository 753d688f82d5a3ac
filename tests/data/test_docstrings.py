from __future__ import annotations

import ast
import asyncio
import email.message
import functools
import http.client
import inspect
import logging
import sysconfig
import unittest
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lopa_lightning.data import DocstringDataModule
from lopa_lightning.data.docstrings import LIBRARIES
from lopa_lightning.errors import LoPAError
from tests.data.conftest import SpecOf
from tests.data.helpers import texts_of


@functools.cache
def rows(*libraries: str) -> Any:
    return DocstringDataModule(libraries or LIBRARIES).raw()


@functools.cache
def splits(*libraries: str) -> dict[str, dict[str, str]]:
    """Split to text to library."""
    raw = rows(*libraries)
    return {split: {row["text"]: row["library"] for row in raw[split]} for split in raw}


def everything(*libraries: str) -> dict[str, str]:
    return {text: library for members in splits(*libraries).values() for text, library in members.items()}


def in_one_line(thing: Any) -> str:
    return " ".join((inspect.getdoc(thing) or "").split())


def documented(module: str) -> set[str]:
    """Docstrings of a module's functions, methods and classes, found by another way."""
    found = set()

    def walk(tree: ast.AST) -> None:
        for node in ast.iter_child_nodes(tree):
            walk(node)
            body = getattr(node, "body", None)
            if not isinstance(node, ast.stmt) or not hasattr(node, "name") or not body:
                continue
            if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
                found.add(" ".join(str(body[0].value.value).split()))

    walk(ast.parse(Path(__import__(module).__file__).read_text(encoding="utf-8")))
    return {text for text in found if len(text) >= 20}


@pytest.fixture
def standard_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for the standard library, with nothing in it."""
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    return tmp_path


def test_no_text_is_there_twice() -> None:
    raw = rows()
    texts = [text for split in raw for text in raw[split]["text"]]
    assert len(texts) > 1000
    assert len(set(texts)) == len(texts)


def test_eight_tenths_are_for_training_and_a_tenth_each_to_validate_and_test(standard_library: Path) -> None:
    for name in ("one", "two"):
        functions = [f'def f(): "In the library {name}, number {i}"' for i in range(10_000)]
        (standard_library / f"{name}.py").write_text("\n".join(functions))
    raw = DocstringDataModule(["one", "two"]).raw()
    for split, share in {"train": 0.8, "validation": 0.1, "test": 0.1}.items():
        assert len(raw[split]) / 20_000 == pytest.approx(share, abs=0.007)


@pytest.mark.parametrize(
    ("thing", "library"),
    [
        (logging.Logger.debug, "logging"),
        (logging.Formatter, "logging"),
        (asyncio.Lock.acquire, "asyncio"),
        (email.message.Message.as_string, "email"),
        (http.client.HTTPConnection.set_tunnel, "http"),
        (unittest.TestCase.assertIsNone, "unittest"),
    ],
    ids=lambda value: getattr(value, "__qualname__", value),
)
def test_a_docstring_belongs_to_the_library_that_holds_it(thing: Callable[..., Any], library: str) -> None:
    assert everything()[in_one_line(thing)] == library


def test_of_a_module_every_docstring_of_twenty_characters_is_there() -> None:
    members = {name: documented(name) for name in ("argparse", "optparse")}
    both = members["argparse"] & members["optparse"]
    assert everything("argparse", "optparse") == {
        text: name for name, texts in members.items() for text in texts - both
    }


def test_a_text_of_two_libraries_is_in_neither() -> None:
    posix, nt = documented("posixpath"), documented("ntpath")
    assert posix & nt
    assert set(everything("posixpath", "ntpath")) == posix ^ nt


def test_what_is_read_of_a_library(standard_library: Path) -> None:
    (standard_library / "one.py").write_text(
        '"""Of the module, which is left out."""\n'
        'class A:\n    """Of  a class,\n\n    on two lines."""\n'
        '    async def f(self):\n        """Of an async method of A."""\n        def g(): "Of a nested function."\n'
        'def short(): "Nineteen characters"\n'
        'def long(): "Twenty characters..."\n'
        'def none(): raise RuntimeError("Not to be imported.")\nnone()\n'
    )
    for name in ("two/__init__.py", "two/inner/deep.py", "two/test/it.py", "two/inner/tests/it.py"):
        (standard_library / name).parent.mkdir(parents=True, exist_ok=True)
        (standard_library / name).write_text(f'def f(): "In the file two, {name}"')
    assert everything("one", "two") == {
        "Of a class, on two lines.": "one",
        "Of an async method of A.": "one",
        "Of a nested function.": "one",
        "Twenty characters...": "one",
        "In the file two, two/__init__.py": "two",
        "In the file two, two/inner/deep.py": "two",
    }


def test_a_texts_split_does_not_depend_on_other_texts() -> None:
    alone, beside = splits("logging", "http"), splits("email", "logging")
    for split in ("train", "validation", "test"):
        shared = {text for text, library in alone[split].items() if library == "logging"}
        assert shared == {text for text, library in beside[split].items() if library == "logging"}
        assert shared


def test_rows_are_the_same_on_every_run() -> None:
    first, second = (DocstringDataModule(["logging", "http"]).raw() for _ in range(2))
    assert {split: first[split].to_dict() for split in first} == {split: second[split].to_dict() for split in second}


def test_batches_hold_texts_and_the_index_of_their_library(text_spec: SpecOf) -> None:
    data = DocstringDataModule(["logging", "http"])
    data.connect(text_spec("gpt2"))
    data.setup("fit")
    data.setup("test")
    for split, loader in (
        ("train", data.train_dataloader()),
        ("validation", data.val_dataloader()[0]),
        ("test", data.test_dataloader()[0]),
    ):
        members = splits("logging", "http")[split]
        assert texts_of(data, loader) == list(members)
        labels = Counter(label for batch in loader for label in batch["labels"].tolist())
        assert labels == Counter(["logging", "http"].index(library) for library in members.values())


@pytest.mark.parametrize("name", ["no_such_library", "math_", "sys"])
def test_a_library_without_source_is_refused(name: str) -> None:
    with pytest.raises(LoPAError, match=rf"has no source of {name}$"):
        DocstringDataModule(["logging", name])


def test_too_few_texts_to_fill_the_splits_are_refused(standard_library: Path, text_spec: SpecOf) -> None:
    for name in ("one", "two"):
        (standard_library / f"{name}.py").write_text(f'def f(): "Of the library {name}, some text"')
    data = DocstringDataModule(["one", "two"])
    data.connect(text_spec())
    with pytest.raises(LoPAError, match=r"\): the split has no rows"):
        data.setup("fit")

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NoReturn

import pytest

from lopa_lightning.files import write_whole

TEXT = "eins\r\nzwei\n日本 😀"


def test_a_file_holds_the_text_in_utf8_with_its_line_ends(tmp_path: Path) -> None:
    write_whole(tmp_path / "a.txt", TEXT)
    assert (tmp_path / "a.txt").read_bytes() == TEXT.encode("utf-8")


def test_folders_are_made(tmp_path: Path) -> None:
    write_whole(tmp_path / "a" / "b" / "c.txt", TEXT)
    assert (tmp_path / "a" / "b" / "c.txt").is_file()


def test_a_file_is_replaced_and_nothing_else_left(tmp_path: Path) -> None:
    write_whole(tmp_path / "a.txt", "old, and longer than the new")
    write_whole(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_file_can_be_read_by_others(tmp_path: Path) -> None:
    write_whole(tmp_path / "a.txt", TEXT)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o644


def test_text_that_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    write_whole(tmp_path / "a.txt", "old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(tmp_path / "a.txt", "new \ud800")
    assert (tmp_path / "a.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("step", ["fsync", "chmod", "replace"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_failure_at_any_step_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException
) -> None:
    def fail(*_: Any) -> NoReturn:
        raise error

    write_whole(tmp_path / "a.txt", "old")
    monkeypatch.setattr(os, step, fail)
    with pytest.raises(type(error)):
        write_whole(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_file_is_never_there_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[tuple[bool, str]] = []
    replace = os.replace

    def look(temporary: str, path: Path) -> None:
        found.append((path.exists(), Path(temporary).read_text(encoding="utf-8")))
        replace(temporary, path)

    monkeypatch.setattr(os, "replace", look)
    write_whole(tmp_path / "a.txt", "new")
    assert found == [(False, "new")]

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NoReturn

import pytest

from lopa_lightning.files import version_of, write_whole

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


def test_a_version_is_of_paths_sizes_and_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("data/train.csv", "data/more/test.csv", "other.csv", "data/.hidden", "data/.cache/file"):
        write_whole(Path(name), "text")
    folder, files = version_of("data"), version_of("data/*.csv", "data/more/test.csv")
    assert folder == files == version_of("data", "data/train.csv") != version_of("data/train.csv")
    assert version_of("nyu-mll/glue", "https://a.org/b.csv", "missing/*.csv") == version_of() == ""
    write_whole(Path("data/.hidden"), "another text")
    write_whole(Path("other.csv"), "another text")
    assert version_of("data") == folder

    stat = os.stat("data/train.csv")
    write_whole(Path("data/train.csv"), "next")
    os.utime("data/train.csv", ns=(0, stat.st_mtime_ns))
    assert version_of("data") == folder  # as long and as old: content is not read
    os.utime("data/train.csv", ns=(0, stat.st_mtime_ns + 1))
    assert version_of("data") != folder
    write_whole(Path("data/train.csv"), "longer")
    os.utime("data/train.csv", ns=(0, stat.st_mtime_ns))
    assert version_of("data") != folder
    write_whole(Path("data/train.csv"), "text")
    os.utime("data/train.csv", ns=(0, stat.st_mtime_ns))
    assert version_of("data") == folder
    write_whole(Path("data/new.csv"), "text")
    assert version_of("data") != folder


def test_a_version_is_of_what_links_lead_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_whole(tmp_path / "blobs" / "1", "text")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").symlink_to(tmp_path / "blobs" / "1")
    (tmp_path / "model" / "gone").symlink_to(tmp_path / "blobs" / "2")
    before = version_of("~/model")
    assert before == version_of(str(tmp_path / "model")) != ""
    write_whole(tmp_path / "blobs" / "1", "longer")
    assert version_of("~/model") != before

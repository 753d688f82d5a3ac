"""A damaged cache and a full disk are named as such."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from datasets import Dataset

from lopa_lightning.backbones.text_spec import TextSpec
from lopa_lightning.data.cache import check_cached
from lopa_lightning.errors import LoPAError
from tests.data.conftest import SpecOf
from tests.data.helpers import labelled, prepared, write

Damage = Callable[[Path], object]


@pytest.fixture
def spec(text_spec: SpecOf) -> TextSpec:
    return text_spec()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def offset_out_of_bounds(path: Path) -> None:
    """Makes one row end far behind the last."""
    content = path.read_bytes()
    with pa.ipc.open_stream(content) as stream:
        column = stream.read_all().column("input_ids").combine_chunks()
    offsets = column.offsets.to_numpy()
    at = content.index(offsets.tobytes()) + offsets.itemsize
    path.write_bytes(content[:at] + b"\x7f" * offsets.itemsize + content[at + offsets.itemsize :])


@pytest.mark.parametrize(
    ("pattern", "damage"),
    [
        ("cache-*.arrow", lambda path: path.write_bytes(b"")),
        ("cache-*.arrow", lambda path: path.write_bytes(path.read_bytes()[:-700])),
        ("cache-*.arrow", lambda path: path.write_bytes(b"\xff" * 300 + path.read_bytes()[300:])),
        ("cache-*.arrow", offset_out_of_bounds),
        ("csv-train.arrow", lambda path: path.write_bytes(b"")),
        ("csv-train.arrow", lambda path: path.write_bytes(path.read_bytes()[:-300])),
    ],
    ids=["empty", "cut", "junk", "offset", "rows-empty", "rows-cut"],
)
def test_a_damaged_file_of_the_cache_is_named_and_rebuilt_once_deleted(
    pattern: str, damage: Damage, spec: TextSpec, cache: Path
) -> None:
    rows = labelled([f"a film of {i}" for i in range(40)], ["good", "bad"])
    options = {"data_files": {"train": write("train.csv", rows), "validation": write("dev.csv", rows[:9])}}
    whole = [batch["input_ids"].tolist() for batch in prepared(spec, **options).train_dataloader()]
    path = sorted(cache.rglob(pattern))[0]
    damage(path)
    again = path if path.name.startswith("cache-") else path.parent
    message = f"cache file {str(path)!r} is damaged; delete {str(again)!r}, and it is rebuilt"
    with pytest.raises(LoPAError, match=re.escape(message)):
        prepared(spec, **options)
    again.unlink() if again == path else shutil.rmtree(again)
    assert [batch["input_ids"].tolist() for batch in prepared(spec, **options).train_dataloader()] == whole


def test_a_damaged_split_of_the_training_rows_is_named(spec: TextSpec, cache: Path) -> None:
    files = {"train": write("train.csv", labelled([f"a film of {i}" for i in range(40)], ["good", "bad"]))}
    prepared(spec, data_files=files)
    for path in cache.rglob("cache-*.arrow"):
        path.write_bytes(b"")
    with pytest.raises(LoPAError, match=r"cache file '.*/cache-\w+.arrow' is damaged; delete '.*/cache-\w+.arrow'"):
        prepared(spec, data_files=files)


def test_rows_that_are_missing_at_the_end_are_missed(tmp_path: Path) -> None:
    blocks = [pa.record_batch({"length": [1, 2]}), pa.record_batch({"length": [3, 4]})]
    with pa.OSFile(str(tmp_path / "cache-1.arrow"), "wb") as file, pa.ipc.new_stream(file, blocks[0].schema) as out:
        out.write_batch(blocks[0])
        middle = file.tell()
        out.write_batch(blocks[1])
    path = tmp_path / "cache-1.arrow"
    check_cached(Dataset.from_file(str(path)), 4)
    path.write_bytes(path.read_bytes()[:middle])
    assert len(Dataset.from_file(str(path))) == 2  # datasets takes it for whole
    with pytest.raises(LoPAError, match="is damaged"):
        check_cached(Dataset.from_file(str(path)), 4)


def test_a_full_disk_is_named_with_the_variable_that_moves_the_cache(
    spec: TextSpec, cache: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", small_disk)
    for rows in (2500, 9000):  # the rows fit, their tokens do not; the rows do not fit
        data = labelled([f"a great film of {i}" for i in range(rows)], ["good", "bad"])
        files = {"train": write(f"{rows}.csv", data)}
        message = f"no space left for the data sets' cache in {str(small_disk)!r}; set HF_DATASETS_CACHE to a folder"
        with pytest.raises(LoPAError, match=re.escape(message)):
            prepared(spec, data_files=files)

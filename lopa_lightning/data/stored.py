"""Reads rows as they are stored: CSV, lists, JSON lines, Parquet, compressed or not, or a data set on the hub."""

from __future__ import annotations

import codecs
import csv
import glob
import io
import itertools
import lzma
import os
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lopa_lightning.data.types import DatasetDict
from lopa_lightning.errors import LoPAError, one_line, one_of

_CHUNK = 2**20  # characters
_READERS = {".csv": "csv", ".tsv": "csv", ".txt": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zip")
_OPTIONS = {
    "csv": ("sep", "encoding", "quotechar", "escapechar", "skiprows", "names"),
    "json": ("encoding", "field"),
    "parquet": (),
}
_CONTROL = re.compile("[\x80-\x9f]")  # which no text has; of Windows' code page, letters and quotation marks


def read_rows(
    path: str | None,
    name: str | None,
    revision: str | None,
    data_files: Mapping[str, str | list[str]] | None,
    string_columns: Sequence[str],
    reader: Mapping[str, Any] | None = None,
) -> DatasetDict:
    """Reads all splits of a data set, as they are stored.

    Args:
        path: Hub id, or a folder in the layout of a hub data set; not read where there are ``data_files``.
        name: Config of the data set.
        revision: Branch, tag or commit on the hub.
        data_files: Split name to file or files; None to read ``path``. Those of ``predict`` may have other columns.
        string_columns: Columns that are read from CSV as they stand there: ``007`` stays a text.
        reader: How files are read, such as ``{"sep": ";", "encoding": "latin-1"}``.

    Raises:
        LoPAError: If the data is not found or cannot be read.
    """
    from datasets import DatasetDict

    options = dict(reader or {})
    if data_files is not None:
        alone = {split: files for split, files in data_files.items() if split == "predict"}
        together = {split: files for split, files in data_files.items() if split != "predict"}
        groups = [files for files in (together, alone) if files] or [{}]
        loaded = [_loaded(repr(files), _reader_of(files, string_columns, options)) for files in groups]
        return DatasetDict({split: rows for splits in loaded for split, rows in splits.items()})
    folder = os.path.expanduser(str(path))
    if (is_there := os.path.exists(folder)) and not os.path.isdir(folder):
        raise LoPAError(f"path {folder!r} is a file; name it in data_files, such as {{train: {folder}}}")
    if is_there and (real := os.path.realpath(folder)) != glob.escape(real):
        raise LoPAError(
            f"path {real!r} has *, ? or [ in its name, by which other folders could be meant; rename it, or name its "
            "files in data_files"
        )
    if is_there and revision is not None:
        raise LoPAError(f"revision is of a data set on the hub, and path {folder!r} is a folder; got {revision!r}")
    return _loaded(repr(path), {"path": folder, "name": name, "revision": revision, **options}, is_there)


def _loaded(what: str, arguments: dict[str, Any], is_there: bool = True) -> DatasetDict:
    """Returns the splits that ``load_dataset_builder`` gives for its arguments.

    Args:
        what: What is read, for messages.
        arguments: Of ``load_dataset_builder``.
        is_there: Whether files were found.
    """
    from datasets import DatasetDict, load_dataset_builder

    try:
        builder = load_dataset_builder(**arguments)
        _check_texts(builder.config)
        builder.download_and_prepare()
        loaded = builder.as_dataset()
    except LoPAError:
        raise
    except Exception as error:  # pandas, pyarrow and datasets raise whatever a foreign file makes them stumble over
        problem = f"the data in {what} cannot be read" if is_there else f"no data found for {what}"
        raise LoPAError(f"{problem}: {_reason(error)}") from error
    assert isinstance(loaded, DatasetDict)
    if any("__index_level_0__" in names for names in loaded.column_names.values()):
        raise LoPAError(f"the data in {what} cannot be read: a row has more cells than the header")
    return loaded


def _reason(error: Exception) -> str:
    from datasets.table import CastError

    cause = error.__cause__ or error
    if isinstance(cause, CastError):  # only the outer error's words name the file
        file = "".join(str(error).partition("generating data using\n\n")[2].splitlines()[:1]) or "one"
        got, wanted = (", ".join(names) for names in (cause.table_column_names, cause.requested_column_names))
        return f"its files must have the same columns; {file} has {got} in place of {wanted}"
    return "it has no rows" if isinstance(cause, StopIteration) else one_line(cause)


def _pattern(file: str) -> str:
    """Returns an absolute pattern, ``~`` expanded. A file or folder that is there is meant, whatever its name."""
    if "://" in file:
        return file
    path = Path(os.path.abspath(os.path.expanduser(file)))
    there = next(part for part in (path, *path.parents) if os.path.exists(part))
    return os.path.normpath(os.path.join(glob.escape(str(there)), path.relative_to(there)))


def _is_found(file: str) -> bool:
    return "://" in file or any(map(os.path.isfile, glob.iglob(_pattern(file), recursive=True)))


def _reader_of(
    data_files: Mapping[str, str | list[str]], text_columns: Sequence[str], given: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns arguments of ``load_dataset`` for files, by their endings.

    Raises:
        LoPAError: If a file is not there or is a pipe or a device, endings are unknown or mixed, or an option is none
            of the reader's.
    """
    files = {split: [entry] if isinstance(entry, str) else entry for split, entry in data_files.items()}
    named = list(itertools.chain(*files.values()))
    if missing := [file for file in named if not _is_found(file)]:
        raise LoPAError(f"no such regular file: {', '.join(missing)}")
    endings = {_ending(file) or file for file in named}
    readers = {_READERS.get(ending, "") for ending in endings}
    if len(readers) != 1 or "" in readers or (readers == {"csv"} and len(endings) > 1):
        got = ", ".join(sorted(endings)) or "none"
        raise LoPAError(f"data_files must all be of one of {', '.join(_READERS)}; got {got}")
    reader = readers.pop()
    if endings == {".txt"} and not {"sep", "names"} <= {*given}:
        raise LoPAError("a .txt must be a table: say in reader how, such as {sep: ' ', names: [image, label]}")
    for name in given:
        one_of(f"an option in reader for {', '.join(sorted(endings))}", name, _OPTIONS[reader])
    options: dict[str, Any] = {}
    if reader == "csv":
        # A text may well be "None", "NA" or "007"; only an empty cell is missing.
        options = {"keep_default_na": False, "na_values": [""], "converters": dict.fromkeys(text_columns, _cell)}
        options["sep"] = "\t" if endings == {".tsv"} else ","
    patterns = {split: list(map(_pattern, parts)) for split, parts in files.items()}
    return {"path": reader, "data_files": patterns, **options, **given}


def _ending(file: str) -> str:
    """Returns a file's ending, without that of a compression of text: ``.csv`` of ``a.csv.gz``."""
    path = Path(file)
    inner = path.with_suffix("").suffix
    return inner if path.suffix in _COMPRESSED and _READERS.get(inner) in ("csv", "json") else path.suffix


def _cell(written: str) -> str | None:
    return written or None


def _check_texts(config: Any) -> None:
    """Refuses files of CSV or JSON that are not text, or whose columns have one name.

    Args:
        config: Of their reader: which files it reads, and how.
    """
    from datasets.packaged_modules.csv.csv import CsvConfig
    from datasets.packaged_modules.json.json import JsonConfig

    if not isinstance(config, CsvConfig | JsonConfig):
        return
    # A folder's README, or an option, may say that there is no header.
    other = config.names or config.skiprows or config.usecols if isinstance(config, CsvConfig) else True
    has_header = not other and config.header == "infer"
    columns: list[str] = []
    # A data set of the hub that is only in the cache names no files.
    for path in itertools.chain(*(config.data_files or {}).values()):
        if "://" in path or _ending(path) not in _READERS:
            continue
        problem = f"the data in {path!r} cannot be read"
        try:
            _check_encoding(path, config.encoding or "utf-8", problem)
            start = io.StringIO(next(_chunks(path, config.encoding or "utf-8"), ""), newline="")
            names = next(csv.reader(start, delimiter=config.sep), []) if has_header else []
        except (OSError, EOFError, LookupError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, csv.Error) as error:
            raise LoPAError(f"{problem}: {one_line(error)}") from error
        columns = columns or names
        if names and config.features is None and set(names) != set(columns):
            got = f"{', '.join(names)} in place of {', '.join(columns)}"
            raise LoPAError(f"{problem} with the others, which must have the same columns: it has {got}")
        if repeated := sorted({name for name in names if names.count(name) > 1 and name}):
            raise LoPAError(f"the data in {path!r} has two columns of one name: {', '.join(repeated)}")


def _check_encoding(path: str, encoding: str, problem: str) -> None:
    """Reads a file to its end, and refuses one that is in another encoding.

    Raises:
        LoPAError: If it is; the message says which option to set.
    """
    codec = codecs.lookup(encoding).name
    is_utf8 = codec.startswith("utf-8")
    if codec.startswith(("utf-16", "utf-32")) and _READERS[_ending(path)] == "json":
        raise LoPAError(f"{problem}: JSON must not be in {encoding}; save it in UTF-8")
    if not is_utf8 and _is_utf8(path, encoding):
        raise LoPAError(f"{problem}: it is in UTF-8, and not in {encoding}; leave encoding out of reader")
    try:
        for chunk in _chunks(path, encoding):
            if "\0" in chunk:
                raise LoPAError(f"{problem}: it has NUL characters; save it in UTF-8")
            if not is_utf8 and (found := _CONTROL.search(chunk)):
                fault = f"as {encoding} it has the control character U+{ord(found[0]):04X}"
                raise LoPAError(f"{problem}: {fault}; set reader: {{encoding: cp1252}}, or what it is")
    except UnicodeError as error:
        fault, likely = one_line(error), "latin-1"
        if isinstance(error, UnicodeDecodeError):
            byte = error.object[error.start]
            fault = f"it has a byte {byte:#x} that is not {error.encoding.upper()}"
            likely = "utf-16" if error.start == 0 and byte in (0xFE, 0xFF) else "latin-1"
        raise LoPAError(f"{problem}: {fault}; set reader: {{encoding: {likely}}}, or what it is") from error


def _is_utf8(path: str, encoding: str) -> bool:
    """Returns whether a file is text in UTF-8, which says something else in another encoding."""
    differs = False
    try:
        for right, other in itertools.zip_longest(_chunks(path, "utf-8"), _chunks(path, encoding)):
            if "\0" in (right or ""):
                return False
            differs = differs or right != other
    except UnicodeError:
        return False
    return differs


def _chunks(path: str, encoding: str) -> Iterator[str]:
    """Yields a file's text, decompressed by its ending, without a byte order mark."""
    from fsspec.implementations.local import LocalFileSystem

    encoding = "utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding
    with LocalFileSystem().open(path, "rt", compression="infer", encoding=encoding, newline="") as text:
        while chunk := text.read(_CHUNK):
            yield chunk

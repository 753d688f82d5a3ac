"""Reads checkpoint files, which may be anybody's: plain data and tensors, no larger than the file, or an error.

Nothing that a file names is imported or called. What it holds is checked here as far as that needs no model.
"""

from __future__ import annotations

import contextlib
import pickletools
import re
import zipfile
from collections.abc import Iterator, Mapping
from typing import IO, Any

import torch
from lightning.fabric.utilities.cloud_io import get_filesystem
from packaging.version import Version
from torch import Tensor

from lopa_lightning.errors import LoPAError, one_line, shown
from lopa_lightning.migrations import HYPERPARAMETERS, IDENTITY_KEY, migrate
from lopa_lightning.plain import subclasses

_NEEDED = {"state_dict": dict, HYPERPARAMETERS: dict, IDENTITY_KEY: dict, "pytorch-lightning_version": str}
_ENTRIES: dict[str, type] = {
    **_NEEDED,
    **{"epoch": int, "global_step": int, "loops": dict, "callbacks": dict},
    **{"optimizer_states": list, "lr_schedulers": list, "hparams_name": str, "hparams_type": object},
    **{"datamodule_hparams_name": str, "datamodule_hyper_parameters": dict, "datamodule_hparams_type": object},
}
# What pickles of plain data and dense tensors call. torch itself would also build sparse and quantised tensors, tensors
# without values, and a bytearray of any length.
_CALLED = re.compile(
    r"torch\._utils (_rebuild_tensor_v2|_rebuild_parameter)|torch \w+Storage|torch\.storage UntypedStorage|"
    r"torch (Size|device|b?float\d+|u?int\d+|bool)|collections (OrderedDict|Counter)|(__builtin__|builtins) set"
)
_MOST_OPERATIONS = 1_000_000  # of a pickle; a checkpoint has about 30 for each tensor
_MOST_ENTRIES = 200_000  # of nested data, and characters of a text in it
_DEEPEST = 30
_OLDEST_LIGHTNING = 2  # that this package has run with: Lightning would bring older ones' state to its present form


def read(path: Any, map_location: Any = "cpu") -> dict[str, Any]:
    """Reads a checkpoint as plain data and brings it to the present format; no code runs.

    Args:
        path: A file, also on another file system that fsspec knows, or an open one.
        map_location: See ``torch.load``.

    Raises:
        LoPAError: If it is not there, is damaged, or is not a checkpoint of this package.
    """
    name = shown(str(path))
    try:
        with _opened(path) as file:
            size = _check_archive(file)
            saved: dict[str, Any] = torch.load(file, map_location=map_location, weights_only=True)
        check_content(saved, size)
    except FileNotFoundError:
        raise LoPAError(f"no checkpoint at {name}") from None
    except LoPAError as error:
        raise LoPAError(f"{name} cannot be read as a checkpoint: {error}") from None
    except OSError as error:
        raise LoPAError(f"{name} cannot be read as a checkpoint: {error.strerror or type(error).__name__}") from error
    except Exception as error:  # torch raises whatever a foreign file makes it stumble over
        # Without torch's text, which advises to let the file run code.
        raise LoPAError(f"{name} cannot be read as a checkpoint: it is damaged ({type(error).__name__})") from error
    return saved


def _opened(path: Any) -> contextlib.AbstractContextManager[IO[bytes]]:
    if hasattr(path, "read"):
        return contextlib.nullcontext(path)
    try:
        system = get_filesystem(path)
    except (ValueError, ImportError) as error:  # of a protocol that fsspec does not know, or that needs a package
        raise LoPAError(one_line(error)) from error
    # A device or a pipe may have no end.
    if "file" in system.protocol and system.exists(path) and not system.isfile(path):
        raise LoPAError("it is no regular file")
    opened: contextlib.AbstractContextManager[IO[bytes]] = system.open(str(path), "rb")
    return opened


def _check_archive(file: IO[bytes]) -> int:
    """Looks at a file's table of contents and at what its pickle would call. Returns its size in bytes."""
    size = file.seek(0, 2)
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            if any(entry.compress_type for entry in entries) or sum(entry.file_size for entry in entries) > size:
                raise LoPAError("it is compressed, and could unpack to any size; torch.save does not compress")
            names = [entry.filename for entry in entries]
            main = f"{names[0].partition('/')[0]}/data.pkl" if names else ""
            # torch's own reader looks for this one, whatever its case.
            if main not in names or len({name.lower() for name in names}) < len(names):
                raise LoPAError("torch.save did not write it")
            with archive.open(main) as pickled:
                for count, (operation, argument, _) in enumerate(pickletools.genops(pickled)):
                    # The only way of naming something that torch's unpickler knows.
                    if operation.name == "GLOBAL" and not _CALLED.fullmatch(str(argument)):
                        named = shown(str(argument).replace(" ", "."))
                        raise LoPAError(f"it holds {named}, and a checkpoint holds only plain data and dense tensors")
                    if count > _MOST_OPERATIONS:
                        raise LoPAError("it has more entries than a checkpoint")
    except (zipfile.BadZipFile, ValueError, EOFError) as error:
        if isinstance(error, LoPAError):
            raise
        raise LoPAError("it is empty, cut off, or no file that torch.save wrote") from error
    file.seek(0)
    return size


def check_content(saved: Any, size: int) -> None:
    """Checks what a checkpoint holds as far as that needs no model, and brings it to the present format, in place.

    Args:
        saved: What was read.
        size: Bytes of the file.

    Raises:
        LoPAError: If it is no checkpoint of this package, or holds what none has.
    """
    _check_entries(saved)
    _check_tensors(saved, size)
    migrate(saved)


def _check_entries(saved: Any) -> None:
    if not isinstance(saved, dict) or not isinstance(saved.get(IDENTITY_KEY), dict):
        raise LoPAError("it is no checkpoint of LoPA Lightning: it names no frozen models that it belongs to")
    for key in [*_NEEDED, *saved]:
        kind = _ENTRIES.get(key) or (object if key in _owners() else None)
        if kind is None:
            raise LoPAError(f"it has an unknown entry {shown(key)}")
        if not isinstance(saved.get(key), kind):
            raise LoPAError(f"its {key} must be a {kind.__name__}, got a {type(saved.get(key)).__name__}")
    version = saved["pytorch-lightning_version"]
    with contextlib.suppress(ValueError):
        if Version(version).major >= _OLDEST_LIGHTNING:
            return
    raise LoPAError(f"its version of Lightning is {shown(version)}; it must be {_OLDEST_LIGHTNING} or later")


def _check_tensors(saved: dict[str, Any], size: int) -> None:
    for key in (HYPERPARAMETERS, IDENTITY_KEY):
        if next(_tensors(saved[key], key, iter(range(_MOST_ENTRIES))), None) is not None:
            raise LoPAError(f"its {key} hold a tensor")
    tensors = list(_tensors(saved, "", iter(range(_MOST_ENTRIES))))
    if sum(tensor.numel() * tensor.element_size() for _, tensor in tensors) > size:
        raise LoPAError("its tensors are larger than the file")
    for name, value in saved["state_dict"].items():
        if not isinstance(name, str) or not isinstance(value, Tensor) or not value.is_floating_point():
            kind_of = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise LoPAError(f"its state_dict must hold tensors of real numbers, {shown(name)} is {kind_of}")
    for name, tensor in tensors:
        if name.startswith(("state_dict.", "optimizer_states.")) and not tensor.isfinite().all():
            raise LoPAError(f"{shown(name)} is NaN or infinite in part")


def _owners() -> set[str]:
    """Returns the names of classes that may have an entry of their own in a checkpoint."""
    from lightning.pytorch import Callback, LightningDataModule, LightningModule
    from lightning.pytorch.plugins import Precision

    return {cls.__qualname__ for cls in subclasses((Callback, LightningDataModule, LightningModule, Precision))}


def _tensors(value: Any, name: str, entries: Iterator[int], depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Walks through nested data.

    Raises:
        LoPAError: If there is anything else than plain data and tensors, or too much: a short pickle can name one list
            in another over and over.
    """
    if depth > _DEEPEST or next(entries, None) is None:
        raise LoPAError(f"its {shown(name)} is nested too deeply, or has too many entries")
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping | list | tuple | set):
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            if not isinstance(key, str | int | float | None):
                raise LoPAError(f"its {shown(name)} has a key of type {type(key).__name__}")
            yield from _tensors(item, f"{name}.{str(key)[:200]}" if name else str(key), entries, depth + 1)
    elif (isinstance(value, int) and abs(value) >= 2**63) or (isinstance(value, str) and len(value) > _MOST_ENTRIES):
        raise LoPAError(f"its {shown(name)} is longer than any setting")

"""Finds the YAML files that come with the package."""

from __future__ import annotations

import os
from pathlib import Path

_PACKAGE = Path(__file__).parent.parent
# In the package once it is installed, beside it in a checkout.
_FOLDER = next((path for path in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if path.is_dir()), None)


def located(path: str) -> str:
    """Returns where a configuration lies: as it is named or, for ``configs/NAME`` that is not there, in the package.

    Args:
        path: As given by the user.
    """
    parts = Path(path).parts
    if _FOLDER is None or parts[:1] != ("configs",) or ".." in parts or os.path.exists(path):
        return path
    shipped = _FOLDER.joinpath(*parts[1:])
    return str(shipped) if shipped.is_file() else path


def descriptions() -> dict[str, str]:
    """Returns the first line of each file by its name, ``configs/`` first: tasks, then what is put over them."""
    if _FOLDER is None:
        return {}
    paths = sorted(_FOLDER.rglob("*.yaml"), key=lambda path: (len(path.parts), path))
    lines = {path: path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ") for path in paths}
    return {f"configs/{path.relative_to(_FOLDER).as_posix()}": line for path, line in lines.items()}

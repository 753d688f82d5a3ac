"""Types of the library ``datasets``, for annotations alone: it takes a second to import."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset as Dataset
    from datasets import DatasetDict as DatasetDict
else:
    Dataset = DatasetDict = Any

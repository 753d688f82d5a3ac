"""LightningDataModules: one for each benchmark or source, on one base."""

from lopa_lightning.data.code.cruxeval import CRUXEvalDataModule
from lopa_lightning.data.code.mbpp import MBPPDataModule
from lopa_lightning.data.completion import CompletionDataModule
from lopa_lightning.data.docstrings import DocstringDataModule
from lopa_lightning.data.glue import GLUEDataModule
from lopa_lightning.data.image import ImageClassificationDataModule
from lopa_lightning.data.text import TextDataModule
from lopa_lightning.data.text_classification import TextClassificationDataModule

__all__ = [
    "CRUXEvalDataModule",
    "CompletionDataModule",
    "DocstringDataModule",
    "GLUEDataModule",
    "ImageClassificationDataModule",
    "MBPPDataModule",
    "TextClassificationDataModule",
    "TextDataModule",
]

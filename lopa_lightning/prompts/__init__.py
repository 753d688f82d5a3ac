"""Prompt encoders: plain torch modules that turn an instance vector into a soft prompt, each in a file of its own."""

import importlib
import pkgutil

from lopa_lightning.prompts.base import PromptEncoder, PromptEncoderFactory, UniformTokens, Vocabulary
from lopa_lightning.prompts.dept import DePT
from lopa_lightning.prompts.idpg import IDPG
from lopa_lightning.prompts.lopa import LoPA
from lopa_lightning.prompts.none import NoPrompt
from lopa_lightning.prompts.p_tuning import PTuning
from lopa_lightning.prompts.prompt_tuning import PromptTuning
from lopa_lightning.prompts.visual import VisualPromptTuning

__all__ = [
    "IDPG",
    "DePT",
    "LoPA",
    "NoPrompt",
    "PTuning",
    "PromptEncoder",
    "PromptEncoderFactory",
    "PromptTuning",
    "UniformTokens",
    "VisualPromptTuning",
    "Vocabulary",
]

# A checkpoint's method is looked up among the classes that are imported: a new file in this folder is enough.
for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_module.name)

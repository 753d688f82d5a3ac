"""Prompt encoders: plain torch modules that turn an instance vector into a soft prompt."""

from lopa_lightning.prompts.base import PromptEncoder, PromptEncoderFactory, Vocabulary
from lopa_lightning.prompts.dept import DePT
from lopa_lightning.prompts.idpg import IDPG
from lopa_lightning.prompts.lopa import LoPA
from lopa_lightning.prompts.none import NoPrompt
from lopa_lightning.prompts.peft_prompt import PeftPromptTuning
from lopa_lightning.prompts.ptuning import PTuning
from lopa_lightning.prompts.soft import PromptTuning

__all__ = [
    "IDPG",
    "DePT",
    "LoPA",
    "NoPrompt",
    "PTuning",
    "PeftPromptTuning",
    "PromptEncoder",
    "PromptEncoderFactory",
    "PromptTuning",
    "Vocabulary",
]

"""Prompt encoders: plain torch modules that turn an instance vector into a soft prompt."""

from lopa_lightning.prompts.base import PromptEncoder, PromptEncoderFactory, Vocabulary
from lopa_lightning.prompts.lopa import LoPA
from lopa_lightning.prompts.soft import PromptTuning

__all__ = ["LoPA", "PromptEncoder", "PromptEncoderFactory", "PromptTuning", "Vocabulary"]

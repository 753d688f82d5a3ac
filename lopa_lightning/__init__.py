"""Low-Rank Prompt Adaptation of frozen foundation models, as PyTorch Lightning modules."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lopa_lightning.backbones.pretrained import PretrainedSpec as PretrainedSpec
    from lopa_lightning.callbacks import default_callbacks as default_callbacks
    from lopa_lightning.data import CompletionDataModule as CompletionDataModule
    from lopa_lightning.data import CRUXEvalDataModule as CRUXEvalDataModule
    from lopa_lightning.data import GLUEDataModule as GLUEDataModule
    from lopa_lightning.data import ImageClassificationDataModule as ImageClassificationDataModule
    from lopa_lightning.data import MBPPDataModule as MBPPDataModule
    from lopa_lightning.data import TextClassificationDataModule as TextClassificationDataModule
    from lopa_lightning.instances.encoder import InstanceEncoderSpec as InstanceEncoderSpec
    from lopa_lightning.modules import CausalLMModule as CausalLMModule
    from lopa_lightning.modules import ClassificationModule as ClassificationModule
    from lopa_lightning.modules import ImageClassificationModule as ImageClassificationModule
    from lopa_lightning.modules import LoPALightningModule as LoPALightningModule
    from lopa_lightning.modules.schedule import CosineDecay as CosineDecay
    from lopa_lightning.prompts import IDPG as IDPG
    from lopa_lightning.prompts import DePT as DePT
    from lopa_lightning.prompts import LoPA as LoPA
    from lopa_lightning.prompts import NoPrompt as NoPrompt
    from lopa_lightning.prompts import PromptEncoder as PromptEncoder
    from lopa_lightning.prompts import PromptTuning as PromptTuning
    from lopa_lightning.prompts import PTuning as PTuning
    from lopa_lightning.prompts import VisualPromptTuning as VisualPromptTuning
    from lopa_lightning.serving.bundle import Bundle as Bundle
    from lopa_lightning.serving.client import AsyncLoPAClient as AsyncLoPAClient
    from lopa_lightning.serving.client import LoPAClient as LoPAClient
    from lopa_lightning.serving.prompter import LoPAPrompter as LoPAPrompter
    from lopa_lightning.serving.requests import ServedPrompter as ServedPrompter
    from lopa_lightning.serving.requests import build_messages as build_messages
    from lopa_lightning.serving.requests import build_prompt_embeds as build_prompt_embeds
    from lopa_lightning.task import Task as Task
    from lopa_lightning.task import Verbalizer as Verbalizer

__version__ = "0.1.0"

_HOMES = {
    "AsyncLoPAClient": "serving.client",
    "Bundle": "serving.bundle",
    "CRUXEvalDataModule": "data",
    "CausalLMModule": "modules",
    "ClassificationModule": "modules",
    "CompletionDataModule": "data",
    "CosineDecay": "modules.schedule",
    "DePT": "prompts",
    "GLUEDataModule": "data",
    "IDPG": "prompts",
    "ImageClassificationDataModule": "data",
    "ImageClassificationModule": "modules",
    "InstanceEncoderSpec": "instances.encoder",
    "LoPA": "prompts",
    "LoPAClient": "serving.client",
    "LoPALightningModule": "modules",
    "LoPAPrompter": "serving.prompter",
    "MBPPDataModule": "data",
    "NoPrompt": "prompts",
    "PTuning": "prompts",
    "PretrainedSpec": "backbones.pretrained",
    "PromptEncoder": "prompts",
    "PromptTuning": "prompts",
    "ServedPrompter": "serving.requests",
    "Task": "task",
    "TextClassificationDataModule": "data",
    "Verbalizer": "task",
    "VisualPromptTuning": "prompts",
    "build_messages": "serving.requests",
    "build_prompt_embeds": "serving.requests",
    "default_callbacks": "callbacks",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used: importing the package alone costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)

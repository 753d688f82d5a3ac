"""Low-Rank Prompt Adaptation of frozen foundation models, as PyTorch Lightning modules."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lopa_lightning.backbones.pretrained import PretrainedSpec
    from lopa_lightning.callbacks import default_callbacks
    from lopa_lightning.data import (
        CompletionDataModule,
        CRUXEvalDataModule,
        GLUEDataModule,
        ImageClassificationDataModule,
        MBPPDataModule,
        TextClassificationDataModule,
    )
    from lopa_lightning.instances.encoder import InstanceEncoderSpec
    from lopa_lightning.modules import (
        CausalLMModule,
        ClassificationModule,
        ImageClassificationModule,
        LoPALightningModule,
    )
    from lopa_lightning.prompts import (
        IDPG,
        DePT,
        LoPA,
        NoPrompt,
        PromptEncoder,
        PromptTuning,
        PTuning,
        VisualPromptTuning,
    )
    from lopa_lightning.serving.bundle import Bundle
    from lopa_lightning.serving.client import AsyncLoPAClient, LoPAClient
    from lopa_lightning.serving.prompter import LoPAPrompter
    from lopa_lightning.serving.requests import ServedPrompter, build_messages, build_prompt_embeds
    from lopa_lightning.task import Task, Verbalizer

__version__ = "0.1.0"

_HOMES = {
    "AsyncLoPAClient": "serving.client",
    "Bundle": "serving.bundle",
    "CRUXEvalDataModule": "data",
    "CausalLMModule": "modules",
    "ClassificationModule": "modules",
    "CompletionDataModule": "data",
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
    "TextClassificationDataModule": "data",
    "Task": "task",
    "Verbalizer": "task",
    "VisualPromptTuning": "prompts",
    "build_messages": "serving.requests",
    "build_prompt_embeds": "serving.requests",
    "default_callbacks": "callbacks",
}

__all__ = [
    "IDPG",
    "AsyncLoPAClient",
    "Bundle",
    "CRUXEvalDataModule",
    "CausalLMModule",
    "ClassificationModule",
    "CompletionDataModule",
    "DePT",
    "GLUEDataModule",
    "ImageClassificationDataModule",
    "ImageClassificationModule",
    "InstanceEncoderSpec",
    "LoPA",
    "LoPAClient",
    "LoPALightningModule",
    "LoPAPrompter",
    "MBPPDataModule",
    "NoPrompt",
    "PTuning",
    "PretrainedSpec",
    "PromptEncoder",
    "PromptTuning",
    "ServedPrompter",
    "Task",
    "TextClassificationDataModule",
    "Verbalizer",
    "VisualPromptTuning",
    "build_messages",
    "build_prompt_embeds",
    "default_callbacks",
]


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used: importing the package alone costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)

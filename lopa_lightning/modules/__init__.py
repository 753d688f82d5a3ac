"""Holds the LightningModules: one for each kind of task, on one base."""

from lopa_lightning.modules.base import LoPALightningModule
from lopa_lightning.modules.causal_lm import CausalLMModule
from lopa_lightning.modules.classification import ClassificationModule
from lopa_lightning.modules.image_classification import ImageClassificationModule
from lopa_lightning.modules.prompted_model import PromptedModel
from lopa_lightning.modules.readouts import CompletionReadout, HeadReadout, LabelWordReadout, Readout, WordReadout

__all__ = [
    "CausalLMModule",
    "ClassificationModule",
    "CompletionReadout",
    "HeadReadout",
    "ImageClassificationModule",
    "LabelWordReadout",
    "LoPALightningModule",
    "PromptedModel",
    "Readout",
    "WordReadout",
]

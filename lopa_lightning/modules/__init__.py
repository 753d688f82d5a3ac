"""LightningModules: one for each kind of task, on one base."""

from lopa_lightning.modules.base import LoPALightningModule
from lopa_lightning.modules.classification import ClassificationModule
from lopa_lightning.modules.net import HeadReadout, LabelWordReadout, PromptedModel, Readout

__all__ = [
    "ClassificationModule",
    "HeadReadout",
    "LabelWordReadout",
    "LoPALightningModule",
    "PromptedModel",
    "Readout",
]

"""Holds the Lightning callbacks, which show and write what a run does."""

from lopa_lightning.callbacks.checkpoints import BestCheckpoint, LastCheckpoint
from lopa_lightning.callbacks.defaults import default_callbacks
from lopa_lightning.callbacks.predictions import PredictionWriter
from lopa_lightning.callbacks.progress import EpochBar
from lopa_lightning.callbacks.prompt_monitor import PromptMonitor
from lopa_lightning.callbacks.run_folder import RunConfig, RunLogger
from lopa_lightning.callbacks.run_record import RunRecord
from lopa_lightning.callbacks.summary import FitSummary

__all__ = [
    "BestCheckpoint",
    "EpochBar",
    "FitSummary",
    "LastCheckpoint",
    "PredictionWriter",
    "PromptMonitor",
    "RunConfig",
    "RunLogger",
    "RunRecord",
    "default_callbacks",
]

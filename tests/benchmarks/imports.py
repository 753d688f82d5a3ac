"""What any program imports that trains a pretrained model with Lightning: timed by :mod:`tests.benchmarks.startup`."""

import lightning.pytorch
import transformers

__all__ = ["lightning", "transformers"]

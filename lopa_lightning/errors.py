"""The error for input that cannot be right."""

from __future__ import annotations


class LoPAError(ValueError):
    """A config, file, label, model or checkpoint is not what it must be.

    Its message names the thing, what was got and what is allowed. The command line shows it without
    a traceback.
    """

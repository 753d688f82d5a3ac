"""Defines metrics: of classes and numbers, of tokens, and pass@k."""

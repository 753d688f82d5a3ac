from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lopa_lightning.prompts import Vocabulary
from tests.prompts.checks import ORDINARY, WORDS


@pytest.fixture
def table() -> Tensor:
    """30 tokens of width 8, the first 5 of them special."""
    return torch.randn(30, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def vocabulary(table: Tensor) -> Vocabulary:
    return Vocabulary(table.__getitem__, ORDINARY, lambda text: [WORDS[word] for word in text.split()], str)

"""A refusal must come in one line, name what is wrong, come before weights are read, and leave nothing behind."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

Refused = Callable[..., contextlib.AbstractContextManager[None]]


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> Refused:
    """A context manager that checks a refusal.

    Its arguments are parts of the message; ``rows`` says whether rows may be tokenised before.
    """
    import datasets
    from transformers import PreTrainedModel

    from lopa_lightning.errors import LoPAError

    reached: list[str] = []

    def weights(*_: Any, **__: Any) -> None:
        reached.append("weights")
        raise AssertionError("weights were read")

    tokenise = datasets.Dataset.map

    def tokenised(*args: Any, **options: Any) -> Any:
        reached.append("rows")
        return tokenise(*args, **options)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(weights))
    monkeypatch.setattr(datasets.Dataset, "map", tokenised)

    @contextlib.contextmanager
    def check(*parts: str, rows: bool = False) -> Iterator[None]:
        before = set(Path().rglob("*"))
        with pytest.raises(LoPAError) as caught:
            yield
        assert_refusal(str(caught.value), *parts)
        assert set(reached) <= ({"rows"} if rows else set())
        assert set(Path().rglob("*")) == before

    return check


def assert_refusal(message: str, *parts: str) -> None:
    """Checks that a message is one line of bearable length with all that it must name."""
    assert "\n" not in message.strip()
    assert len(message) < 800
    for part in parts:
        assert part in message

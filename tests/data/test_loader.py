from __future__ import annotations

from typing import Any

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import SequentialSampler

from lopa_lightning.data.collate import Collate, Rows
from lopa_lightning.data.loader import ResumableLoader
from lopa_lightning.data.sampler import LengthGroupedSampler

LENGTHS = [3, 9, 1, 8, 2, 7, 7, 4, 5, 6]
SIZES: list[dict[str, int]] = [{"batch_size": 2}, {"batch_tokens": 14}]


def loader(epoch: int = 1, seed: int = 3, share: int | float = 1.0, **size: int) -> ResumableLoader:
    sampler = LengthGroupedSampler(LENGTHS, seed=seed, **(size or {"batch_size": 2}))
    sampler.set_epoch(epoch)
    return ResumableLoader(np.arange(10), sampler, share=share)


def rows(loaded: ResumableLoader) -> list[list[int]]:
    return [batch.tolist() for batch in loaded if isinstance(batch, torch.Tensor)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("taken", range(5))
def test_it_goes_on_after_the_batches_that_were_handed_out(taken: int, size: dict[str, int]) -> None:
    first, again = loader(**size), loader(**size)
    batches = iter(first)
    before = [next(batches).tolist() for _ in range(taken)]  # type: ignore[attr-defined]
    again.load_state_dict(first.state_dict())
    assert again.state_dict() == first.state_dict()
    assert before + rows(again) == rows(loader(**size))
    assert rows(again) == rows(loader(**size))  # the next epoch is a whole one
    assert len(again) == len(rows(again))


@pytest.mark.parametrize(("share", "used"), [(1.0, 5), (3, 3), (0.4, 2), (9, 5)])
def test_after_the_last_batch_that_is_used_comes_the_first(share: int | float, used: int) -> None:
    limited = loader(share=share)
    batches = iter(limited)
    places = []
    for _ in range(used):
        next(batches)
        places.append(limited.state_dict()["batches"])
    assert places == [*range(1, used), 0]


def test_another_order_is_said_unless_nothing_was_taken() -> None:
    state = {**loader().state_dict(), "batches": 2}
    with pytest.warns(UserWarning, match=r"its batches were others \(batch_size 2, now 5; seed 3, now 4\)"):
        loader(batch_size=5, seed=4).load_state_dict(state)
    with pytest.warns(UserWarning, match=r"\(batch_size 2, now None; batch_tokens None, now 14\)"):
        loader(batch_tokens=14).load_state_dict(state)
    loader(batch_size=5).load_state_dict({**state, "batches": 0})


def texts(**options: Any) -> ResumableLoader:
    data = datasets.Dataset.from_dict({"input_ids": [[7] * length for length in LENGTHS], "index": range(10)})
    return ResumableLoader(Rows(data), collate_fn=Collate(0), virtual_tokens=3, **options)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_share_of_padding_counts_virtual_tokens(workers: int) -> None:
    extended = [length + 3 for length in LENGTHS]
    loaded = texts(sampler=LengthGroupedSampler(extended, 3, seed=1), num_workers=workers)
    assert loaded.padding_share() == 0
    for _ in range(2):
        batches = [[extended[row] for row in batch["index"].tolist()] for batch in loaded]
        places = sum(len(batch) * max(batch) for batch in batches)
        assert loaded.padding_share() == 1 - sum(extended) / places > 0


def test_another_sampler_makes_batches_of_rows() -> None:
    loaded = texts(sampler=SequentialSampler(range(10)), batch_size=4)
    assert [batch["index"].tolist() for batch in loaded] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert loaded.state_dict() == {"batches": 0}
    loaded.load_state_dict({"batches": 1})
    assert loaded.state_dict() == {"batches": 1}
    assert [batch["index"].tolist() for batch in loaded] == [[4, 5, 6, 7], [8, 9]]


def test_training_batches_of_so_many_tokens_weigh_by_their_examples() -> None:
    batches = list(texts(sampler=LengthGroupedSampler(LENGTHS, batch_tokens=14)))
    sizes = [len(batch["index"]) for batch in batches]
    assert len(set(sizes)) > 1
    assert [float(batch["weight"]) for batch in batches] == pytest.approx(
        [size * len(sizes) / len(LENGTHS) for size in sizes]
    )
    others = [{"batch_size": 3}, {"batch_tokens": 14, "shuffle": False}]
    assert not any(
        "weight" in batch for size in others for batch in texts(sampler=LengthGroupedSampler(LENGTHS, **size))
    )

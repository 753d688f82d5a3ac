from __future__ import annotations

import pytest
import torch

from lopa_lightning.data.loader import ResumableLoader
from lopa_lightning.data.sampler import LengthGroupedSampler

LENGTHS = [3, 9, 1, 8, 2, 7, 7, 4, 5, 6]


def loader(batch_size: int = 2, epoch: int = 1, seed: int = 3, share: int | float = 1.0) -> ResumableLoader:
    sampler = LengthGroupedSampler(LENGTHS, batch_size, True, seed=seed)
    sampler.set_epoch(epoch)
    return ResumableLoader(range(10), batch_size=batch_size, sampler=sampler, share=share)  # type: ignore[arg-type]


def rows(loaded: ResumableLoader) -> list[list[int]]:
    return [batch.tolist() for batch in loaded if isinstance(batch, torch.Tensor)]


@pytest.mark.parametrize("taken", range(5))
def test_it_goes_on_after_the_batches_that_were_handed_out(taken: int) -> None:
    first, again = loader(), loader()
    batches = iter(first)
    before = [next(batches).tolist() for _ in range(taken)]  # type: ignore[attr-defined]
    again.load_state_dict(first.state_dict())
    assert again.state_dict() == first.state_dict()
    assert before + rows(again) == rows(loader())
    assert rows(again) == rows(loader())  # the next epoch is a whole one
    assert len(again) == 5


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
    loader(batch_size=5).load_state_dict({**state, "batches": 0})

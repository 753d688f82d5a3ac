from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lopa_lightning.data.sampler import LengthGroupedSampler

LENGTHS = st.lists(st.integers(1, 100), min_size=1, max_size=150)
BATCH = st.integers(1, 9)
REPLICAS = st.integers(1, 4)


def orders(
    lengths: list[int], batch_size: int, shuffle: bool, replicas: int = 1, epoch: int = 0, seed: int = 0
) -> list[list[int]]:
    """What each process sees, whose sampler must announce just as much."""
    seen = []
    for rank in range(replicas):
        sampler = LengthGroupedSampler(lengths, batch_size, shuffle, replicas, rank, seed)
        sampler.set_epoch(epoch)
        seen.append(list(sampler))
        assert len(sampler) == len(seen[-1])
    return seen


def chunks(values: list[int], size: int) -> list[list[int]]:
    return [values[start : start + size] for start in range(0, len(values), size)]


@settings(deadline=None)
@given(lengths=LENGTHS, batch_size=BATCH, epoch=st.integers(0, 3))
def test_an_epoch_of_one_process_is_a_permutation(lengths: list[int], batch_size: int, epoch: int) -> None:
    (order,) = orders(lengths, batch_size, shuffle=True, epoch=epoch)
    assert sorted(order) == list(range(len(lengths)))


@settings(deadline=None)
@given(lengths=LENGTHS, batch_size=BATCH, replicas=REPLICAS)
def test_processes_train_on_equally_many_and_together_on_all(
    lengths: list[int], batch_size: int, replicas: int
) -> None:
    seen = orders(lengths, batch_size, shuffle=True, replicas=replicas)
    each = -(-len(lengths) // replicas)
    assert [len(order) for order in seen] == [each] * replicas
    assert set().union(*seen) == set(range(len(lengths)))


@settings(deadline=None)
@given(lengths=LENGTHS, batch_size=BATCH, replicas=REPLICAS)
def test_evaluation_sees_each_example_once(lengths: list[int], batch_size: int, replicas: int) -> None:
    seen = orders(lengths, batch_size, shuffle=False, replicas=replicas)
    assert sorted(i for order in seen for i in order) == list(range(len(lengths)))
    sizes = [len(order) for order in seen]
    assert max(sizes) - min(sizes) <= 1


def test_evaluation_does_not_change_with_the_epoch() -> None:
    lengths = [3, 1, 2, 3, 1]
    assert orders(lengths, 2, shuffle=False, epoch=5, seed=9) == orders(lengths, 2, shuffle=False)
    assert sorted(map(sorted, chunks(orders(lengths, 2, shuffle=False)[0], 2))) == [[0, 3], [1, 2], [4]]


def test_the_first_evaluation_batches_stand_for_all() -> None:
    lengths = list(range(400))
    (order,) = orders(lengths, 4, shuffle=False)
    assert 150 < np.mean(order[:80]) < 250
    assert all(max(batch) - min(batch) == 3 for batch in chunks(order, 4))


def test_an_order_follows_from_seed_and_epoch() -> None:
    lengths = np.random.default_rng(0).integers(1, 60, size=300).tolist()

    def order(epoch: int, seed: int) -> tuple[int, ...]:
        return tuple(orders(lengths, 8, shuffle=True, epoch=epoch, seed=seed)[0])

    runs = [(epoch, seed) for epoch in range(3) for seed in range(3)]
    assert [order(*run) for run in runs] == [order(*run) for run in runs]
    assert len({order(*run) for run in runs}) == len(runs)


def test_the_process_wide_random_state_is_neither_read_nor_moved() -> None:
    np.random.seed(1)
    before = np.random.get_state()[1].copy()
    first = orders([5, 4, 3, 2, 1] * 9, 4, shuffle=True)
    assert (np.random.get_state()[1] == before).all()
    np.random.seed(2)
    assert orders([5, 4, 3, 2, 1] * 9, 4, shuffle=True) == first


@settings(deadline=None)
@given(lengths=LENGTHS, batch_size=BATCH, replicas=REPLICAS)
def test_each_step_takes_neighbours_in_length_and_a_short_step_comes_last(
    lengths: list[int], batch_size: int, replicas: int
) -> None:
    assume(len(lengths) >= replicas)
    step = batch_size * replicas
    per_rank = [chunks(order, batch_size) for order in orders(lengths, batch_size, shuffle=True, replicas=replicas)]
    steps = [sorted((lengths[i] for batch in batches for i in batch), reverse=True) for batches in zip(*per_rank)]
    assert [len(taken) for taken in steps[:-1]] == [step] * (len(steps) - 1)
    if len(lengths) % replicas == 0 and len(lengths) <= 50 * step:
        assert sorted(steps) == sorted(chunks(sorted(lengths, reverse=True), step))


def test_batches_come_in_no_order_of_length() -> None:
    lengths = list(range(400))
    (order,) = orders(lengths, 8, shuffle=True)
    longest = np.array([max(batch) for batch in chunks(order, 8)])
    assert abs(np.corrcoef(longest, np.arange(len(longest)))[0, 1]) < 0.3


def test_companions_change_from_epoch_to_epoch() -> None:
    # More examples than one pool holds, or only the order of the batches would change.
    lengths = np.random.default_rng(0).integers(1, 40, size=2000).tolist()

    def batches(epoch: int) -> set[frozenset[int]]:
        return {frozenset(batch) for batch in chunks(orders(lengths, 4, shuffle=True, epoch=epoch)[0], 4)}

    assert len(batches(0) & batches(1)) < 0.05 * len(batches(0))


def padding_share(lengths: np.ndarray, order: list[int], batch_size: int) -> float:
    batches = [lengths[batch] for batch in chunks(order, batch_size)]
    return float(1 - sum(batch.sum() for batch in batches) / sum(batch.max() * len(batch) for batch in batches))


@pytest.mark.parametrize("spread", [2.0, 8.0])
def test_padding_is_a_small_part_of_a_plain_shuffles(spread: float) -> None:
    random = np.random.default_rng(0)
    lengths = (4 + random.gamma(2.0, spread, size=4000)).astype(int)
    plain = padding_share(lengths, random.permutation(4000).tolist(), 16)
    (order,) = orders(lengths.tolist(), 16, shuffle=True)
    assert plain > 0.35
    assert padding_share(lengths, order, 16) < 0.05

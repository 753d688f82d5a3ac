from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from lopa_lightning.data.sampler import LengthGroupedSampler
from lopa_lightning.errors import LoPAError

LENGTHS = st.lists(st.integers(1, 100), min_size=1, max_size=150)
SIZES = st.one_of(
    st.builds(lambda rows: {"batch_size": rows}, st.integers(1, 9)),
    st.builds(lambda tokens: {"batch_tokens": tokens}, st.integers(100, 900)),
)
REPLICAS = st.integers(1, 4)

Batches = list[list[int]]


def samplers(lengths: Any, shuffle: bool = True, replicas: int = 1, **options: Any) -> list[LengthGroupedSampler]:
    return [
        LengthGroupedSampler(lengths, shuffle=shuffle, num_replicas=replicas, rank=r, **options)
        for r in range(replicas)
    ]


def epoch_of(lengths: Any, shuffle: bool = True, replicas: int = 1, epoch: int = 0, **options: Any) -> list[Batches]:
    """What each process sees, whose sampler must announce as many batches."""
    seen = []
    for sampler in samplers(lengths, shuffle, replicas, **options):
        sampler.set_epoch(epoch)
        seen.append(list(sampler))
        assert len(sampler) == len(seen[-1])
    return seen


def rows_of(seen: list[Batches]) -> list[int]:
    return [row for batches in seen for batch in batches for row in batch]


def padding_share(lengths: Any, batches: Batches) -> float:
    """By its definition, one example after the other."""
    places = sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)
    return 1 - sum(int(lengths[row]) for batch in batches for row in batch) / places


def real_lengths(spread: float, count: int = 4000) -> Any:
    return (14 + np.random.default_rng(0).gamma(2.0, spread, size=count)).astype(int)


# Every example


@settings(max_examples=50)
@given(lengths=LENGTHS, size=SIZES, epoch=st.integers(0, 3))
def test_an_epoch_of_one_process_is_a_permutation(lengths: list[int], size: dict[str, int], epoch: int) -> None:
    assert sorted(rows_of(epoch_of(lengths, epoch=epoch, **size))) == list(range(len(lengths)))


@settings(max_examples=50)
@given(lengths=LENGTHS, size=SIZES, replicas=REPLICAS, epoch=st.integers(0, 3))
def test_processes_train_on_equally_many_in_each_step_and_together_on_all(
    lengths: list[int], size: dict[str, int], replicas: int, epoch: int
) -> None:
    seen = epoch_of(lengths, replicas=replicas, epoch=epoch, **size)
    steps = [[len(batch) for batch in batches] for batches in seen]
    assert steps == [steps[0]] * replicas
    assert sum(steps[0]) == -(-len(lengths) // replicas)
    assert set(rows_of(seen)) == set(range(len(lengths)))


@settings(max_examples=50)
@given(lengths=LENGTHS, size=SIZES, replicas=REPLICAS)
def test_evaluation_sees_each_example_once_on_processes_of_as_many_batches(
    lengths: list[int], size: dict[str, int], replicas: int
) -> None:
    assume(len(lengths) >= replicas)
    try:
        seen = epoch_of(lengths, shuffle=False, replicas=replicas, **size)
    except LoPAError:
        shortest = sorted(lengths)[: 2 * replicas]
        assert 2 * max(shortest) > size["batch_tokens"]
        return
    assert sorted(rows_of(seen)) == list(range(len(lengths)))
    assert len({len(batches) for batches in seen}) == 1
    assert all(batch for batches in seen for batch in batches)


# Sizes


@settings(max_examples=50)
@given(lengths=LENGTHS, tokens=st.integers(100, 900), replicas=REPLICAS, shuffle=st.booleans(), epoch=st.integers(0, 2))
def test_a_budget_is_never_exceeded(lengths: list[int], tokens: int, replicas: int, shuffle: bool, epoch: int) -> None:
    assume(len(lengths) >= replicas and 2 * max(lengths) <= tokens)
    seen = epoch_of(lengths, shuffle=shuffle, replicas=replicas, epoch=epoch, batch_tokens=tokens)
    assert all(len(batch) * max(lengths[row] for row in batch) <= tokens for batches in seen for batch in batches)


@settings(max_examples=50)
@given(lengths=LENGTHS, tokens=st.integers(100, 900), replicas=REPLICAS, seed=st.integers(0, 5))
def test_a_budget_makes_as_many_batches_in_every_epoch(
    lengths: list[int], tokens: int, replicas: int, seed: int
) -> None:
    counts = {
        len(batches)
        for epoch in range(8)
        for batches in epoch_of(lengths, replicas=replicas, epoch=epoch, batch_tokens=tokens, seed=seed)
    }
    assert len(counts) == 1


def test_a_budget_is_used() -> None:
    lengths = real_lengths(8.0)
    (batches,) = epoch_of(lengths, batch_tokens=1000)
    sizes = [len(batch) * max(lengths[batch]) for batch in batches]
    assert np.mean(sizes) > 950
    (sampler,) = samplers(lengths, batch_tokens=1000)
    assert sampler.mean_batch_size == np.mean([len(batch) for batch in batches])


@settings(max_examples=50)
@given(lengths=LENGTHS, rows=st.integers(1, 9), replicas=REPLICAS)
def test_all_batches_but_one_are_of_the_size_asked_for(lengths: list[int], rows: int, replicas: int) -> None:
    for batches in epoch_of(lengths, replicas=replicas, batch_size=rows):
        sizes = sorted((len(batch) for batch in batches), reverse=True)
        assert sizes[:-1] == [rows] * (len(sizes) - 1)
        assert sizes[-1] <= rows


def test_an_example_that_is_larger_than_the_budget_is_an_error() -> None:
    with pytest.raises(LoPAError, match="batch_tokens is 8, and one of the examples has 9 tokens, virtual ones inclu"):
        LengthGroupedSampler([3, 9, 2], batch_tokens=8)


def test_evaluation_on_two_processes_with_room_for_one_example_each_is_an_error() -> None:
    with pytest.raises(LoPAError, match="no room for two of the shortest examples, so that 3 cannot be dealt out to 2"):
        LengthGroupedSampler([9, 9, 9], shuffle=False, num_replicas=2, batch_tokens=10)
    assert epoch_of([9, 9, 9], shuffle=False, replicas=2, batch_size=1) == [[[2, 1]], [[0]]]


# Order


def test_evaluation_does_not_change_with_the_epoch() -> None:
    lengths = [9, 7, 8, 9, 7]
    first = epoch_of(lengths, shuffle=False, batch_size=2)
    assert epoch_of(lengths, shuffle=False, epoch=5, seed=9, batch_size=2) == first
    assert sorted(first[0]) == [[1], [2, 4], [3, 0]]


def test_the_first_evaluation_batches_stand_for_all() -> None:
    lengths = list(range(100, 500))
    (batches,) = epoch_of(lengths, shuffle=False, batch_size=4)
    assert 150 < np.mean(batches[:20]) < 250
    assert all(max(batch) - min(batch) == 3 for batch in batches)


def test_evaluation_batches_mix_classes_of_data_sorted_by_class() -> None:
    classes = np.repeat(np.arange(10), 40)  # as a folder of images for each class gives them
    (batches,) = epoch_of([1] * 400, shuffle=False, batch_size=20)
    assert [len(batch) for batch in batches] == [20] * 20
    assert min(len(set(classes[batch])) for batch in batches) >= 7
    neighbours = [classes[one] == classes[other] for batch in batches for one, other in itertools.pairwise(batch)]
    assert np.mean(neighbours) < 0.15


def test_an_evaluation_batch_ends_where_there_would_be_much_padding() -> None:
    assert sorted(epoch_of([1000, 480, 940, 500, 490], shuffle=False, batch_size=9)[0]) == [[0, 2], [3, 4, 1]]
    assert sorted(epoch_of([1000, 480, 940, 500, 490], shuffle=False, batch_size=2)[0]) == [[0, 2], [1], [3, 4]]
    assert epoch_of([100, 50, 30], shuffle=False, batch_size=9) == [[[0, 1, 2]]]  # less than 128 places


@pytest.mark.parametrize("size", [{"batch_size": 8}, {"batch_tokens": 400}])
def test_an_order_follows_from_seed_and_epoch(size: dict[str, int]) -> None:
    lengths = np.random.default_rng(0).integers(1, 60, size=300).tolist()

    def order(epoch: int, seed: int) -> str:
        return str(epoch_of(lengths, epoch=epoch, seed=seed, **size))

    runs = [(epoch, seed) for epoch in range(3) for seed in range(3)]
    assert [order(*run) for run in runs] == [order(*run) for run in runs]
    assert len({order(*run) for run in runs}) == len(runs)


def test_the_process_wide_random_state_is_neither_read_nor_moved() -> None:
    np.random.seed(1)
    before = np.random.get_state()[1].copy()
    first = epoch_of([5, 4, 3, 2, 1] * 9, batch_size=4)
    assert (np.random.get_state()[1] == before).all()
    np.random.seed(2)
    assert epoch_of([5, 4, 3, 2, 1] * 9, batch_size=4) == first


@settings(max_examples=50)
@given(lengths=LENGTHS, size=SIZES, replicas=REPLICAS, start=st.integers(0, 200), epoch=st.integers(0, 2))
def test_what_is_passed_over_is_what_an_uninterrupted_epoch_had_first(
    lengths: list[int], size: dict[str, int], replicas: int, start: int, epoch: int
) -> None:
    whole = epoch_of(lengths, replicas=replicas, epoch=epoch, **size)
    for sampler, batches in zip(samplers(lengths, replicas=replicas, **size), whole):
        sampler.set_epoch(epoch)
        sampler.start_at = start
        assert list(sampler) == batches[start:]
        assert list(sampler) == batches  # the next epoch is a whole one


@pytest.mark.parametrize("size", [{"batch_size": 8}, {"batch_tokens": 1600}])
def test_batches_come_in_no_order_of_length(size: dict[str, int]) -> None:
    lengths = list(range(400))
    (batches,) = epoch_of(lengths, **size)
    longest = np.array([max(batch) for batch in batches])
    assert abs(np.corrcoef(longest, np.arange(len(longest)))[0, 1]) < 0.3


# Companions and padding


@settings(max_examples=50)
@given(lengths=LENGTHS, size=SIZES, replicas=REPLICAS)
@example(lengths=[1, 1, 1, 1, 1, 1, 33, 33, 34], size={"batch_tokens": 100}, replicas=1)  # 33 may seem more than 34
def test_a_step_takes_neighbours_in_length(lengths: list[int], size: dict[str, int], replicas: int) -> None:
    seen = epoch_of(lengths, replicas=replicas, **size)
    steps = [[lengths[row] for batch in taken for row in batch] for taken in zip(*seen)]
    for one, other in itertools.combinations(steps, 2):
        assert max(one) <= 1.04 * min(other) or max(other) <= 1.04 * min(one)


@pytest.mark.parametrize("size", [{"batch_size": 4}, {"batch_tokens": 160}])
def test_companions_change_from_epoch_to_epoch(size: dict[str, int]) -> None:
    lengths = np.random.default_rng(0).integers(20, 60, size=2000).tolist()

    def pairs(epoch: int) -> set[tuple[int, int]]:
        (batches,) = epoch_of(lengths, epoch=epoch, **size)
        return {(one, two) for batch in batches for one in batch for two in batch if one < two}

    # Of about 80 of like length, three come along.
    assert len(pairs(0) & pairs(1)) < 0.06 * len(pairs(0))


@pytest.mark.parametrize("spread", [2.0, 8.0])
def test_padding_is_a_small_part_of_a_plain_shuffles(spread: float) -> None:
    lengths = real_lengths(spread)
    order = np.random.default_rng(0).permutation(4000)
    plain = padding_share(lengths, [order[start : start + 16].tolist() for start in range(0, 4000, 16)])
    assert plain > 0.2
    assert padding_share(lengths, epoch_of(lengths, batch_size=16)[0]) < 0.02
    assert padding_share(lengths, epoch_of(lengths, batch_tokens=16 * int(lengths.mean()))[0]) < 0.02

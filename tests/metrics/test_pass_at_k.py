from __future__ import annotations

import itertools
import math
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lopa_lightning.errors import LoPAError
from lopa_lightning.metrics.pass_at_k import PassAtK, pass_at_k

SAMPLES = st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=1, max_size=40)


def by_enumeration(passed: list[bool], k: int) -> float:
    """Share of all choices of k samples that have one that passes."""
    choices = list(itertools.combinations(passed, k))
    return sum(any(choice) for choice in choices) / len(choices)


def computed(metric: PassAtK) -> dict[str, float]:
    return {name: float(value) for name, value in metric.compute().items()}


@given(st.lists(st.booleans(), min_size=1, max_size=9), st.data())
def test_the_estimate_is_the_share_of_the_choices(passed: list[bool], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(passed)))
    assert pass_at_k(len(passed), sum(passed), k) == pytest.approx(by_enumeration(passed, k), abs=1e-12)


def test_the_estimate_is_unbiased() -> None:
    # Over all outcomes of n samples that pass with chance p each, its mean is the chance that one of k passes.
    n, p = 7, 0.3
    for k in range(1, n + 1):
        mean = sum(math.comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at_k(n, c, k) for c in range(n + 1))
        assert mean == pytest.approx(1 - (1 - p) ** k, abs=1e-12)


def test_many_samples_are_no_problem() -> None:
    assert pass_at_k(100_000, 1, 1) == pytest.approx(1e-5)
    assert pass_at_k(2000, 1000, 1000) == pytest.approx(1)


@pytest.mark.parametrize(("n", "c", "k"), [(5, 6, 1), (5, -1, 1), (5, 1, 0), (5, 1, 6)])
def test_impossible_numbers_are_refused(n: int, c: int, k: int) -> None:
    with pytest.raises(LoPAError, match=f"got k={k}, samples={n}, correct={c}"):
        pass_at_k(n, c, k)


@settings(max_examples=50)
@given(SAMPLES, st.integers(1, 4))
def test_the_metric_is_the_mean_over_problems(samples: list[tuple[int, bool]], parts: int) -> None:
    outcomes: dict[int, list[bool]] = {}
    for problem, passed in samples:
        outcomes.setdefault(problem, []).append(passed)
    most = min(len(passed) for passed in outcomes.values())
    metric = PassAtK(k=list(range(1, min(most, 3) + 1)))
    problems, right = torch.tensor([p for p, _ in samples]), torch.tensor([r for _, r in samples])
    for some_problems, some_right in zip(problems.chunk(parts), right.chunk(parts)):
        metric.update(some_problems, some_right)
    read = computed(metric)
    for k in metric.k:
        expected = np.mean([by_enumeration(passed, k) for passed in outcomes.values()])
        assert read[f"pass@{k}"] == pytest.approx(expected, abs=1e-6)
        assert 0 <= read[f"pass@{k}_low"] <= read[f"pass@{k}"] <= read[f"pass@{k}_high"] <= 1


def by_the_harness(samples: list[bool | None], k: int) -> float:
    """CRUXEval's ``evaluate_score``: what is skipped (None) is no result, unless nothing passes."""
    results = [passed for passed in samples if passed is not None]
    if True not in results:
        results = [False] * len(samples)
    if len(results) - results.count(True) < k:
        return 1.0
    return by_enumeration(results, k)


@settings(max_examples=50)
@given(st.lists(st.lists(st.sampled_from([True, False, None]), min_size=3, max_size=6), min_size=1, max_size=4))
def test_skipped_samples_count_as_in_cruxevals_harness(outcomes: list[list[bool | None]]) -> None:
    metric = PassAtK(k=[1, 2, 3])
    for problem, samples in enumerate(outcomes):
        passed, skipped = ([sample is value for sample in samples] for value in (True, None))
        metric.update(torch.full((len(samples),), problem), torch.tensor(passed), torch.tensor(skipped))
    read = computed(metric)
    for k in metric.k:
        expected = np.mean([by_the_harness(samples, k) for samples in outcomes])
        assert read[f"pass@{k}"] == pytest.approx(expected, abs=1e-6)
        assert 0 <= read[f"pass@{k}_low"] <= read[f"pass@{k}"] <= read[f"pass@{k}_high"] <= 1


@pytest.mark.parametrize(("n", "right"), [(1, 0), (10, 0), (10, 3), (400, 399), (50, 50)])
def test_with_one_sample_each_the_interval_is_wilsons(n: int, right: int) -> None:
    metric = PassAtK()
    metric.update(torch.arange(n), torch.arange(n) < right)
    read = computed(metric)
    # Wilson's ends are where the observed share lies 1.96 standard errors of theirs away.
    p, z = right / n, 1.959963985
    roots = np.roots([1 + z * z / n, -2 * p - z * z / n, p * p])
    assert read["pass@1_low"] == pytest.approx(max(roots.min(), 0), abs=1e-5)
    assert read["pass@1_high"] == pytest.approx(min(roots.max(), 1), abs=1e-5)


@pytest.mark.parametrize(("solvable", "samples"), [((0.3, 1.5), 8), ((2.0, 2.0), 8), ((0.1, 2.0), 4)])
def test_the_interval_holds_the_truth_as_often_as_it_says(solvable: tuple[float, float], samples: int) -> None:
    generator, hits, runs, problems = np.random.default_rng(0), 0, 300, 60
    truth = solvable[0] / sum(solvable)
    for _ in range(runs):
        chances = generator.beta(*solvable, size=problems)
        right = generator.random((problems, samples)) < chances[:, None]
        metric = PassAtK()
        metric.update(torch.arange(problems).repeat_interleave(samples), torch.from_numpy(right.ravel()))
        read = computed(metric)
        hits += read["pass@1_low"] <= truth <= read["pass@1_high"]
    assert 0.92 <= hits / runs <= 0.98


def test_too_few_samples_for_a_k_are_an_error() -> None:
    metric = PassAtK(k=[2])
    metric.update(torch.tensor([1, 1, 2]), torch.tensor([True, True, True]))
    with pytest.raises(LoPAError, match="got k=2, samples=1"):
        metric.compute()


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_without_samples_there_is_no_number() -> None:
    assert all(math.isnan(value) for value in computed(PassAtK()).values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": []}, "k must be numbers from 1 on, got []"),
        ({"k": [0, 1]}, "k must be numbers from 1 on, got [0, 1]"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(LoPAError) as error:
        PassAtK(**arguments)
    assert str(error.value) == message


def on_one_of_two(rank: int, folder: Path, parts: list[list[tuple[int, bool]]]) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    metric = PassAtK(k=[1, 2])
    for problem, passed in parts[rank]:
        metric.update(torch.tensor([problem]), torch.tensor([passed]))
    torch.save(computed(metric), folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("split", [4, 0], ids=["samples of a problem apart", "a process without samples"])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_two_processes_compute_what_one_does(tmp_path: Path, split: int) -> None:
    samples = [(3, True), (5, False), (9, False), (3, False), (5, False), (9, True), (3, True), (9, True), (9, True)]
    alone = PassAtK(k=[1, 2])
    alone.update(torch.tensor([p for p, _ in samples]), torch.tensor([r for _, r in samples]))
    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=on_one_of_two, args=(rank, tmp_path, [samples[:split], samples[split:]]))
        for rank in (0, 1)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    for rank in (0, 1):
        assert torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) == computed(alone)

"""Batches and their order: texts of like length together, so that there is little padding."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DistributedSampler

from lopa_lightning.errors import LoPAError

Rows = NDArray[np.int64]


class LengthGroupedSampler(DistributedSampler[list[int]]):
    """Yields batches, lists of examples of like length: so many examples each, or so many tokens.

    In training, examples are sorted by their lengths, each lengthened at random by up to 4 %, cut into steps, and
    the steps shuffled: companions change from epoch to epoch among all examples of that length. Order depends
    on ``seed`` and epoch alone, so a resumed run sees what an uninterrupted one would have seen, and every
    epoch has as many batches, also under a budget of tokens. Each step is dealt out to the processes, which
    so have as many batches, and in training as many examples in each; for that a few examples come twice. It is a
    ``DistributedSampler`` for Lightning to leave it alone and to call ``set_epoch``.

    Args:
        lengths: Tokens of each example, virtual ones included.
        batch_size: Examples of a batch of one process, unless ``batch_tokens`` is given.
        shuffle: False to go through the examples once, each on exactly one process, always in the same order:
            batches not by length, and a batch's examples not as the data has them, which may be sorted by class. So
            the first few batches stand for all. A batch is then also cut where there would be much padding, and has
            one example more where a process would have none otherwise.
        num_replicas: Number of processes.
        rank: This process.
        seed: Of the shuffling.
        batch_tokens: Most tokens of a batch of one process, padding included.
        with_epoch: Whether a batch is ``(epoch, examples)``: for views that are others in each epoch, also where a
            worker process makes them, which knows no epoch.

    Raises:
        LoPAError: If one example has more than ``batch_tokens``, or the processes cannot have as many batches.

    Example:
        >>> list(LengthGroupedSampler([7, 9, 6, 8, 6], batch_size=2, shuffle=False))
        [[4], [1, 3], [0, 2]]
        >>> list(LengthGroupedSampler([7, 9, 6, 8, 6], shuffle=False, batch_tokens=16))
        [[2, 4], [1], [3, 0]]
    """

    _NOISE = 0.04
    _PADDING, _LITTLE = 0.05, 128
    """Share of padding that an evaluation batch may have, and the tokens that are cheaper than one more batch."""

    def __init__(
        self,
        lengths: NDArray[np.int64] | list[int],
        batch_size: int = 1,
        shuffle: bool = True,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
        batch_tokens: int | None = None,
        with_epoch: bool = False,
    ) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int64)
        super().__init__(self.lengths, num_replicas, rank, shuffle, seed)  # type: ignore[arg-type]
        self.batch_size = batch_size
        self.batch_tokens = batch_tokens
        self.with_epoch = with_epoch
        if batch_tokens is not None and self.lengths.max() > batch_tokens:
            raise LoPAError(
                f"batch_tokens is {batch_tokens}, and one of the examples has {self.lengths.max()} tokens, virtual "
                "ones included; raise batch_tokens, or cut texts with max_length"
            )
        self.start_at = 0
        """Number of this process's batches that the next iteration passes over."""
        # Twice are the same ones in every epoch, or a budget might not always be kept by as many batches.
        twice = np.random.default_rng(seed).permutation(len(self.lengths))
        self._rows = np.append(np.arange(len(self.lengths)), np.resize(twice, self.total_size - len(self.lengths)))
        self._evaluated = None if shuffle else self._evaluation_steps()
        self._count = self._number_of_steps()

    def __len__(self) -> int:
        """Returns the number of this process's batches in an epoch."""
        return self._count

    def __iter__(self) -> Iterator[list[int] | tuple[int, list[int]]]:  # type: ignore[override]
        """Yields this process's batches."""
        if self._evaluated is not None:
            random, steps = np.random.default_rng(0), self._evaluated
        else:
            random = np.random.default_rng([self.seed, self.epoch])
            steps = self._training_steps(random)
        order = [i for i in random.permutation(len(steps)).tolist() if len(steps[i]) > self.rank]
        # Reached at the first batch: a loader with workers makes two iterators, and uses the second.
        start, self.start_at = self.start_at, 0
        for i in order[start:]:
            rows = steps[i][self.rank :: self.num_replicas].tolist()
            yield (self.epoch, rows) if self.with_epoch else rows

    @property
    def mean_batch_size(self) -> float:
        """Number of examples of a training batch on average."""
        return self.num_samples / self._count

    def _number_of_steps(self) -> int:
        if self._evaluated is not None:
            return sum(len(step) > self.rank for step in self._evaluated)
        if self.batch_tokens is None:
            return -(-self.num_samples // self.batch_size)
        random = np.random.default_rng([self.seed])
        return len(self._cut(self._sorted(self._rows, random, self._NOISE)))

    def _training_steps(self, random: np.random.Generator) -> list[Rows]:
        if self.batch_tokens is None:
            step = self.batch_size * self.num_replicas
            full, rest = divmod(self.total_size, step)
            sizes = [step] * full
            if rest:  # anywhere, or the shortest texts would always be the ones with few companions
                sizes.insert(int(random.integers(full + 1)), rest)
            return np.split(self._sorted(self._rows, random, self._NOISE), np.cumsum(sizes)[:-1])
        noise = self._NOISE
        while len(steps := self._cut(self._sorted(self._rows, random, noise))) > self._count:
            noise = noise / 2 if noise > self._NOISE / 4 else 0.0  # sorted exactly, there are never more
        sizes = [len(step) for step in steps]
        while len(steps) < self._count:
            largest = int(np.argmax(sizes))
            half = sizes[largest] // self.num_replicas // 2 * self.num_replicas
            steps[largest : largest + 1] = [steps[largest][:half], steps[largest][half:]]
            sizes[largest : largest + 1] = [half, sizes[largest] - half]
        return steps

    def _sorted(self, rows: Rows, random: np.random.Generator, noise: float) -> Rows:
        """Sorts the longest first; those of the same length in any order."""
        rows = rows[random.permutation(len(rows))]
        seeming = self.lengths[rows] * (1 + noise * random.random(len(rows)))
        order: Rows = rows[np.argsort(-seeming, kind="stable")]
        return order

    def _cut(self, order: Rows) -> list[Rows]:
        """Cuts sorted examples into steps, as large as they may be."""
        world, lengths, steps, start = self.num_replicas, self.lengths[order], [], 0
        while start < len(order):
            most = self.batch_size if self.batch_tokens is None else self.batch_tokens // max(1, lengths[start])
            part = lengths[start : start + max(1, most) * world]
            ends = np.append(np.arange(world, len(part), world), len(part))  # each process with one example more
            padded = np.maximum.accumulate(part)[ends - 1] * np.arange(1, len(ends) + 1)
            fits = padded <= (padded if self.batch_tokens is None else self.batch_tokens)
            if not self.shuffle:
                padding = padded - np.cumsum(part)[ends - 1] / world
                fits &= padding <= np.maximum(self._PADDING * padded, self._LITTLE)
            size = world * max(1, int(np.argmin(np.append(fits, False))))
            steps.append(order[start : start + size])
            start += size
        return steps

    def _evaluation_steps(self) -> list[Rows]:
        world = self.num_replicas
        steps = self._cut(self._sorted(np.arange(len(self.lengths)), np.random.default_rng(0), 0.0))
        wanted = world - len(steps[-1])
        if wanted <= 0 or len(steps) == 1:
            return steps
        # Processes that wait for each other in every forward pass must have as many batches.
        both = np.concatenate(steps[-2:])
        if len(both) >= 2 * world:
            return [*steps[:-2], both[:-world], both[-world:]]
        if self.batch_tokens is not None and 2 * self.lengths[both].max() > self.batch_tokens:
            raise LoPAError(
                f"batch_tokens is {self.batch_tokens}, which has no room for two of the shortest examples, so that "
                f"{len(self.lengths)} cannot be dealt out to {world} processes; raise it"
            )
        return [*steps[:-2], both]

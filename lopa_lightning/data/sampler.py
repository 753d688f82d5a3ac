"""The order of examples: texts of like length together, so that batches need little padding."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DistributedSampler


class LengthGroupedSampler(DistributedSampler[int]):
    """Yields examples so that each batch of consecutive ones has like lengths.

    In training, examples are shuffled, cut into pools of 50 batches, sorted by length within a pool,
    and the batches shuffled again. Order depends on ``seed`` and epoch alone, so a resumed run sees
    what an uninterrupted one would have seen. It is a ``DistributedSampler`` for Lightning to leave
    it alone and to call ``set_epoch``.

    Args:
        lengths: Tokens of each example.
        batch_size: Of one process.
        shuffle: False to go through the examples once, each on exactly one process, always in the same
            order of batches: not by length, so that the first few batches stand for all.
        num_replicas: Number of processes.
        rank: This process.
        seed: Of the shuffling.

    Example:
        >>> list(LengthGroupedSampler([3, 9, 1, 8, 2], batch_size=2, shuffle=False))
        [1, 3, 0, 4, 2]
    """

    _POOL = 50

    def __init__(
        self,
        lengths: NDArray[np.int64] | list[int],
        batch_size: int,
        shuffle: bool,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
    ) -> None:
        self.lengths = np.asarray(lengths)
        super().__init__(self.lengths, num_replicas, rank, shuffle, seed)  # type: ignore[arg-type]
        self.batch_size = batch_size
        self.start_at = 0
        """How many of this process's examples the next iteration passes over."""
        if not shuffle:
            self.num_samples = len(range(rank, len(self.lengths), num_replicas))

    def __iter__(self) -> Iterator[int]:
        """Yields this process's examples."""
        step = self.batch_size * self.num_replicas
        if self.shuffle:
            random = np.random.default_rng([self.seed, self.epoch])
            order = random.permutation(len(self.lengths))
            order, pool = np.resize(order, self.total_size), self._POOL * step  # every process has as many
        else:
            random = np.random.default_rng(0)
            order, pool = np.arange(len(self.lengths)), len(self.lengths)
        batches = [
            batch
            for part in _cut(order, pool)
            for batch in _cut(part[np.argsort(-self.lengths[part], kind="stable")], step)
        ]
        # The one batch that may be short must come last, or processes would cut batches in other places.
        full = [batch for batch in batches if len(batch) == step]
        short = [batch for batch in batches if len(batch) < step]
        chosen = [full[i] for i in random.permutation(len(full))] + short
        mine = np.concatenate([batch[self.rank :: self.num_replicas] for batch in chosen])
        start, self.start_at = self.start_at, 0
        return iter(mine[start:].tolist())


def _cut(values: NDArray[np.int64], step: int) -> list[NDArray[np.int64]]:
    return [values[start : start + step] for start in range(0, len(values), step)]

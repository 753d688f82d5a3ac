"""A loader that knows how far it has come, so that a run can go on within an epoch."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from lopa_lightning.data.collate import Rows
from lopa_lightning.data.sampler import LengthGroupedSampler


class ResumableLoader(DataLoader[dict[str, Any]]):
    """Loads batches of a :class:`~lopa_lightning.data.sampler.LengthGroupedSampler`, and can go on within an epoch.

    The order of an epoch depends on seed and epoch alone, so the number of batches handed out says all.
    Lightning asks for the state when it saves and hands it back before the first batch. Where training batches have
    so many tokens, each has ``weight``, its examples by those of a batch on average.

    Args:
        dataset: Gives the rows of a list of indices, all at once.
        sampler: Yields batches. Another sampler, of single rows, makes batches of ``batch_size``: Lightning
            puts one in place of ours for ``overfit_batches``.
        batch_size: Rows of a batch with another sampler.
        share: How much of an epoch is used, as a Trainer's ``limit_train_batches``: a number of batches, or a share.
        virtual_tokens: Number m of virtual tokens that the backbone reads with each row.
        **kwargs: See torch.

    Example:
        >>> import numpy as np
        >>> def loader():
        ...     return ResumableLoader(np.arange(6), LengthGroupedSampler([1] * 6, 2))
        >>> first = loader()
        >>> batches = [next(each) for each in [iter(first)] for _ in range(2)]
        >>> again = loader()
        >>> again.load_state_dict(first.state_dict())
        >>> [*batches, *again][-1].tolist() == [*loader()][-1].tolist()
        True
    """

    def __init__(
        self,
        dataset: Any,
        sampler: Iterable[Any],
        batch_size: int = 1,
        share: int | float = 1.0,
        virtual_tokens: int = 0,
        **kwargs: Any,
    ) -> None:
        ours = isinstance(sampler, LengthGroupedSampler)
        super().__init__(dataset, sampler=sampler, batch_size=None if ours else batch_size, **kwargs)
        self._used = min(len(self), share) if isinstance(share, int) else int(len(self) * share)
        self._virtual_tokens = virtual_tokens
        self._passed_over = self._handed_out = self._tokens = self._positions = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        """Yields the batches of an epoch, at first from the state that was loaded."""
        start = self._handed_out = self._passed_over
        self._passed_over = self._tokens = self._positions = 0
        mean = None
        if isinstance(sampler := self.sampler, LengthGroupedSampler):
            sampler.start_at, start = start, 0
            if sampler.shuffle and sampler.batch_tokens is not None:  # batches differ in size
                mean = sampler.mean_batch_size
        for batch in itertools.islice(super().__iter__(), start, None):
            self._handed_out += 1
            if isinstance(batch, dict) and "attention_mask" in batch:
                self._count_tokens(batch["attention_mask"])
                if mean is not None:
                    batch["weight"] = torch.tensor(len(batch["index"]) / mean)
            yield batch

    def _count_tokens(self, mask: Tensor) -> None:
        """Counts tokens while the batch is still in the host's memory: nothing waits for a device."""
        virtual = len(mask) * self._virtual_tokens
        self._tokens += int(mask.sum()) + virtual
        self._positions += mask.numel() + virtual

    def padding_share(self) -> float:
        """Returns the share of padding in the last epoch's batches, of all that the backbone reads."""
        return 1 - self._tokens / self._positions if self._positions else 0.0

    def state_dict(self) -> dict[str, int | None]:
        """Returns the number of batches handed out of the epoch, and what decides which these are."""
        sampler = self.sampler
        batches = self._handed_out % max(1, self._used)  # after the last one comes another epoch's first
        if not isinstance(sampler, LengthGroupedSampler):
            return {"batches": batches}
        return {
            "batches": batches,
            "batch_size": sampler.batch_size if sampler.batch_tokens is None else None,
            "batch_tokens": sampler.batch_tokens,
            "processes": sampler.num_replicas,
            "seed": sampler.seed,
            "examples": len(sampler.lengths),
            "tokens": int(sampler.lengths.sum()),
            "checksum": self.dataset.checksum if isinstance(self.dataset, Rows) else None,
        }

    def load_state_dict(self, state_dict: dict[str, int | None]) -> None:
        """Goes on from a state, in the next iteration."""
        mine = self.state_dict()
        batches = state_dict["batches"] or 0
        checksum = mine.pop("checksum", None)
        deciding = [name for name in mine if name != "batches" and state_dict.get(name) != mine[name]]
        changed = [f"{name} {state_dict.get(name)}, now {mine[name]}" for name in deciding]
        if changed and batches:
            rank_zero_warn(
                f"the checkpoint was saved within an epoch, and its batches were others ({'; '.join(changed)}): the "
                "rest of that epoch is drawn again, some examples come twice and some not"
            )
        elif state_dict.get("checksum", checksum) != checksum:
            rank_zero_warn("the training data has changed since the checkpoint was saved: other texts or labels")
        self._handed_out = self._passed_over = min(batches, self._used)

"""A loader that knows how far it has come, so that a run can go on within an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader

from lopa_lightning.data.sampler import LengthGroupedSampler


class ResumableLoader(DataLoader[dict[str, Any]]):
    """A ``DataLoader`` over a :class:`~lopa_lightning.data.sampler.LengthGroupedSampler`, with a place to go on from.

    The order of an epoch depends on seed and epoch alone, so the number of batches handed out says all.
    Lightning asks for the state when it saves and hands it back before the first batch.

    Args:
        *args: See torch.
        share: How much of an epoch is used, as a Trainer's ``limit_train_batches``: a number of batches, or a share.
        **kwargs: See torch.

    Example:
        >>> def loader():
        ...     return ResumableLoader(range(6), batch_size=2, sampler=LengthGroupedSampler([1] * 6, 2, True))
        >>> first = loader()
        >>> batches = [next(each) for each in [iter(first)] for _ in range(2)]
        >>> again = loader()
        >>> again.load_state_dict(first.state_dict())
        >>> [*batches, *again][-1].tolist() == [*loader()][-1].tolist()
        True
    """

    def __init__(self, *args: Any, share: int | float = 1.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._used = min(len(self), share) if isinstance(share, int) else int(len(self) * share)
        self._passed_over = 0
        self._handed_out = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        """Yields the batches of an epoch, at first from the place of the state that was loaded."""
        if isinstance(self.sampler, LengthGroupedSampler):  # Lightning may put another in its place (overfit_batches)
            self.sampler.start_at = self._passed_over * self.sampler.batch_size
        self._handed_out, self._passed_over = self._passed_over, 0
        for batch in super().__iter__():
            self._handed_out += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """How many batches of the epoch were handed out, and what decides which these are."""
        sampler = self.sampler
        if not isinstance(sampler, LengthGroupedSampler):
            return {"batches": 0}
        return {
            "batches": self._handed_out % max(1, self._used),  # after the last one comes another epoch's first
            "batch_size": sampler.batch_size,
            "processes": sampler.num_replicas,
            "seed": sampler.seed,
            "examples": len(sampler.lengths),
        }

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Goes on from a place, in the next iteration."""
        mine = self.state_dict()
        deciding = [name for name in mine if name != "batches" and state_dict.get(name) != mine[name]]
        changed = [f"{name} {state_dict.get(name)}, now {mine[name]}" for name in deciding]
        if changed and state_dict["batches"]:
            rank_zero_warn(
                f"the checkpoint was saved within an epoch, and its batches were others ({'; '.join(changed)}): the "
                "rest of that epoch is drawn anew, some examples come twice and some not"
            )
        self._handed_out = self._passed_over = min(state_dict["batches"], self._used)

"""Says what to change where training goes badly, from the tensors that show it."""

from __future__ import annotations

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

_FLAT = 0.01  # a gate this near to 0 or 1 has a slope of at most 0.01, where its greatest is 0.25
_MOST = 0.5  # of a gate's entries that may be so
# Between the norms of virtual tokens and embeddings. After 40 steps of SmolLM2 on SST-2 it is 1.3 at the shipped rates;
# at 30 times that of Z_S it is 21 and growing, and nothing is learned.
_FARTHEST = 30.0
_FIRST_STEP = 10  # initial values and the warm-up may have gradients of 0 by design


def of_gate(gate: Tensor) -> str | None:
    """Returns advice if most of a gate is saturated.

    Args:
        gate: Values between 0 and 1, of any shape.

    Example:
        >>> import torch
        >>> of_gate(torch.tensor([0.001, 0.5])), of_gate(torch.tensor([0.001, 0.999, 0.5]))[:41]
        (None, '67% of the gate is within 0.01 of 0 or 1,')
    """
    share = float(((gate < _FLAT) | (gate > 1 - _FLAT)).float().mean())
    if share <= _MOST:
        return None
    return (
        f"{share:.0%} of the gate is within {_FLAT} of 0 or 1, where it hardly learns: lower the learning rate of "
        "low_rank (learning_rates)"
    )


def of_norms(prompt: Tensor, embeddings: Tensor) -> str | None:
    """Returns advice if virtual tokens are far longer or shorter than the backbone's embeddings.

    Args:
        prompt: Soft prompts ``[B, m, d]``.
        embeddings: Of ordinary tokens, ``[n, d]``.
    """
    ratio = float(prompt.float().norm(dim=-1).mean() / embeddings.float().norm(dim=-1).median())
    if 1 / _FARTHEST <= ratio <= _FARTHEST:
        return None
    how = "lower its learning rate (learning_rates: shared_prompt)" if ratio > 1 else "raise its learning rate"
    return (
        f"the soft prompt's virtual tokens have {ratio:.3g} times the norm of the backbone's embeddings: {how}, or "
        "choose other initial values (init: vocabulary)"
    )


class Advice:
    """Warns of each thing once."""

    def __init__(self) -> None:
        self._given: set[str] = set()
        self._zeros: dict[str, int] = {}

    def give(self, about: str, text: str | None) -> None:
        """Warns, unless there is no text or there was a warning about the same before."""
        if text is not None and about not in self._given:
            self._given.add(about)
            rank_zero_warn(text)

    def look_at_gradient(self, group: str, norm: Tensor, step: int) -> None:
        """Warns of a group whose gradient is 0 twice in a row, once a run is on its way.

        Args:
            group: Of parameters.
            norm: Of its gradient.
            step: Optimizer steps before this one.
        """
        if step < _FIRST_STEP or f"gradient of {group}" in self._given:
            return
        self._zeros[group] = self._zeros.get(group, 0) + 1 if float(norm) == 0 else 0
        if self._zeros[group] > 1:
            self.give(
                f"gradient of {group}",
                f"the gradient of {group} is 0 after {step} steps, so nothing of it is learned: look for a saturated "
                "gate, a dropout of 1, initial values of 0, or numbers too small for the precision",
            )

"""The seam between the step loop and a decoding rule: which candidate rows become decided in a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class TransferState:
    """What a rule may look at: the masked rows of one sequence's block, left to right, n of them, n >= 1."""

    quota: int
    """Rows that the schedule of `--steps` would commit now."""
    ranking: NDArray[np.float64]  # [n] what `--remasking` ranks by, larger first
    confidence: NDArray[np.float64]  # [n] probability of the proposed token
    entropy: NDArray[np.float64]  # [n] of the row's distribution, in nats
    rows: NDArray[np.int64]  # [n] their places in the response


class Transfer(Protocol):
    """A decoding rule: pure, and the same for every policy and provider."""

    name: ClassVar[str]
    keeps_schedule: ClassVar[bool]
    """Whether a block takes the steps of its schedule; else it ends as soon as nothing is masked."""

    def choose(self, state: TransferState) -> NDArray[np.int64]:
        """Indices into the candidates, at least one unless the schedule says none, each at most once."""
        ...


def best_first(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """Indices by falling value; ties go to the leftmost row."""
    return np.argsort(-values, kind="stable")

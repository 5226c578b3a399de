"""Entropy bound (EB-Sampler, arXiv 2505.24857): rows together as long as their uncertainty stays below a bound."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dllm_export.errors import UsageError
from dllm_export.runtime.options import option
from dllm_export.runtime.transfers.transfer import Choice, Transfer, TransferState, best_first


@dataclass(frozen=True, slots=True, kw_only=True)
class EntropyBound(Transfer):
    """Commit the longest prefix U of the ranked rows with sum of H over U - max of H over U <= gamma."""

    gamma: float = option(0.1, "bound on the summed entropy of rows committed together, in nats, the largest left out")
    name: ClassVar[str] = "entropy-bound"
    ranks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.gamma >= 0.0:
            raise UsageError(f"--gamma is {self.gamma}, expected 0 or more")

    def choose(self, state: TransferState) -> Choice:
        order = best_first(state.ranking)
        entropy = np.maximum(state.entropy[order], 0.0)  # rounding can leave a certain row a little below 0
        excess = np.cumsum(entropy) - np.maximum.accumulate(entropy)
        # Each row adds the smaller of itself and the largest before it, so that the excess never falls.
        return Choice(order[: max(1, int(np.count_nonzero(excess <= self.gamma)))])

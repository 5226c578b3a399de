"""`low_confidence_dynamic` of SDAR (arXiv 2510.06303), LLaDA2.0 (2512.15745) and DreamReasoner: a threshold over a schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from dllm_export.errors import UsageError
from dllm_export.runtime.options import option
from dllm_export.runtime.transfers.transfer import Choice, Transfer, TransferState, best_first


@dataclass(frozen=True, slots=True, kw_only=True)
class Dynamic(Transfer):
    """Commit every row with confidence c > tau, and at least as many rows as the schedule says, the surest first.

    A block ends with its last mask, so that its schedule is the most steps that it takes.
    """

    threshold: float = option(0.9, "tau: least confidence of a row that is committed")
    name: ClassVar[str] = "dynamic"
    keeps_schedule: ClassVar[bool] = True
    idles: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0.0 <= self.threshold <= 1.0:
            raise UsageError(f"--threshold is {self.threshold}, expected a probability from 0 to 1")

    def quotas(self, begun: NDArray[np.int64], masked: NDArray[np.int64], step: int, steps: int) -> NDArray[np.int64]:
        """The schedule's numbers, but no more than a sequence has left."""
        # Not super(): `slots=True` makes another class of this one, which super() without arguments does not know.
        return np.minimum(Transfer.quotas(self, begun, masked, step, steps), masked)

    def choose(self, state: TransferState) -> Choice:
        sure = int(np.count_nonzero(state.confidence > self.threshold))
        return Choice(best_first(state.confidence)[: max(state.quota, sure)])

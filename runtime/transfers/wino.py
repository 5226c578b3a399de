"""WINO (arXiv 2507.18578): commit boldly, and mask again what the block's shadow would not write in its place."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from dllm_export.errors import UsageError
from dllm_export.runtime.options import option, require_at_least
from dllm_export.runtime.transfers.transfer import Choice, Transfer, TransferState, best_first


@dataclass(frozen=True, slots=True, kw_only=True)
class Wino(Transfer):
    """Commit every row with c > accept_threshold, at most `cap` of them, or the surest.

    cap = min(max(floor(accept_share n), accept_least), accept_most) for n masked rows. If it commits more than one, the rule
    masks those rows again that were decided before and whose token has a probability below verify_threshold in their shadow,
    at most one fewer than the step before committed, the least likely first. So after k steps at least k rows are decided.
    """

    accept_threshold: float = option(0.6, "confidence above which a row is committed")
    verify_threshold: float = option(
        0.9, "probability of a decided row's token in its shadow below which the row is masked again"
    )
    accept_share: float = option(0.7, "share of the masked rows that a step commits at most")
    accept_least: int = option(5, "but so many rows may be committed however few are masked")
    accept_most: int = option(20, "and never more than so many")
    name: ClassVar[str] = "wino"
    remasks: ClassVar[bool] = True
    verifies: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("accept_threshold", "verify_threshold"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                flag = f"--{name.replace('_', '-')}"
                raise UsageError(f"{flag} is {getattr(self, name)}, expected a probability from 0 to 1")
        if not 0.0 <= self.accept_share <= 1.0:
            raise UsageError(f"--accept-share is {self.accept_share}, expected a share from 0 to 1")
        require_at_least(self, 1, "accept_least", "accept_most")

    def choose(self, state: TransferState) -> Choice:
        cap = min(max(math.floor(self.accept_share * len(state.rows)), self.accept_least), self.accept_most)
        sure = int(np.count_nonzero(state.confidence > self.accept_threshold))
        commit = best_first(state.confidence)[: min(max(sure, 1), cap)]
        remask = np.zeros(0, np.int64)
        # The memory is the number of rows that the block's last step committed. Before its first none is decided.
        if len(commit) > 1 and state.block_step > 1:
            remask = self._doubtful(state)[: state.memory - 1]
        return Choice(commit, remask, memory=len(commit))

    def _doubtful(self, state: TransferState) -> NDArray[np.int64]:
        """The decided rows that fail verification, the least likely first."""
        assert state.verified is not None
        order = best_first(-state.verified)
        return order[state.verified[order] < self.verify_threshold]

"""KLASS (arXiv 2511.05664): rows whose distribution has come to rest, if they are sure as well."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dllm_export.errors import UsageError
from dllm_export.graphs import HeadGraph
from dllm_export.runtime.options import option
from dllm_export.runtime.transfers.transfer import Choice, Transfer, TransferState, best_first


@dataclass(frozen=True, slots=True, kw_only=True)
class Klass(Transfer):
    """Commit every row with KL(p_t || p_(t-1)) < kl_limit on the last kl_steps steps and c >= threshold, or the surest.

    A block begins without a history, so that its first kl_steps steps commit the surest row; an infinite limit asks for none.
    """

    threshold: float = option(0.9, "tau: least confidence of a row that is committed")
    kl_limit: float = option(0.01, "largest KL divergence, in nats, of a row that has come to rest")
    kl_steps: int = option(2, "steps that a row must have been at rest")
    name: ClassVar[str] = "klass"
    head: ClassVar[HeadGraph] = "head_tracked"

    def __post_init__(self) -> None:
        if not 0.0 <= self.threshold <= 1.0:
            raise UsageError(f"--threshold is {self.threshold}, expected a probability from 0 to 1")
        if not self.kl_limit >= 0.0:
            raise UsageError(f"--kl-limit is {self.kl_limit}, expected 0 or more")
        if self.kl_steps < 1:
            raise UsageError(f"--kl-steps is {self.kl_steps}, expected at least 1")

    def choose(self, state: TransferState) -> Choice:
        start, end = state.block
        at_rest = np.zeros(end - start, np.int64) if state.block_step == 1 else state.memory  # steps in a row
        here = state.rows - start
        assert state.divergence is not None
        still = np.zeros(end - start, np.int64)
        still[here] = np.where(state.divergence < self.kl_limit, at_rest[here] + 1, 0)
        chosen = state.confidence >= self.threshold
        if np.isfinite(self.kl_limit):
            chosen &= still[here] >= self.kl_steps
        order = best_first(state.confidence)
        sure = order[chosen[order]]
        return Choice(sure if len(sure) else order[:1], memory=still)

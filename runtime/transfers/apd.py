"""Adaptive parallel decoding of Dynamic-dLLM (arXiv 2606.26120): a threshold per row that moves with its distribution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dllm_export.errors import UsageError
from dllm_export.graphs import HeadGraph
from dllm_export.runtime.options import option
from dllm_export.runtime.transfers.transfer import Choice, Transfer, TransferState, best_first


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptiveThreshold(Transfer):
    """Commit every row with c >= tau_i, and the surest.

    tau_i starts at the threshold and from a block's second step on loses alpha (1 - second probability) and gains
    beta (1 - cos(p_t, p_(t-1))) a step. It is never clamped, as published.
    """

    threshold: float = option(0.9, "tau: least confidence of a row that is committed")
    alpha: float = option(0.001, "how fast a row's threshold falls where the second token is unlikely")
    beta: float = option(0.0008, "how fast a row's threshold rises while its distribution changes")
    name: ClassVar[str] = "apd"
    head: ClassVar[HeadGraph] = "head_tracked"

    def __post_init__(self) -> None:
        if not 0.0 <= self.threshold <= 1.0:
            raise UsageError(f"--threshold is {self.threshold}, expected a probability from 0 to 1")
        for name in ("alpha", "beta"):
            if not 0.0 <= getattr(self, name) < float("inf"):
                raise UsageError(f"--{name} is {getattr(self, name)}, expected a number from 0 up")

    def choose(self, state: TransferState) -> Choice:
        start, end = state.block
        here = state.rows - start
        if state.block_step == 1:
            limits = np.full(end - start, self.threshold)
        else:
            assert state.similarity is not None
            limits = state.memory.copy()
            limits[here] += self.beta * (1.0 - state.similarity) - self.alpha * (1.0 - state.second)
        order = best_first(state.confidence)
        chosen = state.confidence >= limits[here]
        chosen[order[0]] = True
        return Choice(order[chosen[order]], memory=limits)

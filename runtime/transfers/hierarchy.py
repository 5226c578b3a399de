"""Hierarchy (dInfer, arXiv 2510.08666): the best row of every run of masks, so that decided rows spread out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dllm_export.errors import UsageError
from dllm_export.runtime.options import option
from dllm_export.runtime.transfers.transfer import Choice, Transfer, TransferState, best_first


@dataclass(frozen=True, slots=True, kw_only=True)
class Hierarchy(Transfer):
    """Commit the surest row of every contiguous run above `low`, all rows above `high`, and always the surest of all."""

    low: float = option(0.4, "least confidence of the best row of a run of masks")
    high: float = option(0.9, "confidence above which every row is committed")
    name: ClassVar[str] = "hierarchy"

    def __post_init__(self) -> None:
        if not 0.0 <= self.low <= self.high <= 1.0:
            raise UsageError(f"--low is {self.low} and --high {self.high}, expected 0 <= low <= high <= 1")

    def choose(self, state: TransferState) -> Choice:
        confidence = state.confidence
        chosen = confidence > self.high
        starts = np.flatnonzero(np.diff(state.rows, prepend=state.rows[0] - 2) != 1)
        for run in np.split(np.arange(len(confidence)), starts[1:]):
            best = run[np.argmax(confidence[run])]
            chosen[best] |= confidence[best] > self.low
        order = best_first(confidence)
        chosen[order[0]] = True
        return Choice(order[chosen[order]])

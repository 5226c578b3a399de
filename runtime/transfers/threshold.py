"""Confidence threshold (Fast-dLLM, arXiv 2505.22618): every row that is sure enough, and always the surest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dllm_export.errors import UsageError
from dllm_export.runtime.options import option
from dllm_export.runtime.transfers.transfer import Choice, Transfer, TransferState, best_first


@dataclass(frozen=True, slots=True, kw_only=True)
class Threshold(Transfer):
    """Commit every row with confidence c >= tau, and the most confident one whatever its confidence."""

    threshold: float = option(0.9, "tau: least confidence of a row that is committed")
    name: ClassVar[str] = "threshold"
    takes_best: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0.0 <= self.threshold <= 1.0:
            raise UsageError(f"--threshold is {self.threshold}, expected a probability from 0 to 1")

    @property
    def sure(self) -> float:
        return self.threshold

    def choose(self, state: TransferState) -> Choice:
        order = best_first(state.confidence)
        sure = int(np.count_nonzero(state.confidence >= self.threshold))
        return Choice(order[: max(1, sure)])

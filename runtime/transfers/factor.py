"""Factor rule (Fast-dLLM, arXiv 2505.22618): the more rows at once, the surer each of them must be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dllm_export.errors import UsageError
from dllm_export.runtime.options import option
from dllm_export.runtime.transfers.transfer import Choice, Transfer, TransferState, best_first


@dataclass(frozen=True, slots=True, kw_only=True)
class Factor(Transfer):
    """Commit the n most confident rows, n the largest with (n + 1) (1 - c_(n)) < f, at least one.

    The left side does not fall as n grows. With f = 1 the rows decoded together are those that greedy decoding one by one
    would give, if their distributions factorise to within 1 - c.
    """

    factor: float = option(1.0, "f: doubt that rows committed together may add up to")
    name: ClassVar[str] = "factor"

    def __post_init__(self) -> None:
        if not 0.0 < self.factor < float("inf"):
            raise UsageError(f"--factor is {self.factor}, expected a number above 0")

    def choose(self, state: TransferState) -> Choice:
        order = best_first(state.confidence)
        counts = np.arange(1, len(order) + 1)
        fits = (counts + 1) * (1.0 - state.confidence[order]) < self.factor
        return Choice(order[: max(1, int(np.count_nonzero(fits)))])

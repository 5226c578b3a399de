"""The fixed quota of LLaDA's sampling loop (arXiv 2502.09992): as many rows in a step as `--steps` demands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dllm_export.runtime.transfers.transfer import Choice, Transfer, TransferState, best_first


@dataclass(frozen=True, slots=True, kw_only=True)
class Quota(Transfer):
    """Commit the best-ranked rows, as many as the schedule says."""

    name: ClassVar[str] = "quota"
    keeps_schedule: ClassVar[bool] = True
    ranks: ClassVar[bool] = True
    takes_best: ClassVar[bool] = True

    def choose(self, state: TransferState) -> Choice:
        return Choice(best_first(state.ranking)[: state.quota])

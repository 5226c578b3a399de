"""dInfer's vicinity refresh (arXiv 2510.08666): a block is recomputed together with its neighbours on both sides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dllm_export.runtime.options import option, require_at_least
from dllm_export.runtime.policies.policy import REFRESH_INTERVAL, Rows, StepPlan, StepState


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowCache:
    """Everything in the first step of a block; in the others the block's rows and those beside it.

    Where the window would leave the sequence it is shifted and not cut, so that every step has equally many rows.
    """

    before: int = option(16, "rows recomputed before the block")
    after: int = option(16, "rows recomputed after the block")
    refresh_interval: int = option(0, REFRESH_INTERVAL)
    name: ClassVar[str] = "window"
    foreseeable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_at_least(self, 0, "before", "after", "refresh_interval")

    def plan(self, state: StepState) -> StepPlan:
        if state.is_refresh(self.refresh_interval):
            return StepPlan.refresh(state, keep_delta=False)
        start, end = state.span
        count = min(state.length, self.before + end - start + self.after)
        first = min(max(start - self.before, 0), state.length - count)
        return StepPlan.recompute(state, Rows.span(first, first + count, state.batch))

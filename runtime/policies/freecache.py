"""FreeCache (FlashDLM, arXiv 2505.21467): keys and values of the prompt and of finished blocks are frozen for good."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dllm_export.runtime.policies.policy import Rows, StepPlan, StepState


@dataclass(frozen=True, slots=True, kw_only=True)
class FreeCache:
    """Everything in the first step; then the rows from the current block's start to the end, and nothing is refreshed."""

    name: ClassVar[str] = "freecache"
    foreseeable: ClassVar[bool] = True

    def plan(self, state: StepState) -> StepPlan:
        if state.step == 1:
            return StepPlan.refresh(state, keep_delta=False)
        return StepPlan.recompute(state, Rows.span(state.span[0], state.length, state.batch))

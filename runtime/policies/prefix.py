"""Fast-dLLM's prefix cache (arXiv 2505.22618): within a block everything before it comes from the cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dllm_export.runtime.policies.policy import Rows, StepPlan, StepState


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixCache:
    """Everything in the first step of a block; in the others the rows from the block's start to the end of the sequence."""

    name: ClassVar[str] = "prefix"
    foreseeable: ClassVar[bool] = True

    def plan(self, state: StepState) -> StepPlan:
        if state.block_step == 1:
            return StepPlan.refresh(state, keep_delta=False)
        return StepPlan.recompute(state, Rows.span(state.span[0], state.length, state.batch))

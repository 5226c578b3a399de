"""Fast-dLLM's dual cache (arXiv 2505.22618): within a block only its own rows run, against the cached rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dllm_export.runtime.policies.policy import Rows, StepPlan, StepState


@dataclass(frozen=True, slots=True, kw_only=True)
class DualCache:
    """Everything in the first step of a block; in the others the block's rows, with the keys and values of both sides."""

    name: ClassVar[str] = "dual"
    foreseeable: ClassVar[bool] = True

    def plan(self, state: StepState) -> StepPlan:
        if state.block_step == 1:
            return StepPlan.refresh(state, keep_delta=False)
        return StepPlan.recompute(state, Rows.span(*state.span, state.batch))

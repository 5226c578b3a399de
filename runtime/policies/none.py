"""No cache: every row of every layer on every step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dllm_export.runtime.policies.policy import StepPlan, StepState


@dataclass(frozen=True, slots=True, kw_only=True)
class NoCache:
    """The baseline that every policy is compared with."""

    name: ClassVar[str] = "none"
    foreseeable: ClassVar[bool] = True

    def plan(self, state: StepState) -> StepPlan:
        return StepPlan.refresh(state, keep_delta=False)

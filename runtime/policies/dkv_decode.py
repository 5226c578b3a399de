"""dKV-Cache-Decode (arXiv 2505.15781): a decided row is cached one step after it was decided."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dllm_export.runtime.options import option, require_at_least
from dllm_export.runtime.policies.policy import BUCKET, REFRESH_INTERVAL, Rows, StepPlan, StepState


@dataclass(frozen=True, slots=True, kw_only=True)
class DkvDecode:
    """Everything in steps 1 and 2 of a block and every `refresh_interval`; else the rows that were masked a step ago.

    Those are all rows that are still masked, of later blocks too, and the ones that the last step decided: the keys and
    values of a row change most when its token appears, so that they are kept one step later.
    """

    refresh_interval: int = option(8, REFRESH_INTERVAL)
    bucket: int = option(16, BUCKET)
    name: ClassVar[str] = "dkv-decode"

    def __post_init__(self) -> None:
        require_at_least(self, 0, "refresh_interval")
        require_at_least(self, 1, "bucket")

    def plan(self, state: StepState) -> StepPlan:
        if state.block_step == 2 or state.is_refresh(self.refresh_interval):
            return StepPlan.refresh(state, keep_delta=False)
        chosen = state.masked_before | state.masked | state.candidates
        chosen = chosen | state.predicting(chosen)
        return StepPlan.recompute(state, Rows.padded(chosen, state.prompt_rows, self.bucket))

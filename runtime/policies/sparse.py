"""Sparse-dLLM (arXiv 2508.02558): within a block its rows attend to the cached rows that matter most to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dllm_export.errors import UsageError
from dllm_export.runtime.options import option
from dllm_export.runtime.policies.policy import Attention, Compaction, Rows, StepPlan, StepState


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseCache:
    """Everything in steps 1 and 2 of a block; then the block's rows, against the rows that step 2 kept.

    Each layer keeps its own: those whose keys agree most with the block's mean query.
    """

    keep_ratio: float = option(0.5, "share of the rows outside the block that stay cached in every layer")
    name: ClassVar[str] = "sparse"
    foreseeable: ClassVar[bool] = True
    attention: ClassVar[Attention] = "full"

    def __post_init__(self) -> None:
        if not 0.0 <= self.keep_ratio <= 1.0:
            raise UsageError(f"--keep-ratio is {self.keep_ratio}, expected a share from 0 to 1")

    def plan(self, state: StepState) -> StepPlan:
        if state.block_step == 1:
            return StepPlan.refresh(state, keep_delta=False)
        start, end = state.span
        rows = Rows.span(start, end, state.batch)
        others = (max(0, start - padding) + state.length - end for padding in state.padding)
        compaction = Compaction(rows, tuple(int(count * self.keep_ratio) for count in others))
        if state.block_step == 2:
            return StepPlan.refresh(state, keep_delta=False, compaction=compaction)
        return StepPlan.recompute(state, rows, compaction=compaction)

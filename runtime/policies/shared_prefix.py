"""BiCache (arXiv 2606.07571): the first layers take a shared prefix's keys and values from earlier requests."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from dllm_export.errors import UsageError
from dllm_export.runtime.options import option
from dllm_export.runtime.policies.none import NoCache
from dllm_export.runtime.policies.policy import Attention, CachePolicy, Rows, StepPlan, StepState, is_foreseeable


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedPrefix:
    """Another policy whose full steps leave out the shared prefix in the first layers, where it hardly depends on the rest.

    Without a cache (base none) every step is full; here all but every `refresh_interval`-th run only the rows that are not
    the prefix's, in all layers. A request that names no prefix, or one that no layer may share, runs as the base does.
    """

    base: CachePolicy = option(NoCache(), "the policy whose full steps are split", strategy=True)
    refresh_interval: int = option(16, "base none: steps between refreshes of the prefix in the deeper layers")
    name: ClassVar[str] = "shared-prefix"
    attention: ClassVar[Attention] = "full"

    def __post_init__(self) -> None:
        if self.refresh_interval < 1:
            raise UsageError(
                f"--refresh-interval is {self.refresh_interval}, expected at least 1 (1 refreshes every step)"
            )
        if isinstance(self.base, SharedPrefix):
            raise UsageError("--base is shared-prefix itself, expected another policy, such as none or dual")
        if getattr(self.base, "attention", "any") == "blocks":
            raise UsageError(
                f"--base is {self.base.name}, which is for models that attend by blocks and has no full step to split: take "
                f"another policy, such as none or dual"
            )

    @property
    def needs_upcoming(self) -> bool:
        """Whether the base must know which rows a step decides."""
        return bool(getattr(self.base, "needs_upcoming", False))

    @property
    def foreseeable(self) -> bool:
        """Whether the base's plans are the same whatever rows are decided."""
        return is_foreseeable(self.base)

    def plan(self, state: StepState) -> StepPlan:
        prefix = state.prefix
        if prefix is None:
            return self.base.plan(state)
        if isinstance(self.base, NoCache) and (state.step - 1) % self.refresh_interval:
            return StepPlan.recompute(state, Rows.outside(prefix, state.length))
        plan = self.base.plan(state)
        # What a step keeps of all layers beside keys, values and deltas takes all of its rows.
        keeps_more = plan.compaction is not None or plan.reference is not None or plan.measure_drift
        if not plan.whole or keeps_more or prefix.depth == 0:
            return plan
        if prefix.stored:
            return StepPlan.split(state, prefix, keep_delta=plan.keep_delta)
        return replace(plan, share=prefix.depth)

"""Steps as named ranges for a profiler, where the package nvtx is there and --nvtx asks for them."""

from __future__ import annotations

import importlib
from collections import deque
from typing import Any, Protocol

from dllm_export.errors import IncompatibleError
from dllm_export.runtime.policies import CachePolicy
from dllm_export.runtime.policies.policy import StepPlan, StepState, is_foreseeable


class Ranges(Protocol):
    """Named ranges of time."""

    def start(self, name: str) -> None:
        """Begin a range."""
        ...

    def end(self) -> None:
        """End the one that began first: a step may begin before the one before it ends."""
        ...


class NoRanges:
    """For when nobody profiles."""

    def start(self, name: str) -> None:
        pass

    def end(self) -> None:
        pass


class NvtxRanges:
    """Ranges that Nsight Systems shows."""

    def __init__(self) -> None:
        try:
            self._nvtx: Any = importlib.import_module("nvtx")
        except ModuleNotFoundError:
            raise IncompatibleError("--nvtx needs the package nvtx: pip install nvtx, or leave it out") from None
        self._open: deque[object] = deque()

    def start(self, name: str) -> None:
        self._open.append(self._nvtx.start_range(name, domain="dllm-export"))

    def end(self) -> None:
        self._nvtx.end_range(self._open.popleft())


class NamedSteps:
    """A cache policy that begins a range with the index and kind of every step it plans."""

    def __init__(self, policy: CachePolicy, ranges: Ranges) -> None:
        self.name = policy.name
        self.needs_upcoming = getattr(policy, "needs_upcoming", False)
        self._policy, self._ranges = policy, ranges

    @property
    def foreseeable(self) -> bool:
        """Whether the policy is."""
        return is_foreseeable(self._policy)

    def plan(self, state: StepState) -> StepPlan:
        plan = self._policy.plan(state)
        self._ranges.start(f"step {state.step} {plan.kind}")
        return plan

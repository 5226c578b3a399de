"""Cache policies by name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from dllm_export.errors import UsageError
from dllm_export.runtime.policies.dllm_cache import DllmCache
from dllm_export.runtime.policies.none import NoCache
from dllm_export.runtime.policies.policy import CachePolicy, LayerPlan, StepPlan, StepState

POLICIES: Mapping[str, type[NoCache] | type[DllmCache]] = {policy.name: policy for policy in (NoCache, DllmCache)}


def find_policy(name: str) -> type[NoCache] | type[DllmCache]:
    """The policy class of this name, or an error that lists the names."""
    if name not in POLICIES:
        near = difflib.get_close_matches(name, POLICIES, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UsageError(f"no cache policy is called {name!r}; there are: {', '.join(POLICIES)}{hint}")
    return POLICIES[name]


__all__ = ["POLICIES", "CachePolicy", "DllmCache", "LayerPlan", "NoCache", "StepPlan", "StepState", "find_policy"]

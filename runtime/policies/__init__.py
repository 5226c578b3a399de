"""Cache policies by name."""

from __future__ import annotations

from collections.abc import Mapping

from dllm_export.runtime.options import find_strategy
from dllm_export.runtime.policies.dllm_cache import DllmCache
from dllm_export.runtime.policies.dual import DualCache
from dllm_export.runtime.policies.none import NoCache
from dllm_export.runtime.policies.policy import CachePolicy, LayerPlan, Rows, StepPlan, StepState

POLICIES: Mapping[str, type[CachePolicy]] = {policy.name: policy for policy in (NoCache, DllmCache, DualCache)}


def find_policy(name: str) -> type[CachePolicy]:
    """The policy class of this name, or an error that lists the names."""
    return find_strategy(POLICIES, name, "cache policy")


__all__ = [
    "POLICIES",
    "CachePolicy",
    "DllmCache",
    "DualCache",
    "LayerPlan",
    "NoCache",
    "Rows",
    "StepPlan",
    "StepState",
    "find_policy",
]

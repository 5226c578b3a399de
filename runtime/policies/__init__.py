"""Cache policies by name."""

from __future__ import annotations

from collections.abc import Mapping

from dllm_export.runtime.policies.block import BlockCache
from dllm_export.runtime.policies.dkv_decode import DkvDecode
from dllm_export.runtime.policies.dkv_greedy import DkvGreedy
from dllm_export.runtime.policies.dllm_cache import DllmCache
from dllm_export.runtime.policies.dual import DualCache
from dllm_export.runtime.policies.dynamic_dllm import DynamicDllm
from dllm_export.runtime.policies.freecache import FreeCache
from dllm_export.runtime.policies.none import NoCache
from dllm_export.runtime.policies.policy import (
    CachePolicy,
    Compaction,
    LayerPlan,
    PrefixState,
    Rows,
    StepPlan,
    StepState,
)
from dllm_export.runtime.policies.prefix import PrefixCache
from dllm_export.runtime.policies.shared_prefix import SharedPrefix
from dllm_export.runtime.policies.spa import SpaCache
from dllm_export.runtime.policies.sparse import SparseCache
from dllm_export.runtime.policies.window import WindowCache

POLICIES: Mapping[str, type[CachePolicy]] = {
    policy.name: policy
    for policy in (
        NoCache,
        DllmCache,
        DynamicDllm,
        SpaCache,
        PrefixCache,
        DualCache,
        BlockCache,
        FreeCache,
        WindowCache,
        DkvDecode,
        DkvGreedy,
        SparseCache,
        SharedPrefix,
    )
}

__all__ = [
    "POLICIES",
    "BlockCache",
    "CachePolicy",
    "Compaction",
    "DkvDecode",
    "DkvGreedy",
    "DllmCache",
    "DualCache",
    "DynamicDllm",
    "FreeCache",
    "LayerPlan",
    "NoCache",
    "PrefixCache",
    "PrefixState",
    "Rows",
    "SharedPrefix",
    "SpaCache",
    "SparseCache",
    "StepPlan",
    "StepState",
    "WindowCache",
]

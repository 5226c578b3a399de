"""Decoding rules by name: which rows of a step become decided."""

from __future__ import annotations

from collections.abc import Mapping

from dllm_export.runtime.transfers.ancestral import Ancestral
from dllm_export.runtime.transfers.apd import AdaptiveThreshold
from dllm_export.runtime.transfers.credit import Credit
from dllm_export.runtime.transfers.ddpm import Ddpm, DdpmCache
from dllm_export.runtime.transfers.dream import Dream
from dllm_export.runtime.transfers.dynamic import Dynamic
from dllm_export.runtime.transfers.entropy_bound import EntropyBound
from dllm_export.runtime.transfers.factor import Factor
from dllm_export.runtime.transfers.first_hitting import FirstHitting
from dllm_export.runtime.transfers.hierarchy import Hierarchy
from dllm_export.runtime.transfers.klass import Klass
from dllm_export.runtime.transfers.origin import Origin
from dllm_export.runtime.transfers.quota import Quota
from dllm_export.runtime.transfers.sedd import Sedd, SeddUniform
from dllm_export.runtime.transfers.slow_fast import SlowFast
from dllm_export.runtime.transfers.sub_blocks import SubBlocks
from dllm_export.runtime.transfers.threshold import Threshold
from dllm_export.runtime.transfers.token_editing import TokenEditing
from dllm_export.runtime.transfers.transfer import Choice, Transfer, TransferState
from dllm_export.runtime.transfers.wino import Wino

ALL: tuple[type[Transfer], ...] = (
    Quota,
    Threshold,
    Dynamic,
    SubBlocks,
    TokenEditing,
    Factor,
    EntropyBound,
    Hierarchy,
    Klass,
    AdaptiveThreshold,
    Credit,
    SlowFast,
    Wino,
    Ddpm,
    DdpmCache,
    FirstHitting,
    Sedd,
    SeddUniform,
    Dream,
    Origin,
    Ancestral,
)
TRANSFERS: Mapping[str, type[Transfer]] = {transfer.name: transfer for transfer in ALL}

__all__ = [
    "TRANSFERS",
    "AdaptiveThreshold",
    "Ancestral",
    "Choice",
    "Credit",
    "Ddpm",
    "DdpmCache",
    "Dream",
    "Dynamic",
    "EntropyBound",
    "Factor",
    "FirstHitting",
    "Hierarchy",
    "Klass",
    "Origin",
    "Quota",
    "Sedd",
    "SeddUniform",
    "SlowFast",
    "SubBlocks",
    "Threshold",
    "TokenEditing",
    "Transfer",
    "TransferState",
    "Wino",
]

"""Decoding rules by name: which rows of a step become decided."""

from __future__ import annotations

from collections.abc import Mapping

from dllm_export.runtime.options import find_strategy
from dllm_export.runtime.transfers.entropy_bound import EntropyBound
from dllm_export.runtime.transfers.factor import Factor
from dllm_export.runtime.transfers.hierarchy import Hierarchy
from dllm_export.runtime.transfers.quota import Quota
from dllm_export.runtime.transfers.threshold import Threshold
from dllm_export.runtime.transfers.transfer import Choice, Transfer, TransferState

AnyTransfer = type[Quota] | type[Threshold] | type[Factor] | type[EntropyBound] | type[Hierarchy]
TRANSFERS: Mapping[str, AnyTransfer] = {
    transfer.name: transfer for transfer in (Quota, Threshold, Factor, EntropyBound, Hierarchy)
}


def find_transfer(name: str) -> AnyTransfer:
    """The decoding rule of this name, or an error that lists the names."""
    return find_strategy(TRANSFERS, name, "decoding rule")


__all__ = [
    "TRANSFERS",
    "Choice",
    "EntropyBound",
    "Factor",
    "Hierarchy",
    "Quota",
    "Threshold",
    "Transfer",
    "TransferState",
    "find_transfer",
]

"""Keys that describe a mixture of experts in a config.json, checked."""

from __future__ import annotations

from collections.abc import Mapping

from dllm_export.errors import CheckpointError
from dllm_export.graphs.families.family import read_size

EXPERT_LIMIT = 4096

Settings = tuple[tuple[str, tuple[object, ...], str], ...]
"""Keys, the values that are supported, and what another value means."""


def read_counts(raw: Mapping[str, object]) -> tuple[int, int]:
    """(experts, experts of a token) of a configuration with the usual keys."""
    count = read_size(raw, "num_experts", most=EXPERT_LIMIT)
    per_token = read_size(raw, "num_experts_per_tok", most=EXPERT_LIMIT)
    if per_token > count:
        raise CheckpointError(f"config.json: num_experts_per_tok {per_token} is more than num_experts {count}")
    return count, per_token


def refuse_settings(raw: Mapping[str, object], settings: Settings) -> None:
    """Refuse keys whose value is none of the expected ones; a missing key counts as None."""
    for key, expected, what in settings:
        if raw.get(key) not in expected:
            raise CheckpointError(f"config.json: '{key}' is {raw.get(key)!r}: {what}")


def count_dense_layers(raw: Mapping[str, object], key: str) -> int:
    """How many layers have no experts, of a list with 0 for those and 1 for the others; they must be the first."""
    marks = raw.get(key)
    if marks is None:
        return 0
    if not isinstance(marks, list) or any(mark not in (0, 1) for mark in marks) or marks != sorted(marks):
        raise CheckpointError(
            f"config.json: '{key}' is {marks!r}, expected a list of 0 for the first layers, then of 1"
        )
    return marks.count(0)

"""Model families by name. A family is an adapter: config keys, tensor names, special ids, sampler defaults."""

from __future__ import annotations

from collections.abc import Mapping

from dllm_export.errors import CheckpointError
from dllm_export.graphs.families.family import (
    BIAS_SLOTS,
    LAYER_SLOTS,
    Family,
    ModelConfig,
    Remasking,
    SamplerDefaults,
    SpecialTokens,
    TensorNames,
)
from dllm_export.graphs.families.llada import LLADA

FAMILIES: Mapping[str, Family] = {family.name: family for family in (LLADA,)}


def detect_family(raw: Mapping[str, object]) -> Family:
    """The family of a config.json, or an error that lists the supported ones."""
    for family in FAMILIES.values():
        if family.detect(raw):
            return family
    evidence = ", ".join(f"{key} {raw.get(key)!r}" for key in ("architectures", "model_type"))
    known = "; ".join(f"{family.name} ({family.title})" for family in FAMILIES.values())
    raise CheckpointError(f"config.json describes no supported family: {evidence}. Supported: {known}")


__all__ = [
    "BIAS_SLOTS",
    "FAMILIES",
    "LAYER_SLOTS",
    "Family",
    "ModelConfig",
    "Remasking",
    "SamplerDefaults",
    "SpecialTokens",
    "TensorNames",
    "detect_family",
]

"""Model families by name. A family is an adapter: how it is recognised, its keys and tensor names, special ids, defaults."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from dllm_export.graphs.families.a2d import A2D
from dllm_export.graphs.families.bd3lm import BD3LM
from dllm_export.graphs.families.block_diffusion import DREAM_REASONER, FAST_DLLM_V2, SDAR, STABLE_DIFFCODER
from dllm_export.graphs.families.converted import DIFFULLAMA, OPEN_DCODER
from dllm_export.graphs.families.detection import find_by_files, find_family
from dllm_export.graphs.families.dream import DREAM
from dllm_export.graphs.families.family import (
    BIAS_SLOTS,
    LAYER_SLOTS,
    MLP_SLOTS,
    QK_NORM_SLOTS,
    SHARED_SLOTS,
    Family,
    KnownFamily,
    Marks,
    ModelConfig,
    Remasking,
    SamplerDefaults,
    Source,
    SpecialTokens,
    TensorNames,
    layer_slots,
)
from dllm_export.graphs.families.illada import ILLADA
from dllm_export.graphs.families.known import KNOWN
from dllm_export.graphs.families.llada import LLADA
from dllm_export.graphs.families.llada2 import LLADA2
from dllm_export.graphs.families.llada_moe import LLADA_MOE
from dllm_export.graphs.families.mdlm import MDLM
from dllm_export.graphs.families.plaid import PLAID
from dllm_export.graphs.families.sdar_moe import SDAR_MOE
from dllm_export.graphs.families.sedd import SEDD

ALL = (
    *(LLADA, ILLADA, DREAM, *A2D, OPEN_DCODER, DIFFULLAMA),
    *(SDAR, DREAM_REASONER, STABLE_DIFFCODER, FAST_DLLM_V2, LLADA_MOE, LLADA2, SDAR_MOE),
    *(MDLM, BD3LM, SEDD, PLAID),
)
FAMILIES: Mapping[str, Family] = {family.name: family for family in ALL}
"""Families that can be exported."""

KNOWN_FAMILIES: Mapping[str, KnownFamily] = {family.name: family for family in KNOWN}
"""Families that are recognised and refused."""


def detect_family(source: Source, name: str | None = None) -> Family:
    """The family of this name, or without one the checkpoint's own; an error if it is none that can be exported."""
    return find_family(FAMILIES, KNOWN_FAMILIES, source, name)


def detect_files(files: Iterable[str]) -> Family | None:
    """The family that these files without a config.json show, if any."""
    return find_by_files((*FAMILIES.values(), *KNOWN_FAMILIES.values()), files)


__all__ = [
    "BIAS_SLOTS",
    "FAMILIES",
    "KNOWN_FAMILIES",
    "LAYER_SLOTS",
    "MLP_SLOTS",
    "QK_NORM_SLOTS",
    "SHARED_SLOTS",
    "Family",
    "KnownFamily",
    "Marks",
    "ModelConfig",
    "Remasking",
    "SamplerDefaults",
    "Source",
    "SpecialTokens",
    "TensorNames",
    "detect_family",
    "detect_files",
    "layer_slots",
]

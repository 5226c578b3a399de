"""Families that are recognised and not supported: what a checkpoint shows, and what an export of it would need."""

from __future__ import annotations

from dllm_export.graphs.families.family import KnownFamily, Marks, Source


def has_experts(source: Source) -> bool:
    """LLaDA-MoE shares its model type with LLaDA, and has experts."""
    return source.architecture.startswith("LLaDAMoE") or "num_experts" in source.config


KNOWN = (
    KnownFamily(
        name="plaid",
        title="Plaid-1B",
        marks=Marks(files=("embedding_matrix.pt", "noise_schedule.pt")),
        reason="it diffuses embeddings, not tokens: every position changes in every step, and no row is ever decided",
    ),
    KnownFamily(
        name="llada-moe",
        title="LLaDA-MoE",
        marks=Marks(
            architectures=("LLaDAMoEModelLM", "LLaDAMoE*"), model_types=("llada", "lladamoe"), confirm=has_experts
        ),
        reason="its layers are mixtures of experts",
    ),
)

"""Families that are recognised and not supported: what a checkpoint shows, and what an export of it would need."""

from __future__ import annotations

from dllm_export.graphs.families.family import KnownFamily, Marks, Source


def has_query_norms(source: Source) -> bool:
    """DreamReasoner shares an architecture with exports of Dream, which has biases instead."""
    return source.has("self_attn.q_norm.weight")


BY_BLOCKS = "it attends by blocks, of which each sees itself and what lies before it; generation does not do that yet"

KNOWN = (
    KnownFamily(
        name="plaid",
        title="Plaid-1B",
        marks=Marks(files=("embedding_matrix.pt", "noise_schedule.pt")),
        reason="it diffuses embeddings, not tokens: every position changes in every step, and no row is ever decided",
    ),
    KnownFamily(
        name="dream-reasoner",
        title="DreamReasoner-8B",
        marks=Marks(architectures=("DreamForCausalLM",), confirm=has_query_norms),
        reason=BY_BLOCKS,
    ),
    KnownFamily(
        name="sdar",
        title="SDAR 1.7B to 8B, TraDo",
        marks=Marks(architectures=("SDARForCausalLM",), model_types=("sdar",)),
        reason=BY_BLOCKS,
    ),
    KnownFamily(
        name="stable-diffcoder",
        title="Stable-DiffCoder-8B",
        marks=Marks(architectures=("StableDiffcoderForCausalLM",)),
        reason=BY_BLOCKS,
    ),
    KnownFamily(
        name="fast-dllm-v2",
        title="Fast-dLLM v2 1.5B/7B",
        marks=Marks(architectures=("Fast_dLLM_QwenForCausalLM",), model_types=("Fast_dLLM_Qwen",)),
        reason=f"{BY_BLOCKS}, and its rows predict the next token of their block",
    ),
    KnownFamily(
        name="wedlm",
        title="WeDLM-7B/8B",
        marks=Marks(architectures=("WeDLMForCausalLM",), model_types=("wedlm",)),
        reason="it attends causally over tokens in an order of its own, decided ones first",
    ),
    KnownFamily(
        name="nemotron-labs-diffusion",
        title="Nemotron-Labs-Diffusion 3B to 14B",
        marks=Marks(architectures=("NemotronLabsDiffusionModel",), model_types=("nemotron_labs_diffusion",)),
        reason="it attends by blocks over a causal prefix, with YaRN positions and scaled queries",
    ),
    KnownFamily(
        name="diffusion-gemma",
        title="DiffusionGemma-26B-A4B",
        marks=Marks(architectures=("DiffusionGemmaForBlockDiffusion",), model_types=("diffusion_gemma",)),
        reason="it has no mask token: every token of its canvas may change in every step, behind an encoder's causal prefix",
    ),
)

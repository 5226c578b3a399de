"""Families that are recognised and not supported: what a checkpoint shows, and what an export of it would need."""

from __future__ import annotations

from collections.abc import Mapping

from dllm_export.graphs.families.converted import wraps_denoiser
from dllm_export.graphs.families.family import KnownFamily, Marks, Source

STOCK = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "GPT2LMHeadModel", "MistralForCausalLM")
STOCK_TYPES = ("llama", "qwen2", "qwen3", "gpt2", "mistral")
BY_BLOCKS = "it attends by blocks, of which each sees itself and what lies before it; generation does not do that yet"


def has_query_norms(source: Source) -> bool:
    """DreamReasoner shares names with Dream, and has query and key norms in place of biases."""
    return source.has("self_attn.q_norm.weight")


def names_diffcoder(source: Source) -> bool:
    """Stable-DiffCoder calls itself a Llama; its architecture or its remote code says what it is."""
    remote = source.config.get("auto_map")
    named = str(list(remote.values())) if isinstance(remote, Mapping) else ""
    return "diffcoder" in (source.architecture + named).lower()


def has_block_length(source: Source) -> bool:
    """Fast-dLLM v2 has Qwen2's layers and the length of its blocks."""
    return source.architecture.startswith("Fast_dLLM") or "bd_size" in source.config


def shows_no_diffusion(source: Source) -> bool:
    """An ordinary model, as far as its files say."""
    return not (names_diffcoder(source) or has_block_length(source) or wraps_denoiser(source))


KNOWN = (
    KnownFamily(
        name="autoregressive",
        title="autoregressive Llama, Qwen, GPT-2",
        marks=Marks(architectures=STOCK, model_types=STOCK_TYPES, confirm=shows_no_diffusion),
        reason="it decodes from left to right; a diffusion model that was saved under such a class needs its --family named",
    ),
    KnownFamily(
        name="rnd1",
        title="RND1-Base-30B-A3B",
        marks=Marks(architectures=("RND1*",), model_types=("rnd1",)),
        reason="its layers are those of sdar-moe without blocks, but no configuration of it has been read yet",
    ),
    KnownFamily(
        name="sdar",
        title="SDAR 1.7B to 8B, TraDo",
        marks=Marks(architectures=("SDARForCausalLM",), model_types=("sdar",)),
        reason=f"{BY_BLOCKS}; its layers are those of a2d-qwen3",
    ),
    KnownFamily(
        name="dream-reasoner",
        title="DreamReasoner-8B",
        marks=Marks(architectures=("DreamForCausalLM",), model_types=("Dream",), confirm=has_query_norms),
        reason=f"{BY_BLOCKS}; unlike Dream it has query and key norms and no shift",
    ),
    KnownFamily(
        name="stable-diffcoder",
        title="Stable-DiffCoder-8B",
        marks=Marks(
            architectures=("StableDiffcoderForCausalLM", "StableDiff[cC]oder*", "LlamaForCausalLM"),
            model_types=("llama",),
            confirm=names_diffcoder,
        ),
        reason=BY_BLOCKS,
    ),
    KnownFamily(
        name="fast-dllm-v2",
        title="Fast-dLLM v2 1.5B and 7B",
        marks=Marks(
            architectures=("Fast_dLLM_QwenForCausalLM", "Fast_dLLM*", "Qwen2ForCausalLM"),
            model_types=("Fast_dLLM_Qwen", "qwen2"),
            confirm=has_block_length,
        ),
        reason=f"{BY_BLOCKS}, and inside a block a row predicts the next one's token",
    ),
    KnownFamily(
        name="diffugpt",
        title="DiffuGPT small and medium",
        marks=Marks(architectures=("GPT2LMHeadModel",), model_types=("gpt2",), confirm=wraps_denoiser),
        reason="its layers are GPT-2's, whose positions are learned instead of rotated",
    ),
    KnownFamily(
        name="wedlm",
        title="WeDLM 7B and 8B",
        marks=Marks(architectures=("WeDLMForCausalLM",), model_types=("wedlm",)),
        reason="it attends causally over tokens in another order than their positions, decided ones first: its layers could be "
        "exported, but keys of decided tokens are exact, so that the caches here have nothing to add and its loop is missing",
    ),
    KnownFamily(
        name="nemotron-labs-diffusion",
        title="Nemotron-Labs-Diffusion 3B, 8B, 14B",
        marks=Marks(
            architectures=("NemotronLabsDiffusionModel", "NemotronLabsDiffusion*"),
            model_types=("nemotron_labs_diffusion",),
        ),
        reason="it rotates by a scaled rule (YaRN), scales queries by position and reads blocks against a causal prefix; "
        "NVIDIA's TensorRT-Model-Connect runs this family in TensorRT",
    ),
    KnownFamily(
        name="diffusion-gemma",
        title="DiffusionGemma-26B-A4B",
        marks=Marks(
            architectures=("DiffusionGemmaForBlockDiffusion", "DiffusionGemma*"), model_types=("diffusion_gemma",)
        ),
        reason="it has no mask token: all tokens of a canvas change in every step, fed by the last step's distribution; its "
        "layers (window attention, experts beside a dense MLP, values without a projection) are other ones throughout",
    ),
    KnownFamily(
        name="bert-chat",
        title="BERT-Chat base and large",
        marks=Marks(architectures=("ModernBertForMaskedLM",), model_types=("modernbert",)),
        reason="its layers are ModernBERT's, some of which attend to a window only",
    ),
    KnownFamily(
        name="plaid",
        title="Plaid-1B",
        marks=Marks(files=("embedding_matrix.pt", "noise_schedule.pt")),
        reason="it diffuses embeddings, not tokens: every position changes in every step, and no row is ever decided",
    ),
    KnownFamily(
        name="mercury",
        title="Mercury, Mercury 2, Mercury Edit 2",
        marks=Marks(),
        reason="it is closed: an API gives neither weights nor logits nor steps, so that it can only be compared with",
    ),
)

"""Stock Llama and Qwen layers that attend by blocks: SDAR and TraDo, DreamReasoner, Stable-DiffCoder, Fast-dLLM v2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from dllm_export.graphs.families.family import Marks, SamplerDefaults, Source
from dllm_export.graphs.families.huggingface import HuggingFaceLayout
from dllm_export.graphs.families.special_tokens import ReleasedTokens

QWEN3_TOKENS = ReleasedTokens(title="SDAR", vocab=151936, mask=151669, eos=151643, pad=151643, texts=("<|MASK|>",))


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


def by_confidence(block: int) -> SamplerDefaults:
    """The loop that most of these families share."""
    return SamplerDefaults(gen_length=256, block_length=block, transfer="dynamic")


SDAR = HuggingFaceLayout(
    family="sdar", sampler=by_confidence(4), released=QWEN3_TOKENS, block=4, end_of_turn="<|im_end|>"
).make_family(
    "SDAR 1.7B to 8B, TraDo",
    Marks(architectures=("SDARForCausalLM",), model_types=("sdar",)),
    sizes=("4.41 B", "8.19 B"),
    limits="releases with longer blocks say so in their names only: give --block-length",
)
DREAM_REASONER = HuggingFaceLayout(
    family="dream-reasoner",
    sampler=by_confidence(32),
    released=replace(QWEN3_TOKENS, title="DreamReasoner", texts=("<|mask|>", "<|MASK|>")),
    block=32,
    end_of_turn="<|im_end|>",
).make_family(
    "DreamReasoner-8B",
    Marks(architectures=("DreamForCausalLM",), model_types=("Dream",), confirm=has_query_norms),
    sizes=("8.19 B",),
)
STABLE_DIFFCODER = HuggingFaceLayout(
    family="stable-diffcoder",
    sampler=by_confidence(4),
    released=ReleasedTokens(
        title="Stable-DiffCoder", vocab=155136, mask=5, eos=2, pad=1, texts=("<[MASK_TOKEN]>", "<[MASK]>")
    ),
    block=4,
).make_family(
    "Stable-DiffCoder-8B",
    Marks(
        architectures=("StableDiffcoderForCausalLM", "StableDiff[cC]oder*", "LlamaForCausalLM"),
        model_types=("llama",),
        confirm=names_diffcoder,
    ),
    sizes=("8.25 B",),
)
FAST_DLLM_V2 = HuggingFaceLayout(
    family="fast-dllm-v2",
    sampler=SamplerDefaults(gen_length=256, block_length=32, transfer="sub-blocks"),
    released=ReleasedTokens(
        title="Fast-dLLM v2", vocab=151936, mask=151665, eos=151645, pad=151643, texts=("|<MASK>|",)
    ),
    block=32,
    block_key="bd_size",
    end_of_turn="<|im_end|>",
    shift=True,
).make_family(
    "Fast-dLLM v2 1.5B and 7B",
    Marks(
        architectures=("Fast_dLLM_QwenForCausalLM", "Fast_dLLM*", "Qwen2ForCausalLM"),
        model_types=("Fast_dLLM_Qwen", "qwen2"),
        confirm=has_block_length,
    ),
    sizes=("1.54 B", "7.62 B"),
    limits="its cache within a block is a flag: `--policy block --sub-block-cache 8`",
)

"""Stock Llama and Qwen layers that attend by blocks: SDAR and TraDo, DreamReasoner, Stable-DiffCoder, Fast-dLLM v2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from dllm_export.graphs.families.family import Family, Marks, SamplerDefaults, Source
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


def make_family(
    name: str,
    title: str,
    marks: Marks,
    released: ReleasedTokens,
    *,
    block: int,
    end_of_turn: str | None,
    sizes: tuple[str, ...],
    limits: str = "",
    transfer: str = "dynamic",
    shift: bool = False,
    block_key: str = "block_size",
) -> Family:
    """A family of this layout whose blocks have `block` rows where its configuration does not say."""
    layout = HuggingFaceLayout(
        family=name,
        sampler=SamplerDefaults(gen_length=256, block_length=block, transfer=transfer),
        released=released,
        end_of_turn=end_of_turn,
        block=block,
        block_key=block_key,
        shift=shift,
    )
    return Family(
        name=name,
        title=title,
        marks=marks,
        read_config=layout.read_config,
        sizes=sizes,
        layout=layout.title,
        sampler=layout.sampler,
        by_blocks=True,
        limits=limits,
    )


SDAR = make_family(
    "sdar",
    "SDAR 1.7B to 8B, TraDo",
    Marks(architectures=("SDARForCausalLM",), model_types=("sdar",)),
    QWEN3_TOKENS,
    block=4,
    end_of_turn="<|im_end|>",
    sizes=("4.41 B", "8.19 B"),
    limits="releases with longer blocks say so in their names only: give --block-length",
)
DREAM_REASONER = make_family(
    "dream-reasoner",
    "DreamReasoner-8B",
    Marks(architectures=("DreamForCausalLM",), model_types=("Dream",), confirm=has_query_norms),
    replace(QWEN3_TOKENS, title="DreamReasoner", texts=("<|mask|>", "<|MASK|>")),
    block=32,
    end_of_turn="<|im_end|>",
    sizes=("8.19 B",),
)
STABLE_DIFFCODER = make_family(
    "stable-diffcoder",
    "Stable-DiffCoder-8B",
    Marks(
        architectures=("StableDiffcoderForCausalLM", "StableDiff[cC]oder*", "LlamaForCausalLM"),
        model_types=("llama",),
        confirm=names_diffcoder,
    ),
    ReleasedTokens(title="Stable-DiffCoder", vocab=155136, mask=5, eos=2, pad=1, texts=("<[MASK_TOKEN]>", "<[MASK]>")),
    block=4,
    end_of_turn=None,
    sizes=("8.25 B",),
)
FAST_DLLM_V2 = make_family(
    "fast-dllm-v2",
    "Fast-dLLM v2 1.5B and 7B",
    Marks(
        architectures=("Fast_dLLM_QwenForCausalLM", "Fast_dLLM*", "Qwen2ForCausalLM"),
        model_types=("Fast_dLLM_Qwen", "qwen2"),
        confirm=has_block_length,
    ),
    ReleasedTokens(title="Fast-dLLM v2", vocab=151936, mask=151665, eos=151645, pad=151643, texts=("|<MASK>|",)),
    block=32,
    block_key="bd_size",
    end_of_turn="<|im_end|>",
    sizes=("1.54 B", "7.62 B"),
    transfer="sub-blocks",
    shift=True,
    limits="its cache of parts within a block is not here: a step runs the whole block",
)

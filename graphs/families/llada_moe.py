"""LLaDA-MoE-7B-A1B Base and Instruct: LLaDA's diffusion in the layout of Qwen3, eight of 64 experts a token."""

from __future__ import annotations

from collections.abc import Mapping

from dllm_export.graphs.families.expert_keys import Settings, count_dense_layers, read_counts, refuse_settings
from dllm_export.graphs.families.family import Family, Marks, SamplerDefaults, Source, read_size
from dllm_export.graphs.families.huggingface import MOE_NAMES, HuggingFaceLayout
from dllm_export.graphs.families.special_tokens import ReleasedTokens
from dllm_export.graphs.shape import Experts

SETTINGS: Settings = (
    ("moe_router_enable_expert_bias", (None, False), "a bias on the experts' scores, which no release has"),
    ("shared_expert_intermediate_size", (None, 0), "a shared expert, which no release has"),
    ("clip_qkv", (None,), "clipped queries, keys and values, which no release has"),
)


def confirm_experts(source: Source) -> bool:
    """It shares its model type with LLaDA, and has experts."""
    return source.architecture.startswith("LLaDAMoE") or "num_experts" in source.config


def read_experts(raw: Mapping[str, object]) -> Experts:
    """A softmax over all experts whose best are taken as they are: norm_topk_prob is ignored, as in the published code."""
    refuse_settings(raw, SETTINGS)
    count, per_token = read_counts(raw)
    return Experts(
        count=count,
        per_token=per_token,
        mlp=read_size(raw, "expert_intermediate_size"),
        dense_layers=count_dense_layers(raw, "moe_layer_freq"),
    )


LAYOUT = HuggingFaceLayout(
    family="llada-moe",
    sampler=SamplerDefaults(gen_length=128, block_length=32),
    released=ReleasedTokens(title="LLaDA-MoE", vocab=157184, mask=156895, eos=156892, pad=156892, texts=("<|mask|>",)),
    end_of_turn="<|role_end|>",
    rope_theta=50000.0,
    names=MOE_NAMES,
    read_experts=read_experts,
    mlp_key="dense_intermediate_size",
)
LLADA_MOE = Family(
    name="llada-moe",
    title="LLaDA-MoE-7B-A1B Base/Instruct",
    marks=Marks(
        architectures=("LLaDAMoEModelLM", "LLaDAMoE*"), model_types=("llada", "lladamoe"), confirm=confirm_experts
    ),
    read_config=LAYOUT.read_config,
    sizes=("7.36 B",),
    layout=LAYOUT.title,
    sampler=LAYOUT.sampler,
)

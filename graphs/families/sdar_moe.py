"""SDAR-30B-A3B: Qwen3-MoE's layers, eight of 128 experts a token with shares that sum to 1.

It attends by blocks, whose length the configuration may leave out.
"""

from __future__ import annotations

from collections.abc import Mapping

from dllm_export.graphs.families.expert_keys import Settings, read_counts, refuse_settings
from dllm_export.graphs.families.family import Marks, SamplerDefaults, read, read_size
from dllm_export.graphs.families.huggingface import MOE_NAMES, HuggingFaceLayout
from dllm_export.graphs.families.special_tokens import ReleasedTokens
from dllm_export.graphs.shape import Experts

SETTINGS: Settings = (
    ("mlp_only_layers", (None, []), "layers without experts among the others are not supported"),
    ("decoder_sparse_step", (None, 1), "layers without experts among the others are not supported"),
)


def read_experts(raw: Mapping[str, object]) -> Experts:
    """A softmax over all experts; norm_topk_prob is true in the release and false where the key is missing."""
    refuse_settings(raw, SETTINGS)
    count, per_token = read_counts(raw)
    return Experts(
        count=count,
        per_token=per_token,
        mlp=read_size(raw, "moe_intermediate_size"),
        renormalise=read(raw, "norm_topk_prob", bool, False),
    )


LAYOUT = HuggingFaceLayout(
    family="sdar-moe",
    sampler=SamplerDefaults(gen_length=256, block_length=4, transfer="dynamic"),
    released=ReleasedTokens(title="SDAR", vocab=151936, mask=151669, eos=151643, pad=151643, texts=("<|MASK|>",)),
    end_of_turn="<|im_end|>",
    names=MOE_NAMES,
    read_experts=read_experts,
    block=4,
)
SDAR_MOE = LAYOUT.make_family(
    "SDAR-30B-A3B",
    Marks(architectures=("SDARMoeForCausalLM", "SDARMoe*"), model_types=("sdar_moe",)),
    sizes=("30.53 B",),
)

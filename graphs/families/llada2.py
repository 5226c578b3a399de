"""LLaDA2.0 and 2.1, mini and flash: sigmoid routers with groups and a shared expert, heads that rotate by half.

It attends by blocks, whose length the configuration may leave out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from dllm_export.errors import CheckpointError
from dllm_export.graphs.families.expert_keys import Settings, read_counts, refuse_settings
from dllm_export.graphs.families.family import (
    MLP_SLOTS,
    Family,
    Marks,
    ModelConfig,
    SamplerDefaults,
    Source,
    TensorNames,
    read,
    read_size,
)
from dllm_export.graphs.families.huggingface import EXPERT, HuggingFaceLayout
from dllm_export.graphs.families.special_tokens import ReleasedTokens
from dllm_export.graphs.shape import Experts

SLOTS = {
    "norm1": "input_layernorm.weight",
    "qkv": "attention.query_key_value.weight",
    "q_norm": "attention.query_layernorm.weight",
    "k_norm": "attention.key_layernorm.weight",
    "out": "attention.dense.weight",
    "norm2": "post_attention_layernorm.weight",
    "router": "mlp.gate.weight",
    "router_bias": "mlp.gate.expert_bias",
    **{slot: f"mlp.{slot}_proj.weight" for slot in MLP_SLOTS},
    **{f"shared_{slot}": f"mlp.shared_experts.{slot}_proj.weight" for slot in MLP_SLOTS},
}
NAMES = TensorNames(
    embedding="model.word_embeddings.weight",
    norm="model.norm.weight",
    head="lm_head.weight",
    layer={slot: f"model.layers.{{layer}}.{name}" for slot, name in SLOTS.items()},
    expert=EXPERT,
)
SETTINGS: Settings = (
    ("score_function", (None, "sigmoid"), "expected 'sigmoid'"),
    ("use_bias", (False,), "biases are not supported, and the class has them where the key is missing"),
    ("use_qkv_bias", (None, False), "biases are not supported"),
    ("norm_head", (None, False), "a normed head is not supported"),
)


def read_experts(raw: Mapping[str, object]) -> Experts:
    """Sigmoid scores; a bias, and groups of experts, take part in the choice alone."""
    refuse_settings(raw, SETTINGS)
    count, per_token = read_counts(raw)
    groups, kept = read_size(raw, "n_group", 8), read_size(raw, "topk_group", 4)
    width = read_size(raw, "moe_intermediate_size")
    if count % groups or count // groups < 2 or kept > groups or per_token > kept * (count // groups):
        raise CheckpointError(
            f"config.json: num_experts {count}, n_group {groups}, topk_group {kept}, num_experts_per_tok {per_token} do not "
            f"fit: groups have the same size of at least 2, and those that are kept must hold the experts of a token"
        )
    return Experts(
        count=count,
        per_token=per_token,
        mlp=width,
        router="sigmoid",
        renormalise=read(raw, "norm_topk_prob", bool, True),
        scale=read(raw, "routed_scaling_factor", float, 2.5),
        bias=read(raw, "moe_router_enable_expert_bias", bool, True),
        groups=groups,
        groups_kept=kept,
        shared=width * read(raw, "num_shared_experts", int, 0),
        dense_layers=read(raw, "first_k_dense_replace", int, 0),
    )


LAYOUT = HuggingFaceLayout(
    family="llada2",
    sampler=SamplerDefaults(gen_length=2048, block_length=32, transfer="dynamic"),
    released=ReleasedTokens(title="LLaDA2", vocab=157184, mask=156895, eos=156892, pad=156892, texts=("<|mask|>",)),
    end_of_turn="<|role_end|>",
    names=NAMES,
    read_experts=read_experts,
    block=32,
    rotates_in_part=True,
)
EDITING = "llada21_moe"
"""Model type of checkpoints that say they are LLaDA2.1, which was trained to replace decided tokens."""


def read_config(source: Source) -> ModelConfig:
    """config.json -> ModelConfig. A 2.1 that calls itself a LLaDA2 like the others gets their rule."""
    config = LAYOUT.read_config(source)
    if source.model_type != EDITING:
        return config
    return replace(config, sampler=replace(config.sampler, transfer="token-editing"))


LLADA2 = Family(
    name="llada2",
    title="LLaDA2.0/2.1 mini and flash",
    marks=Marks(
        architectures=("LLaDA2MoeModelLM", "LLaDA2Moe*"),
        model_types=("llada2_moe", EDITING, "llada2_moe_veomni"),
    ),
    read_config=read_config,
    sizes=("16.26 B", "102.89 B"),
    layout="LLaDA2",
    sampler=LAYOUT.sampler,
    by_blocks=True,
    limits="a 2.1 whose config.json is not of type llada21_moe needs `--transfer token-editing`; not 2.2, which also inserts",
)

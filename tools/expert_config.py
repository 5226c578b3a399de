"""What the configuration file of a family with experts says about them, for seeded checkpoints."""

from __future__ import annotations

from dllm_export.graphs import Experts, ModelShape


def expert_config(family: str, shape: ModelShape) -> dict[str, object]:
    """Keys of config.json in the family's spelling; none for a shape without experts."""
    experts = shape.experts
    if experts is None:
        return {}
    counts = {"num_experts": experts.count, "num_experts_per_tok": experts.per_token}
    return counts | {"llada-moe": llada_moe, "llada2": llada2, "sdar-moe": sdar_moe}[family](shape, experts)


def llada_moe(shape: ModelShape, experts: Experts) -> dict[str, object]:
    marks = [int(shape.has_experts(layer)) for layer in range(shape.layers)]
    return {
        "dense_intermediate_size": shape.mlp,
        "expert_intermediate_size": experts.mlp,
        "moe_layer_freq": marks,
        "norm_topk_prob": None,
        "partial_rotary_factor": 1,
        "qk_layernorm": shape.qk_norm,
        "shared_expert_intermediate_size": None,
    }


def llada2(shape: ModelShape, experts: Experts) -> dict[str, object]:
    return {
        "first_k_dense_replace": experts.dense_layers,
        "moe_intermediate_size": experts.mlp,
        "moe_router_enable_expert_bias": experts.bias,
        "n_group": experts.groups,
        "norm_topk_prob": experts.renormalise,
        "num_shared_experts": experts.shared // experts.mlp,
        "partial_rotary_factor": shape.rope_fraction,
        "routed_scaling_factor": experts.scale,
        "router_dtype": "fp32",
        "score_function": experts.router,
        "topk_group": experts.groups_kept,
        "use_bias": False,
        "use_qkv_bias": False,
    }


def sdar_moe(shape: ModelShape, experts: Experts) -> dict[str, object]:
    return {
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": experts.mlp,
        "norm_topk_prob": experts.renormalise,
    }

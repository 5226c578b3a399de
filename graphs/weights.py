"""The weights of a layer and of the head: names, types and dims as a bundle stores them."""

from __future__ import annotations

from dllm_export.graphs.shape import ModelShape
from dllm_export.graphs.spec import TensorSpec

COUNTED = ("router", "router_bias", "latents")
"""Weights in float32 whatever the compute type is: scores of two experts may differ by less than it can tell, and a sampler in
float64 goes by the vectors."""


def layer_weights(shape: ModelShape, layer: int = -1) -> tuple[TensorSpec, ...]:
    """Weights of one layer as stored, the last where none is named: [in, out], query|key fused, gate|up fused, value apart.

    Experts are [E, out, in], as a checkpoint has them (docs/decisions.md).
    """
    d, kv, both = shape.hidden, shape.key_width, shape.query_width + shape.key_width
    mlp = mlp_weights(shape, with_experts=shape.has_experts(layer % shape.layers))
    up, width = mlp[0].name, mlp[0].dims[-1]
    biases = {
        **({"qk": both, "v": kv} if shape.qkv_bias else {}),
        **({"norm1": d, "norm2": d} if shape.norm == "layer" and not shape.conditioning else {}),
        **({up: int(width), "down": d} if shape.mlp_bias else {}),
    }
    modulation = {f"{name}_modulation": 2 * d for name in ("norm1", "norm2")} | {"gate1": d, "gate2": d}
    if not shape.conditioning:
        modulation = {}
    sizes: dict[str, tuple[int, ...]] = {
        "norm1": (d,),
        "qk": (d, both),
        "v": (d, kv),
        "out": (shape.query_width, d),
        "norm2": (d,),
        **{weight.name: tuple(map(int, weight.dims)) for weight in mlp},
        **{name: (shape.conditioning, size) for name, size in modulation.items()},
        **{f"{name}_bias": (size,) for name, size in (biases | modulation).items()},
        **({"q_norm": (shape.head_dim,), "k_norm": (shape.head_dim,)} if shape.qk_norm else {}),
    }
    return tuple(TensorSpec(name, "float32" if name in COUNTED else "compute", dims) for name, dims in sizes.items())


def head_weights(shape: ModelShape) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Weights of the last norm, and those of the head."""
    norm = [TensorSpec("norm", "compute", (shape.hidden,))]
    if shape.norm == "layer" and not shape.conditioning:
        norm.append(TensorSpec("norm_bias", "compute", (shape.hidden,)))
    if shape.conditioning:
        norm.append(TensorSpec("norm_modulation", "compute", (shape.conditioning, 2 * shape.hidden)))
        norm.append(TensorSpec("norm_modulation_bias", "compute", (2 * shape.hidden,)))
    head = [
        TensorSpec("embedding", "compute", (shape.vocab, shape.hidden))
        if shape.tied_head
        else TensorSpec("head", "compute", (shape.hidden, shape.vocab))
    ]
    if shape.head_bias:
        head.append(TensorSpec("head_bias", "compute", (shape.vocab,)))
    return tuple(norm), tuple(head)


def mlp_weights(shape: ModelShape, *, with_experts: bool) -> tuple[TensorSpec, ...]:
    """Those of a layer's MLP, biases aside: the first makes the inner row. Rows of an expert's gate and up take turns."""
    d, experts = shape.hidden, shape.experts
    if experts is None or not with_experts:
        up, width = ("gate_up", 2 * shape.mlp) if shape.mlp_kind == "swiglu" else ("up", shape.mlp)
        return TensorSpec(up, "compute", (d, width)), TensorSpec("down", "compute", (shape.mlp, d))
    weights = [
        TensorSpec("router", "float32", (d, experts.count)),
        TensorSpec("expert_gate_up", "compute", (experts.count, 2 * experts.mlp, d)),
        TensorSpec("expert_down", "compute", (experts.count, d, experts.mlp)),
    ]
    if experts.bias:
        weights.append(TensorSpec("router_bias", "float32", (experts.count,)))
    if experts.shared:
        weights.append(TensorSpec("shared_gate_up", "compute", (d, 2 * experts.shared)))
        weights.append(TensorSpec("shared_down", "compute", (experts.shared, d)))
    return tuple(weights)

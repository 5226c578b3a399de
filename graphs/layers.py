"""The few functions that all graphs share. Every one is pure and works on any `Ops`.

Sources: the dense layer, RMSNorm order and RoPE pairing follow the published LLaDA modelling code; the row rules follow
dLLM-Cache (arXiv 2506.06295), reduced to post-RoPE keys, values and one delta per row.
"""

from __future__ import annotations

from collections.abc import Mapping

from dllm_export.graphs.experts import choose_experts
from dllm_export.graphs.ops import Ops, T
from dllm_export.graphs.shape import ModelShape


def normalize(ops: Ops[T], shape: ModelShape, x: T, weights: Mapping[str, T], name: str) -> T:  # [..., D] -> [..., D]
    """RMSNorm or LayerNorm `name`: statistics in float32, back to the compute type, then the weight and the bias."""
    with ops.scope("norm"):
        wide = ops.widen(x)
        if shape.norm == "layer":
            wide = ops.sub(wide, ops.mean(wide))
        wide = ops.mul(wide, ops.rsqrt(ops.mean(ops.mul(wide, wide)), shape.norm_eps))
    scaled = add_bias(ops, ops.mul(ops.narrow(wide, x), weights[name]), weights, name)
    if f"{name}_modulation" not in weights:
        return scaled
    shift, scale = ops.split(condition(ops, weights, f"{name}_modulation"), (shape.hidden, shape.hidden))
    return ops.add(ops.add(scaled, ops.mul(scaled, scale)), shift)


def condition(ops: Ops[T], weights: Mapping[str, T], name: str) -> T:  # -> [B, 1, out]
    """A linear map of what the time conditions a sequence by."""
    return ops.unsqueeze(project(ops, weights["condition"], weights, name), 1)


def pass_gate(ops: Ops[T], x: T, weights: Mapping[str, T], name: str) -> T:  # [B, N, D] -> [B, N, D]
    """A branch's rows times what the time lets through, where it gates them."""
    return ops.mul(x, condition(ops, weights, name)) if name in weights else x


def add_bias(ops: Ops[T], x: T, weights: Mapping[str, T], name: str) -> T:
    """x and the bias of the weight `name`, where it has one."""
    return ops.add(x, weights[f"{name}_bias"]) if f"{name}_bias" in weights else x


def project(
    ops: Ops[T], x: T, weights: Mapping[str, T], name: str, *, apart: bool = False
) -> T:  # [B, N, in] -> [B, N, out]
    """x times the matrix `name`, and its bias where it has one; `apart` as of `Ops.matmul`."""
    return add_bias(ops, ops.matmul(x, weights[name], apart=apart), weights, name)


def rotate(ops: Ops[T], shape: ModelShape, x: T, cos: T, sin: T) -> T:  # [B, N, heads, d], cos/sin [B, N, r/2]
    """Rotary embedding, rotate-half pairing: dimension j turns with j + r/2, of the first r dimensions that turn."""
    with ops.scope("rope"):
        wide = ops.widen(x) if shape.rope_float32 else x
        half, rest = shape.rotary_width // 2, shape.head_dim - shape.rotary_width
        cos, sin = ops.narrow(cos, wide), ops.narrow(sin, wide)
        turned = ops.rotary(wide, cos, sin, (half, half, rest) if rest else (half, half))
    return ops.narrow(turned, x)


def project_value(ops: Ops[T], x: T, weights: Mapping[str, T]) -> T:  # normed [B, N, D] -> [B, N, G*d]
    return project(ops, x, weights, "v", apart=True)  # and not with "qk" of the same rows


def project_query_key(
    ops: Ops[T], shape: ModelShape, x: T, cos: T, sin: T, weights: Mapping[str, T]
) -> tuple[T, T]:  # normed [B, N, D] -> query [B, N, H, d], key [B, N, G*d], both rotated
    query, key = ops.split(project(ops, x, weights, "qk"), (shape.query_width, shape.key_width))
    query = ops.split_heads(query, shape.heads, shape.head_dim)
    key = ops.split_heads(key, shape.kv_heads, shape.head_dim)
    if "q_norm" in weights:
        query = normalize(ops, shape, query, weights, "q_norm")
    if "k_norm" in weights:
        key = normalize(ops, shape, key, weights, "k_norm")
    return rotate(ops, shape, query, cos, sin), ops.merge_heads(rotate(ops, shape, key, cos, sin))


def find_visible(ops: Ops[T], t: Mapping[str, T], *, all_rows: bool = False) -> T:
    """The `mask` [B, S] of keys; in a model that attends by blocks [B, Q, S], for each row those up to the end of its block.

    `block` [B, S] numbers the blocks, and `index` [B, Q] holds the rows' positions, where they are not all.
    """
    if "block" not in t:
        return t["mask"]
    own = t["block"] if all_rows else ops.take_rows(t["block"], t["index"])
    reached = ops.at_most(ops.unsqueeze(t["block"], 1), ops.unsqueeze(own, 2))
    return ops.both(ops.unsqueeze(t["mask"], 1), reached)


def finish_rows(
    ops: Ops[T], shape: ModelShape, hidden: T, query: T, key: T, value: T, mask: T, weights: Mapping[str, T]
) -> T:
    """Attention of the query rows over all keys, then the MLP on the same rows; returns their delta [B, Q, D].

    hidden [B, Q, D] enters the layer; delta = attention output + MLP output, so the layer's result is hidden + delta.
    """
    key = ops.split_heads(key, shape.kv_heads, shape.head_dim)
    value = ops.split_heads(value, shape.kv_heads, shape.head_dim)
    with ops.scope("attention"):
        mixed = ops.merge_heads(ops.attention(query, key, value, mask))
    attended = pass_gate(ops, ops.matmul(mixed, weights["out"]), weights, "gate1")
    inner = normalize(ops, shape, ops.add(hidden, attended), weights, "norm2")
    return ops.add(attended, pass_gate(ops, run_mlp(ops, shape, inner, weights), weights, "gate2"))


def run_mlp(ops: Ops[T], shape: ModelShape, x: T, weights: Mapping[str, T]) -> T:  # normed [B, N, D] -> [B, N, D]
    """The layer's own kind: a mixture of experts where it has a router, with a shared one or without."""
    if shape.experts is not None and "router" in weights:
        chosen, share = choose_experts(ops, shape.experts, x, weights)
        mixed = ops.experts(shape.experts, x, chosen, share, weights["expert_gate_up"], weights["expert_down"])
        shared = shape.experts.shared
        return ops.add(mixed, run_swiglu(ops, x, weights, shared, "shared_")) if shared else mixed
    if shape.mlp_kind == "gelu":
        return project(ops, ops.gelu(project(ops, x, weights, "up")), weights, "down")
    return run_swiglu(ops, x, weights, shape.mlp)


def run_swiglu(ops: Ops[T], x: T, weights: Mapping[str, T], width: int, prefix: str = "") -> T:
    gate, up = ops.split(project(ops, x, weights, f"{prefix}gate_up"), (width, width))
    return project(ops, ops.mul(ops.silu(gate), up), weights, f"{prefix}down")


def hand_over(t: Mapping[str, T], first: Mapping[str, T]) -> dict[str, T]:
    """Tensors of a second stage: what the first one put out, under the names of inputs, and what it was given."""
    return {**t, **{name.removesuffix("_out"): value for name, value in first.items()}}

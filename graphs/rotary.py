"""Rotary embedding from the operations that every provider has."""

from __future__ import annotations

from dllm_export.graphs.ops import Ops, T


def rotate_halves(ops: Ops[T], x: T, cos: T, sin: T, widths: tuple[int, ...]) -> T:
    """`Ops.rotary`: each pair (low, high) turned by its angle, what stays behind them."""
    cos, sin = ops.unsqueeze(cos, 2), ops.unsqueeze(sin, 2)
    low, high, *still = ops.split(x, widths)
    turned = (
        ops.sub(ops.mul(low, cos), ops.mul(high, sin)),
        ops.add(ops.mul(high, cos), ops.mul(low, sin)),
    )
    return ops.concat((*turned, *still))

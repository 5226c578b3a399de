"""A draw from weights of all tokens, inside a graph: two uniform numbers a row come in, a token goes out.

Inverting one running sum over a whole vocabulary would be as fine as its float32 total, too coarse for rare tokens. So the
first number picks a group of neighbouring tokens and the second a token of the group, each from a short running sum.
"""

from __future__ import annotations

from dllm_export.graphs.ops import Ops, T


def group_width(count: int) -> int:
    """Tokens in a group: the power of two next above the root of their number, so that there are about as many groups."""
    return 1 << (max(count - 1, 1).bit_length() + 1) // 2


def draw_token(ops: Ops[T], weights: T, count: int, uniform: T) -> T:  # [B, Q, V], V, [B, Q, 2] -> [B, Q] int32
    """A token with a probability proportional to its weight; one of weight 0 is never drawn. Uniform numbers lie in [0, 1)."""
    width = group_width(count)
    groups = -(-count // width)
    if groups * width > count:
        nothing = ops.scale(ops.piece(weights, 0, groups * width - count), 0.0)
        weights = ops.concat((weights, nothing))
    totals = ops.sum(ops.split_heads(weights, groups, width), keep=False)
    group = draw_place(ops, totals, groups, ops.column(uniform, 0))
    start = ops.scale(group, width)
    members = ops.add(ops.unsqueeze(start, 2), ops.positions(ops.piece(weights, 0, width), axis=2))
    place = draw_place(ops, ops.take_last(weights, members), width, ops.column(uniform, 1))
    return ops.add(start, place)


def draw_place(ops: Ops[T], weights: T, count: int, uniform: T) -> T:  # [B, Q, N], N, [B, Q] -> [B, Q] int32
    """The first place whose running sum exceeds `uniform` times the total.

    Running sums of places without weight count as 0, so that they are never reached, whatever the last bit of a sum is.
    """
    nothing = ops.fill(weights, 0.0)
    reached = ops.where(ops.exceeds(weights, nothing), running_sum(ops, weights, count), nothing)
    target = ops.mul(ops.max(reached, keep=True), ops.unsqueeze(uniform, 2))
    return ops.argmax_last(ops.exceeds(reached, target))


def running_sum(ops: Ops[T], x: T, count: int) -> T:  # [..., N] -> [..., N]
    """Sums up to and including each place, by doubling: the same additions in the same order on every provider."""
    shift = 1
    while shift < count:
        nothing = ops.scale(ops.piece(x, 0, shift), 0.0)
        x = ops.add(x, ops.concat((nothing, ops.piece(x, 0, count - shift))))
        shift *= 2
    return x

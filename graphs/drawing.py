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
        weights = lengthen(ops, weights, groups * width - count)
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
    return find_first(ops, ops.exceeds(reached, target), count)


def find_first(ops: Ops[T], found: T, count: int) -> T:  # bool [B, Q, N], N -> [B, Q] int32
    """The first place that is true, 0 where none is: a maximum, which compilers fuse, of numbers that fall."""
    places = ops.positions(found, axis=2)
    size, none = ops.fill(places, count), ops.fill(places, 0)
    left = ops.max(ops.where(found, ops.sub(size, places), none), keep=False)
    return ops.where(ops.exceeds(left, none), ops.sub(size, left), none)


def running_sum(ops: Ops[T], x: T, count: int) -> T:  # [B, Q, N], N -> [B, Q, N]
    """Sums up to and including each place: those of a tile of neighbours, and of the tiles before it.

    Each is a plain sum of numbers of which those behind are left out: that is one kernel, where doubling takes many.
    """
    width = group_width(count)
    tiles = -(-count // width)
    padded = lengthen(ops, x, tiles * width - count) if tiles * width > count else x
    split = ops.split_heads(padded, tiles, width)
    places, order = ops.positions(split, axis=3), ops.positions(split, axis=2)
    within = sum_counted(ops, split, ops.at_most(ops.unsqueeze(places, 0), ops.unsqueeze(places, 1)))
    before = ops.exceeds(ops.unsqueeze(order, 1), ops.unsqueeze(order, 0))
    before = sum_counted(ops, ops.column(within, width - 1), before)
    sums = ops.merge_heads(ops.add(within, ops.unsqueeze(before, 3)))
    return ops.piece(sums, 0, count) if tiles * width > count else sums


def sum_counted(ops: Ops[T], x: T, counted: T) -> T:  # [..., N], bool [N, N] -> [..., N]
    """For each place, a row of `counted`, the sum of the places that count for it."""
    return ops.sum(ops.mul(ops.unsqueeze(x, -2), ops.narrow(counted, x)), keep=False)


def lengthen(ops: Ops[T], x: T, by: int) -> T:  # [B, Q, N], at most N -> [B, Q, N + by]
    """x with zeros behind it."""
    return ops.concat((x, ops.scale(ops.piece(x, 0, by), 0.0)))

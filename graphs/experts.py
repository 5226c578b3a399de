"""Mixture of experts: which experts a row goes to and with what weight, and the rows' products in tiles of one expert each.

The routers follow Qwen3-MoE (softmax, renormalised), LLaDA-MoE (softmax) and LLaDA2 (sigmoid, groups, a bias that only
selects). The tiles are a grouped product of operators and sizes that every provider accepts; docs/graphs.md has their cost.
"""

from __future__ import annotations

from collections.abc import Mapping

from dllm_export.graphs.ops import Ops, T
from dllm_export.graphs.shape import Experts

TILE = 256
"""Most rows of a tile. An expert with more rows has further tiles, each with a copy of its weights."""

NEVER = -1e30
"""A score below all others: of experts in a group that is out."""


def choose_experts(ops: Ops[T], experts: Experts, x: T, weights: Mapping[str, T]) -> tuple[T, T]:
    """(experts int32, their shares float32), both [B, N, k], of normed rows x [B, N, D]; ties go to the lower expert."""
    with ops.scope("router"):
        logits = ops.matmul(ops.widen(x), weights["router"])
        score = ops.softmax(logits) if experts.router == "softmax" else ops.sigmoid(logits)
        rank = ops.add(score, weights["router_bias"]) if experts.bias else score
        if experts.groups > 1:
            rank = keep_groups(ops, experts, rank)
        share, chosen = ops.top(rank, experts.per_token)
        if experts.bias:  # it decides who is chosen, not how much the chosen count
            share = pick_columns(ops, chosen, ops.count_up(experts.count, score), ops.unsqueeze(score, 2))
        if experts.renormalise:
            share = ops.div(share, ops.add(ops.sum(share, keep=True), ops.fill(share, 1e-20)))
        return chosen, share if experts.scale == 1.0 else ops.scale(share, experts.scale)


def keep_groups(ops: Ops[T], experts: Experts, rank: T) -> T:  # [B, N, E] -> [B, N, E]
    """Scores of the experts in the groups that are kept, NEVER in the others; a group counts as much as its best two."""
    grouped = ops.split_heads(rank, experts.groups, experts.count // experts.groups)
    best, _ = ops.top(grouped, 2)
    _, kept = ops.top(ops.sum(best, keep=False), experts.groups_kept)
    inside = ops.any_last(ops.matches(ops.unsqueeze(kept, 2), ops.unsqueeze(ops.count_up(experts.groups, rank), 1)))
    return ops.merge_heads(ops.where(ops.unsqueeze(inside, 3), grouped, ops.fill(grouped, NEVER)))


def pick_columns(ops: Ops[T], index: T, names: T, values: T) -> T:  # index [..., k], names [E], values [..., 1, E]
    """values[..., index], exactly: a sum of that number and zeros."""
    hits = ops.matches(ops.unsqueeze(index, -1), names)
    return ops.sum(ops.where(hits, values, ops.fill(values, 0.0)), keep=False)


def run_experts(ops: Ops[T], experts: Experts, x: T, chosen: T, share: T, gate_up: T, down: T, tile: int = TILE) -> T:
    """What `Ops.experts` gives, as products of tiles.

    Every expert has one tile of C = min(rows, `tile`) rows, multiplied with its weights where they lie. An expert with more
    rows has further tiles, for which its weights are gathered. Each of those stands behind a full one, so that there are
    at most rows * k / C of them, wherever the router sends the rows. Rows find their tile, and tiles their rows, by counting:
    nothing is sorted and nothing scattered.
    """
    with ops.scope("routing"):
        rows = ops.count_rows(x)
        size = ops.smaller(rows, tile)
        spare = count_spare(ops, rows, experts.per_token, tile)
        names, one, zero = ops.count_up(experts.count, x), ops.fill(share, 1.0), ops.fill(share, 0.0)
        high = ops.narrow(size, share)

        # Per row and expert: whether the row goes there, and which place it has there, from 1.
        hits = ops.matches(ops.unsqueeze(chosen, 2), ops.unsqueeze(names, 1))
        member = ops.sum(ops.where(hits, one, zero), keep=False)  # [B, N, E]
        place = sum_so_far(ops, member, one, zero)

        # Further tiles are numbered through all experts: `first` is the number of each expert's own first one.
        by_expert, going = ops.columns(place), ops.columns(member)  # [E, R]
        more = count_full(ops, ops.relu(ops.sub(ops.max(by_expert, keep=False), one)), high)  # [E]
        more = ops.unsqueeze(more, 0)
        last = ops.matmul(more, triangle(ops, names, one, zero))
        first = ops.sub(last, more)  # [1, E]
        number = ops.unsqueeze(ops.narrow(ops.count_up(spare, x), share), 1)  # [O, 1]
        owner = ops.sum(ops.where(ops.at_most(last, number), one, zero), keep=True)
        beyond = ops.relu(ops.sub(owner, ops.fill(owner, experts.count - 1)))  # tiles that nobody needs
        owner = ops.narrow(ops.sub(owner, beyond), names)  # [O, 1]
        step = ops.add(ops.sub(number, pick_columns(ops, owner, names, ops.unsqueeze(first, 0))), one)
        owner = ops.column(owner, 0)

        # The rows of a tile are the first of its expert, or the first behind its earlier tiles.
        falling = ops.sub(ops.narrow(rows, share), ops.narrow(ops.count_up(rows, x), share))  # [R] R, R - 1, .. 1
        urgency = ops.mul(going, falling)
        _, own_rows = ops.top(urgency, size)  # [E, C]
        behind = ops.at_most(ops.lookup(by_expert, owner), ops.mul(step, high))
        _, more_rows = ops.top(ops.where(behind, zero, ops.lookup(urgency, owner)), size)  # [O, C]

        # Where each choice of each row lies: tile `ahead` of its expert, 0 the one in place.
        at = ops.sub(pick_columns(ops, chosen, names, ops.unsqueeze(place, 2)), one)  # [B, N, k]
        ahead = count_full(ops, at, high)
        inside = ops.sub(at, ops.mul(ahead, high))
        in_place = ops.at_most(ahead, zero)
        further = ops.sub(ops.add(pick_columns(ops, chosen, names, first), ahead), one)
        own_place = ops.add(ops.mul(ops.narrow(chosen, share), high), inside)
        more_place = ops.add(ops.mul(further, high), inside)
        own_place = ops.narrow(ops.where(in_place, own_place, zero), names)
        more_place = ops.narrow(ops.where(in_place, zero, more_place), names)

    copied = (ops.lookup(weight, owner) for weight in (gate_up, down))
    own = ops.take_flat(run_tiles(ops, ops.take_flat(x, own_rows), gate_up, down), own_place)
    others = ops.take_flat(run_tiles(ops, ops.take_flat(x, more_rows), *copied), more_place)
    with ops.scope("combine"):
        results = ops.widen(ops.where(ops.unsqueeze(in_place, 3), own, others))
        return ops.narrow(ops.merge_heads(ops.matmul(ops.unsqueeze(share, 2), results)), x)


def count_spare(ops: Ops[T], rows: T, choices: int, tile: int) -> T:
    """Most further tiles there can be, at least 1: as many as full ones fit, and none where no expert can fill one."""
    pairs = ops.times(rows, choices)
    most = ops.smaller(ops.divide(pairs, tile), ops.times(ops.divide(rows, tile + 1), pairs))
    return ops.at_least(most, 1)


def run_tiles(ops: Ops[T], x: T, gate_up: T, down: T) -> T:
    """SwiGLU of the rows [T, C, D] of every tile with weights [T, 2F, D] and [T, D, F].

    Weights stand on the left, as they are stored: TensorRT would copy all of them to turn them.
    """
    gate, up = ops.take_turns(ops.matmul(gate_up, ops.swap_last(x)))
    return ops.swap_last(ops.matmul(down, ops.mul(ops.silu(gate), up)))


def count_full(ops: Ops[T], number: T, size: T) -> T:
    """How many whole `size` are in a whole number; the half keeps a division that is not exact from losing one."""
    return ops.floor(ops.div(ops.add(number, ops.fill(number, 0.5)), size))


def triangle(ops: Ops[T], names: T, one: T, zero: T) -> T:  # [n] 0, 1, .. -> [n, n]
    """1 on and above the diagonal: a row of numbers times it is their running sum."""
    return ops.where(ops.at_most(ops.unsqueeze(names, 1), ops.unsqueeze(names, 0)), one, zero)


def sum_so_far(ops: Ops[T], x: T, one: T, zero: T) -> T:  # [B, N, E] -> [B, N, E]
    """Running sums through all rows of all sequences, each row itself included.

    As products with a triangle: what sorts or accumulates is limited to 3840 numbers or a loop in TensorRT.
    """
    rows = ops.positions(x)
    within = ops.matmul(ops.where(ops.at_most(ops.unsqueeze(rows, 0), ops.unsqueeze(rows, 1)), one, zero), x)
    totals = ops.sum(ops.swap_last(x), keep=False)  # [B, E]
    order = ops.positions(ops.unsqueeze(totals, 0))
    before = ops.where(ops.at_most(ops.unsqueeze(order, 1), ops.unsqueeze(order, 0)), zero, one)
    return ops.add(within, ops.unsqueeze(ops.matmul(before, totals), 1))

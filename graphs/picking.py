"""What the layers share that pick their own rows: how far rows drifted, which are picked, and what becomes of the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic

from dllm_export.graphs.layers import find_visible, finish_rows, hand_over
from dllm_export.graphs.ops import Ops, T
from dllm_export.graphs.shape import ModelShape

Stage = Callable[[Ops[T], ModelShape, Mapping[str, T]], dict[str, T]]

FORCED_DRIFT = 4.0
"""Drift is at most 2, so a row with this score is chosen before every other."""

UNCHANGED = 1e-6
"""Drift that rounding alone can cause in float32. Less counts as none, so that rows that did not change tie on every
provider and the leftmost is taken; a row that turned by 0.1 % is already above it."""


def measure_drift(ops: Ops[T], new: T, old: T) -> T:  # [B, N, D] twice -> [B, N] float32
    """max(0, 1 - cosine - UNCHANGED) of each row with its former self; a zero row has cosine 0 (dLLM-Cache's V-verify)."""
    with ops.scope("drift"):
        new, old = ops.widen(new), ops.widen(old)
        dot = ops.sum(ops.mul(new, old), keep=False)
        norms = ops.mul(ops.sum(ops.mul(new, new), keep=False), ops.sum(ops.mul(old, old), keep=False))
        cosine = ops.mul(dot, ops.rsqrt(norms, 1e-16))
        return ops.relu(ops.sub(ops.fill(cosine, 1.0 - UNCHANGED), cosine))


@dataclass(frozen=True, slots=True)
class Picked(Generic[T]):
    """Q of the X alive rows of each sequence, by falling drift."""

    row: T  # [B, Q] place among the alive rows
    position: T  # [B, Q] place in the sequence
    chosen: T  # [B, X] whether an alive row is picked
    rank: T  # [B, X] its place among the picked, 0 where it is not


def pick_rows(ops: Ops[T], drift: T, t: Mapping[str, T]) -> Picked[T]:
    """The `forced` rows first, then those of the largest drift [B, X], `budget` rows in all."""
    score = ops.where(t["forced"], ops.fill(drift, FORCED_DRIFT), drift)
    _, row = ops.top(score, t["budget"])
    places = ops.unsqueeze(ops.unsqueeze(ops.positions(drift), 0), 2)
    hit = ops.matches(ops.unsqueeze(row, 1), places)  # [B, X, Q]
    # No row is picked twice, so that one maximum says both whether a row is picked and which place it has, counted from 1.
    ranks = ops.positions(row)
    one, none = ops.fill(ranks, 1), ops.fill(ranks, 0)
    found = ops.max(ops.where(hit, ops.add(ranks, one), none), keep=False)
    chosen = ops.exceeds(found, none)
    return Picked(row, ops.take_rows(t["index"], row), chosen, ops.where(chosen, ops.sub(found, one), none))


def rotary_rows(ops: Ops[T], picked: Picked[T], t: Mapping[str, T]) -> tuple[T, T]:
    """cos and sin [B, Q, d/2] of the picked rows."""
    return ops.take_rows(t["cos"], picked.position), ops.take_rows(t["sin"], picked.position)


def put_picked(ops: Ops[T], picked: Picked[T], rows: T, t: Mapping[str, T], cache: T) -> T:
    """rows [B, Q, D] of the picked into cache [B, S, D], where they are fresh."""
    fresh = ops.both(t["fresh"], ops.take_rows(picked.chosen, t["slot"]))
    return ops.put_rows(rows, picked.position, ops.take_rows(picked.rank, t["slot"]), fresh, cache)


def list_picked(picked: Picked[T], query: T, key: T, value: T) -> dict[str, T]:
    """What the first stage of a picking layer gives: keys and values of the sequence, and the picked rows' part."""
    return {
        "query_out": query,
        "key_out": key,
        "value_out": value,
        "index_out": picked.position,
        "row_out": picked.row,
        "chosen_out": picked.chosen,
        "rank_out": picked.rank,
    }


def finish_picked(ops: Ops[T], shape: ModelShape, t: Mapping[str, T]) -> dict[str, T]:
    """Second stage: attention and MLP of the picked rows; the other alive rows advance by their cached delta."""
    rows = ops.take_rows(t["hidden"], t["row"])
    visible = find_visible(ops, t)
    new_delta = finish_rows(ops, shape, rows, t["query"], t["key"], t["value"], visible, t)
    delta = ops.put_rows(new_delta, t["row"], t["rank"], t["chosen"], t["delta"], all_fresh=True)
    return {"hidden_out": ops.add(t["hidden"], delta), "delta_out": delta}


def pick_layer(project: Stage[T], ops: Ops[T], shape: ModelShape, t: Mapping[str, T]) -> dict[str, T]:
    """Both stages of a picking layer whose first one is `project`."""
    first = project(ops, shape, t)
    return first | finish_picked(ops, shape, hand_over(t, first))

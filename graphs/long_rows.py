"""Sums of rows as long as a vocabulary, in two stages: over tiles of neighbouring places, then over the tiles.

A compiler runs one reduction over so long a row as two kernels and none beside another. Short ones it fuses with what makes
their numbers and with each other, so that a row is read once for all of them. The rounding error of a sum is smaller, too.
"""

from __future__ import annotations

from dllm_export.graphs.ops import Ops, T

TILE, LEAST_TILE = 512, 32
"""Most places of a tile, and fewest for which two stages are worth it."""


def tile_width(count: int) -> int:
    """Places of a tile: the largest power of two that divides `count`, up to `TILE`; `count` itself where tiles were small."""
    width = min(count & -count, TILE)
    return width if width >= LEAST_TILE else count


def sum_row(ops: Ops[T], x: T, count: int) -> T:  # [B, Q, V], V -> [B, Q]
    """Sum of each row."""
    width = tile_width(count)
    if width == count:
        return ops.sum(x, keep=False)
    return ops.sum(ops.sum(ops.split_heads(x, count // width, width), keep=False), keep=False)

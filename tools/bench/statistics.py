"""Samples -> figures: percentiles, spread, and ratios with the interval that resampled steps give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest

import numpy as np
from numpy.typing import NDArray

from dllm_export.tools.bench.records import RawRun, Times

RESAMPLES = 2000
UNSTEADY = 0.10
"""Spread above which a figure is not to be believed."""

ByKind = Mapping[str, Sequence[float]]
"""Seconds of steps by kind."""


def summarize(seconds: Sequence[float]) -> Times:
    """Percentiles in milliseconds, and the spread."""
    low, median, high, p90, p99 = (float(value) * 1e3 for value in np.percentile(seconds, (25, 50, 75, 90, 99)))
    return Times(
        samples=len(seconds),
        mean_ms=float(np.mean(seconds)) * 1e3,
        p50_ms=median,
        p90_ms=p90,
        p99_ms=p99,
        spread=(high - low) / median if median else 0.0,
    )


def steps_by_kind(run: RawRun) -> dict[str, list[float]]:
    """Seconds of a run's steps by kind."""
    kinds: dict[str, list[float]] = {}
    for step in run.steps:
        kinds.setdefault(step.kind, []).append(step.seconds)
    return kinds


def bootstrap_ratio(slow: ByKind, fast: ByKind, seed: int = 0, gain: float = 1.0) -> tuple[float, float, float]:
    """Total time of `slow` over that of `fast`, and its 95 % interval; `gain` times that where `fast` did more in its time.

    Steps are drawn again within their kind, so that every resample has the same mix of kinds. The interval is that of the
    noise from step to step; what hits a whole process alike is not in it.
    """
    rng = np.random.default_rng(seed)
    drawn = gain * resample_totals(slow, rng) / resample_totals(fast, rng)
    low, high = (float(value) for value in np.percentile(drawn, (2.5, 97.5)))
    return gain * sum(map(sum, slow.values())) / sum(map(sum, fast.values())), low, high


def resample_totals(kinds: ByKind, rng: np.random.Generator) -> NDArray[np.float64]:
    """Total seconds of `RESAMPLES` redrawn runs."""
    totals = np.zeros(RESAMPLES)
    for seconds in kinds.values():
        samples = np.asarray(seconds)
        totals += samples[rng.integers(0, len(samples), (RESAMPLES, len(samples)))].sum(1)
    return totals


def compare_tokens(found: RawRun, expected: RawRun) -> tuple[float, int | None]:
    """Share of equal tokens after the last step, among rows that either has decided, and the first step (1-based) after which
    the responses differ."""
    decided = sorted({row for run in (found, expected) for step in run.steps for row, _ in step.decided})
    share = float(np.mean(np.equal(np.take(found.tokens, decided), np.take(expected.tokens, decided))))
    pairs = zip_longest((set(step.decided) for step in found.steps), (set(step.decided) for step in expected.steps))
    # Responses that were equal before a step differ after it exactly if it decided different rows or tokens.
    return share, next((number for number, (ours, theirs) in enumerate(pairs, 1) if ours != theirs), None)


def count_answer(tokens: Sequence[int], ends: Sequence[int], mask: int) -> int | None:
    """Tokens before the first end of text; None where tokens before it are undecided."""
    end = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return None if mask in tokens[:end] else end

"""How the time of a step grows with the prompt, the response, the batch or the layers: pure arithmetic on samples.

A slope is that of the least-squares line through the medians. Its interval is that of medians of steps which are drawn again
at every point, 2000 times, seeded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dllm_export.tools.bench.records import Record

RESAMPLES = 2000
BENT = 1.1
"""The last slope over the one before it, above which growth counts as more than linear."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """The steps of one kind at one point."""

    value: int
    """What grows."""
    seconds: Sequence[float]
    read_bytes: float
    """Weights, and cached keys and values, that one of them has to read, on average."""


class Slopes(Record, frozen=True):
    """Milliseconds for one more token, sequence or layer."""

    slope_ms: float
    low_ms: float
    high_ms: float
    """95 % interval."""
    reading_ms: float | None
    """The same of what a step has to read, at the measured bandwidth; for the prompt that is keys and values alone."""
    times_reading: float | None
    """slope_ms / reading_ms."""
    between_ms: tuple[float, ...]
    """From each point to the next."""
    bend: float | None
    """The last of these over the one before it: 1 on a straight line, 2 on a parabola at points that double; null where
    there are not two or the earlier one is not above 0."""
    at_most_linear: bool | None
    """False where the last slope is surely more than 1.1 times the one before it; null with fewer than three points."""


def measure_slopes(samples: Sequence[Sample], bytes_per_second: float | None, seed: int = 0) -> Slopes:
    """The slopes through two points or more, which are in rising order."""
    values = np.array([sample.value for sample in samples], np.float64)
    medians = np.array([np.median(sample.seconds) for sample in samples])
    drawn = draw_medians(samples, seed)
    slope, (low, high) = fit_slope(values, medians), np.percentile(fit_slope(values, drawn), (2.5, 97.5))
    reading = None
    if bytes_per_second is not None:
        reading = float(fit_slope(values, np.array([sample.read_bytes for sample in samples]))) / bytes_per_second
    between = np.diff(medians) / np.diff(values)
    bend = linear = None
    if len(samples) > 2:
        before, last = np.moveaxis(np.diff(drawn, axis=-1) / np.diff(values), -1, 0)[-2:]
        linear = not float(np.percentile(last - BENT * before, 2.5)) > 0
        bend = float(between[-1] / between[-2]) if between[-2] > 0 else None
    return Slopes(
        slope_ms=1e3 * float(slope),
        low_ms=1e3 * float(low),
        high_ms=1e3 * float(high),
        reading_ms=None if reading is None else 1e3 * reading,
        times_reading=float(slope) / reading if reading else None,
        between_ms=tuple((1e3 * between).tolist()),
        bend=bend,
        at_most_linear=linear,
    )


def fit_slope(values: NDArray[np.float64], times: NDArray[np.float64]) -> NDArray[np.float64]:
    """Slope of the least-squares line through [..., n] times at [n] values."""
    centred = values - values.mean()
    rise = times - times.mean(-1, keepdims=True)
    slope: NDArray[np.float64] = (rise * centred).sum(-1) / np.square(centred).sum()
    return slope


def draw_medians(samples: Sequence[Sample], seed: int) -> NDArray[np.float64]:
    """Medians [RESAMPLES, n] of steps that are drawn again."""
    rng = np.random.default_rng(seed)
    columns = []
    for sample in samples:
        seconds = np.asarray(sample.seconds)
        columns.append(np.median(seconds[rng.integers(0, len(seconds), (RESAMPLES, len(seconds)))], axis=1))
    return np.stack(columns, axis=1)

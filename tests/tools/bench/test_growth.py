"""Slopes, bends and their intervals on samples whose growth is known exactly."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from dllm_export.tools.bench.growth import Sample, fit_slope, measure_slopes

DOUBLING = (256, 512, 1024, 2048, 4096, 8192)
BANDWIDTH = 1e12


def samples(
    time: Callable[[float], float], values: tuple[int, ...] = DOUBLING, noise: float = 0.0, bytes_each: float = 5e5
) -> list[Sample]:
    """Twenty steps at every value, with seeded noise as a share of their time."""
    rng = np.random.default_rng(0)
    return [
        Sample(
            value=value,
            seconds=[time(value) * (1 + noise * float(rng.standard_normal())) for _ in range(20)],
            read_bytes=1e10 + bytes_each * value,
        )
        for value in values
    ]


def test_a_straight_line_has_its_slope_everywhere_and_no_bend() -> None:
    found = measure_slopes(samples(lambda value: 5e-3 + 2e-6 * value), BANDWIDTH)
    assert found.slope_ms == pytest.approx(2e-3)
    assert (found.low_ms, found.high_ms) == (pytest.approx(2e-3), pytest.approx(2e-3))
    assert found.between_ms == pytest.approx([2e-3] * 5)
    assert found.bend == pytest.approx(1)
    assert found.at_most_linear is True


def test_reading_has_the_slope_of_the_bytes_at_the_bandwidth_whatever_is_read_at_every_point() -> None:
    found = measure_slopes(samples(lambda value: 5e-3 + 2e-6 * value), BANDWIDTH)
    assert found.reading_ms == pytest.approx(1e3 * 5e5 / BANDWIDTH)
    assert found.times_reading == pytest.approx(4)
    unknown = measure_slopes(samples(lambda value: value), None)
    assert (unknown.reading_ms, unknown.times_reading) == (None, None)
    constant = measure_slopes(samples(lambda value: value, bytes_each=0), BANDWIDTH)
    assert constant.times_reading is None


def test_a_parabola_at_doubling_points_bends_by_two_and_is_more_than_linear() -> None:
    found = measure_slopes(samples(lambda value: 1e-3 + 1e-9 * value**2), BANDWIDTH)
    assert found.bend == pytest.approx(2)
    assert found.at_most_linear is False
    assert found.between_ms == pytest.approx([1e3 * 1e-9 * 3 * value for value in DOUBLING[:-1]])


def test_growth_that_flattens_is_at_most_linear() -> None:
    found = measure_slopes(samples(lambda value: 1e-3 * value**0.5), BANDWIDTH)
    assert found.bend is not None
    assert found.bend < 1
    assert found.at_most_linear is True


def test_noise_widens_the_interval_around_the_slope_and_makes_no_bend() -> None:
    calm, wild = (
        measure_slopes(samples(lambda value: 5e-3 + 2e-6 * value, noise=share), None) for share in (0.002, 0.05)
    )
    for found in (calm, wild):
        assert found.low_ms < found.slope_ms < found.high_ms
        assert found.low_ms < 2e-3 < found.high_ms
        assert found.at_most_linear is True
    assert wild.high_ms - wild.low_ms > 10 * (calm.high_ms - calm.low_ms)
    assert measure_slopes(samples(lambda value: 1e-9 * value**2, noise=0.05), None).at_most_linear is False


def test_two_points_have_a_slope_and_say_nothing_of_bends() -> None:
    found = measure_slopes(samples(lambda value: 3e-6 * value, (1, 4)), None)
    assert found.between_ms == pytest.approx([3e-3])
    assert (found.bend, found.at_most_linear) == (None, None)


def test_a_step_that_does_not_grow_at_first_has_no_bend_to_speak_of() -> None:
    found = measure_slopes(samples(lambda value: 1e-3, (1, 2, 4)), None)
    assert (found.slope_ms, found.bend, found.at_most_linear) == (0, None, True)
    falling = measure_slopes(samples(lambda value: 1e-3 / value, (1, 2, 4)), None)
    assert falling.slope_ms < 0
    assert falling.bend is None


def test_the_least_squares_line_is_numpys() -> None:
    rng = np.random.default_rng(1)
    values, times = np.array(DOUBLING, np.float64), rng.standard_normal((3, len(DOUBLING)))
    expected = [np.polyfit(values, row, 1)[0] for row in times]
    np.testing.assert_allclose(fit_slope(values, times), expected, rtol=1e-9)

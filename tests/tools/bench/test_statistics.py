"""Percentiles, counting rules and intervals on made-up steps; and reports against each other."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from dllm_export.errors import MismatchError, UsageError
from dllm_export.graphs import ModelShape
from dllm_export.tools.bench.comparison import compare_reports, require_ratios
from dllm_export.tools.bench.records import (
    SCHEMA,
    BenchReport,
    Column,
    MachineRecord,
    MeasuredLimits,
    RawColumn,
    RawRun,
    Settings,
    StepRecord,
    StrategyRecord,
    WorkRecord,
)
from dllm_export.tools.bench.roofline import Limits
from dllm_export.tools.bench.statistics import bootstrap_ratio, compare_tokens, count_answer, summarize
from dllm_export.tools.bench.summary import find_bars, find_doubts, make_ratios, summarize_run

EOS, TURN, MASK = 95, 94, 96


def test_times_are_in_milliseconds_and_spread_is_the_interquartile_range_over_the_median() -> None:
    times = summarize([0.001, 0.002, 0.003, 0.004, 0.005])
    assert (times.samples, times.p50_ms, times.mean_ms) == (5, 3.0, 3.0)
    assert math.isclose(times.spread, 2 / 3)
    assert math.isclose(times.p90_ms, 4.6)
    assert times.p50_ms < times.p90_ms < times.p99_ms < 5


@pytest.mark.parametrize(
    ("tokens", "count"),
    [
        ([EOS, 1, 2, 3], 0),
        ([1, 2, EOS, EOS], 2),
        ([1, 2, 3, 4], 4),
        ([1, TURN, 3, EOS], 1),
        ([1, 2, EOS, MASK], 2),
        ([1, MASK, EOS, 2], None),
        ([1, 2, MASK, MASK], None),
        ([], 0),
    ],
)
def test_an_answer_ends_before_the_first_end_of_text(tokens: list[int], count: int | None) -> None:
    assert count_answer(tokens, [EOS, TURN], MASK) == count


def steps(seconds: list[float], kind: str = "full", first: int = 0) -> tuple[StepRecord, ...]:
    """Steps that decide one token each, from left to right."""
    work = WorkRecord(flops=10**9, weight_bytes=10**6, cache_bytes=10**6)
    return tuple(
        StepRecord(kind=kind, seconds=one, engine_seconds=0.5 * one, work=work, decided=((first + row, 7),))
        for row, one in enumerate(seconds)
    )


def run(made: tuple[StepRecord, ...], policy: str = "none", others: float | None = 0.0) -> RawRun:
    return RawRun(policy=policy, steps=made, tokens=(7,) * len(made), others=others)


def test_the_first_step_that_decides_something_else_is_named() -> None:
    one = run(steps([1.0] * 4))
    changed = list(one.steps)
    changed[2] = msgspec.structs.replace(changed[2], decided=((3, 7),))
    changed[3] = msgspec.structs.replace(changed[3], decided=((2, 7),))
    assert compare_tokens(one, msgspec.structs.replace(one, steps=tuple(changed))) == (1.0, 3)


def test_the_interval_of_a_ratio_holds_the_true_one_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    held, experiments, truth = 0, 300, 1.3

    def draw(scale: float) -> dict[str, list[float]]:
        full, partial = (rng.lognormal(0, 0.2, count) for count in (20, 60))
        return {"full": list(3 * scale * full), "partial": list(scale * partial)}

    for seed in range(experiments):
        value, low, high = bootstrap_ratio(draw(truth), draw(1.0), seed)
        assert low <= value <= high
        held += low <= truth <= high
    # 95 % promised; the standard error of 300 experiments is 1.3 points, and resampling few steps is a little narrow.
    assert 0.89 <= held / experiments <= 0.99


def test_the_interval_narrows_with_more_steps_and_is_the_same_for_the_same_seed() -> None:
    rng = np.random.default_rng(1)
    few, many = ({"full": list(rng.lognormal(0, 0.2, count))} for count in (10, 1000))
    wide, narrow = (bootstrap_ratio(one, one) for one in (few, many))
    assert wide[2] - wide[1] > 3 * (narrow[2] - narrow[1])
    assert bootstrap_ratio(few, many, 5) == bootstrap_ratio(few, many, 5)


def test_kinds_keep_their_share_in_every_resample() -> None:
    """Times that only differ between kinds leave nothing to chance."""
    slow, fast = {"full": [4.0] * 3, "partial": [2.0] * 20}, {"full": [2.0] * 3, "partial": [1.0] * 20}
    assert bootstrap_ratio(slow, fast) == (2.0, 2.0, 2.0)


def test_a_run_is_set_against_the_limit_of_its_work() -> None:
    limits = Limits(flops_per_second=1e11, bytes_per_second=1e9)  # 10 ms of arithmetic, 2 ms of reading
    found = summarize_run(run(steps([0.02] * 5)), limits, 0.05, [EOS], MASK)
    kind = found.kinds["full"]
    assert math.isclose(kind.limit_ms or 0, 10)
    assert math.isclose(kind.share_of_limit or 0, 0.5)
    assert kind.bound_by == "arithmetic"
    assert math.isclose(found.share_of_limit or 0, 0.5)
    assert math.isclose(found.times_products or 0, 2)
    assert math.isclose(found.outside_engines or 0, 0.5)
    assert (found.canvas_tokens, found.answer_tokens) == (5, 5)
    unknown = summarize_run(run(steps([0.02] * 5)), None, None, [EOS], MASK)
    assert (unknown.share_of_limit, unknown.times_products, unknown.kinds["full"].limit_ms) == (None, None, None)


# -- reports made by hand
SHAPE = ModelShape(
    layers=12,
    hidden=1024,
    heads=8,
    kv_heads=8,
    head_dim=128,
    mlp=3072,
    vocab=99,
    max_length=4096,
    norm_eps=1e-5,
    rope_theta=1e4,
)
Make = Callable[..., BenchReport]


def column(*runs: RawRun) -> Column:
    raw = RawColumn(
        library="x 1",
        python="3",
        place="cpu",
        open_seconds=1,
        host_memory=1,
        device_memory=None,
        device_state="",
        graphs=(),
        runs=(),
        session=None,
    )
    return Column(what="", needs=1, raw=raw, runs=tuple(summarize_run(one, None, None, [EOS], MASK) for one in runs))


def report(columns: dict[str, Column], cpu: str = "chip", prompt: int = 512) -> BenchReport:
    settings = Settings(
        bundle="0" * 64,
        shape=SHAPE,
        dtype="float32",
        prompt=prompt,
        response=128,
        batch=1,
        steps=5,
        warmup=None,
        rounds=1,
        seed=0,
        threads=2,
        device="cpu",
        policies=(StrategyRecord(name="none", settings={}), StrategyRecord(name="dllm-cache", settings={})),
    )
    return BenchReport(
        schema=SCHEMA,
        tool="t",
        version="0",
        command="c",
        seconds=1.0,
        machine=MachineRecord(cpu=cpu, cores=2, memory=1, system="s", python="3", packages={}, gpus=()),
        settings=settings,
        limits=MeasuredLimits(bytes_per_second=1, flops_per_second=1, product_seconds=(), libraries=()),
        limits_failure="",
        break_even_rows=1,
        products_ms={},
        columns=columns,
        failures={},
        ratios=(),
        times_products=(),
        agreement=(),
        warnings=(),
    )


def write(path: Path, made: BenchReport) -> Path:
    path.write_bytes(msgspec.json.encode(made))
    return path


FAST, SLOW = [0.010, 0.011, 0.010, 0.009, 0.010], [0.020, 0.021, 0.020, 0.019, 0.020]


def test_two_reports_give_ratios_with_a_verdict(tmp_path: Path) -> None:
    a = write(tmp_path / "a.json", report({"onnxruntime": column(run(steps(SLOW))), "torch": column(run(steps(SLOW)))}))
    b = write(tmp_path / "b.json", report({"onnxruntime": column(run(steps(FAST))), "eager": column(run(steps(SLOW)))}))
    found = compare_reports(a, b, force=False)
    (change,) = found.changes
    assert math.isclose(change.value, 2)
    assert 1.8 < change.low <= change.value <= change.high < 2.2
    assert (change.verdict, change.same_tokens) == ("faster", True)
    assert (found.only_a, found.only_b) == (("torch none",), ("eager none",))
    assert compare_reports(b, a, force=False).changes[0].verdict == "slower"
    assert compare_reports(a, a, force=False).changes[0].verdict == "equal"


def test_reports_of_other_machines_or_requests_are_refused_unless_forced(tmp_path: Path) -> None:
    columns = {"onnxruntime": column(run(steps(FAST)))}
    a = write(tmp_path / "a.json", report(columns))
    other = write(tmp_path / "b.json", report(columns, cpu="other chip"))
    longer = write(tmp_path / "c.json", report(columns, prompt=100))
    with pytest.raises(UsageError, match=r"machine processor \(chip and other chip\).*--force"):
        compare_reports(a, other, force=False)
    with pytest.raises(UsageError, match=r"prompt \(512 and 100\)"):
        compare_reports(a, longer, force=False)
    assert compare_reports(a, other, force=True).differences == ("machine processor (chip and other chip)",)


def test_a_file_that_is_no_report_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"schema": 1}')
    with pytest.raises(UsageError, match="is no report"):
        compare_reports(path, path, force=False)


def test_a_slower_report_fails_only_beyond_doubt(tmp_path: Path) -> None:
    a = write(tmp_path / "a.json", report({"onnxruntime": column(run(steps(FAST)))}))
    b = write(tmp_path / "b.json", report({"onnxruntime": column(run(steps(SLOW)))}))
    with pytest.raises(MismatchError, match=r"onnxruntime none 0\.500"):
        require_ratios(compare_reports(a, b, force=False), 0.9)
    require_ratios(compare_reports(a, b, force=False), 0.4)
    require_ratios(compare_reports(a, b, force=False), None)


def test_the_bars_stand_beside_the_ratios_of_their_shape() -> None:
    cached = run(steps(FAST, "partial"), "dllm-cache")
    made = report(
        {
            "eager": column(run(steps([6 * second for second in FAST]))),
            "four-feature": column(run(steps(SLOW, "partial"), "dllm-cache")),
            "onnxruntime": column(run(steps(SLOW)), cached),
        }
    )
    bars = find_bars(made.settings)
    assert bars is not None
    assert (bars.eager, bars.four_feature, bars.products) == (5.0, 2.5, 1.3)
    found = {(one.baseline, one.baseline_policy): one for one in make_ratios(made.columns, made.settings) if one.bar}
    assert {key: (one.bar, one.met) for key, one in found.items()} == {
        ("eager", "none"): (5.0, True),
        ("four-feature", "dllm-cache"): (2.5, False),
    }
    assert find_bars(report({}, prompt=100).settings) is None


def test_a_figure_that_spreads_or_was_disturbed_is_doubted() -> None:
    calm, wild = run(steps(FAST)), run(steps([0.01, 0.02, 0.01, 0.03, 0.02]))
    busy = run(steps(FAST), others=0.2)
    assert not list(find_doubts({"a": column(calm)}))
    (spread,) = find_doubts({"a": column(wild)})
    assert "full 50%" in spread
    (others,) = find_doubts({"a": column(busy)})
    assert "other processes took up to 20%" in others
    (rounds,) = find_doubts({"a": column(calm, run(steps([1.2 * second for second in FAST])))})
    assert "rounds differ by 20%" in rounds


def test_a_run_that_decides_more_in_its_time_is_faster_for_a_token() -> None:
    """Two passes of one token against two passes of two tokens that take as long: twice the tokens/s."""
    two = tuple(
        msgspec.structs.replace(step, decided=((2 * number, 7), (2 * number + 1, 7)))
        for number, step in enumerate(steps([0.5, 0.5]))
    )
    columns = {
        "eager": column(msgspec.structs.replace(run(steps([0.5] * 2)), tokens=(7, 7, MASK, MASK))),
        "torch": column(msgspec.structs.replace(run(two), tokens=(7,) * 4)),
    }
    (ratio,) = make_ratios(columns, report({}).settings)
    assert (ratio.column, ratio.value, ratio.low, ratio.high) == ("torch", 2.0, 2.0, 2.0)
    speeds = [one.runs[0].tokens_per_second for one in columns.values()]
    assert (speeds, columns["torch"].runs[0].tokens_per_pass) == ([2.0, 4.0], 2.0)
    assert compare_tokens(columns["torch"].runs[0].raw, columns["eager"].runs[0].raw) == (0.5, 1)


def test_rows_that_neither_run_decided_are_no_agreement() -> None:
    one = msgspec.structs.replace(run(steps([1.0] * 2)), tokens=(7, 7, MASK, MASK))
    other = msgspec.structs.replace(run((one.steps[0],)), tokens=(7, MASK, MASK, MASK))
    assert compare_tokens(one, one) == (1.0, None)
    assert compare_tokens(other, one) == (0.5, 2)

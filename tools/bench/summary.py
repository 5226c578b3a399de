"""Raw steps -> what the report says of them: times against limits, ratios against bars, agreement, and what to doubt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dllm_export.tools.bench.records import (
    Agreement,
    Column,
    KindSummary,
    MeasuredLimits,
    ProductsRatio,
    Ratio,
    RawRun,
    Run,
    Settings,
    StepRecord,
)
from dllm_export.tools.bench.roofline import Limits, Work
from dllm_export.tools.bench.statistics import (
    UNSTEADY,
    bootstrap_ratio,
    compare_tokens,
    count_answer,
    steps_by_kind,
    summarize,
)
from dllm_export.tools.machine import QUIET

NONE = "none"
LEAST_SAMPLES = 4
"""Steps of a kind from which its spread says something."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bars:
    """What is expected of dllm-cache on onnxruntime on two quiet CPU cores, for one shape and request."""

    hidden: int
    layers: int
    prompt: int
    response: int
    eager: float
    """Times as fast as eager PyTorch without a cache."""
    four_feature: float
    own: float | None = None
    """Times as fast as onnxruntime without a cache."""
    products: float | None = None
    """At most this many times its matrix products timed alone."""

    def fit(self, settings: Settings) -> bool:
        """Whether these settings are the ones that the bars were set for."""
        measured = (settings.shape.hidden, settings.shape.layers, settings.prompt, settings.response)
        same = measured == (self.hidden, self.layers, self.prompt, self.response) and settings.device == "cpu"
        single = settings.batch == settings.tokens_per_step == 1 and settings.transfer.name == "quota"
        return same and single


BARS = (
    Bars(hidden=512, layers=8, prompt=512, response=128, eager=4.0, four_feature=2.0, own=3.0),
    Bars(hidden=1024, layers=12, prompt=512, response=128, eager=5.0, four_feature=2.5, products=1.3),
)


def find_bars(settings: Settings) -> Bars | None:
    """The bars of these settings, if there are any."""
    return next((bars for bars in BARS if bars.fit(settings)), None)


def summarize_run(
    raw: RawRun,
    limits: Limits | None,
    products_seconds: float | None,
    ends: Sequence[int],
    mask: int,
    batch: int = 1,
) -> Run:
    """The figures of a run. `products_seconds` are those of its matrix products where they were timed on its device."""
    seconds = sum(step.seconds for step in raw.steps)
    inside = [step.engine_seconds for step in raw.steps if step.engine_seconds is not None]
    responses = np.reshape(raw.tokens, (batch, -1)).tolist()
    answers = [count_answer(one, ends, mask) for one in responses]
    answer = None if None in answers else sum(one for one in answers if one is not None)
    whole = sum(limits.seconds(to_work(step)) for step in raw.steps) if limits else None
    kinds = {
        kind: summarize_kind(times, [step for step in raw.steps if step.kind == kind], limits)
        for kind, times in steps_by_kind(raw).items()
    }
    tokens = sum(len(step.decided) for step in raw.steps)
    return Run(
        policy=raw.policy,
        kinds=kinds,
        passes=len(raw.steps),
        canvas_tokens=tokens,
        answer_tokens=answer,
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        answer_tokens_per_second=None if answer is None else answer / seconds,
        first_step_ms=1e3 * raw.steps[0].seconds,
        outside_engines=1 - sum(inside) / seconds if inside else None,
        share_of_limit=None if whole is None else whole / seconds,
        times_products=None if not products_seconds else seconds / products_seconds,
        raw=raw,
    )


def summarize_kind(seconds: Sequence[float], steps: Sequence[StepRecord], limits: Limits | None) -> KindSummary:
    """Times of the steps of a kind beside the mean of their limits."""
    times = summarize(seconds)
    if limits is None:
        return KindSummary(times=times, limit_ms=None, share_of_limit=None, bound_by=None)
    limit = 1e3 * sum(limits.seconds(to_work(step)) for step in steps) / len(steps)
    works = [to_work(step) for step in steps]
    arithmetic = sum(work.flops for work in works) / limits.flops_per_second
    reading = sum(work.weight_bytes + work.cache_bytes for work in works) / limits.bytes_per_second
    return KindSummary(
        times=times,
        limit_ms=limit,
        share_of_limit=limit / times.p50_ms,
        bound_by="arithmetic" if arithmetic > reading else "reading",
    )


def to_work(step: StepRecord) -> Work:
    """The work of a recorded step."""
    work = step.work
    return Work(flops=work.flops, weight_bytes=work.weight_bytes, cache_bytes=work.cache_bytes)


def to_limits(measured: MeasuredLimits) -> Limits:
    """What the arithmetic takes."""
    return Limits(flops_per_second=measured.flops_per_second, bytes_per_second=measured.bytes_per_second)


def all_runs(columns: Mapping[str, Column]) -> Iterator[tuple[str, Run]]:
    """Every run with its column; the first round of each."""
    for name, column in columns.items():
        seen = set()
        for run in column.runs:
            if run.policy not in seen:
                seen.add(run.policy)
                yield name, run


def find_run(columns: Mapping[str, Column], column: str, policy: str) -> Run | None:
    """The first run of a policy in a column, if it is there."""
    return next((run for name, run in all_runs(columns) if (name, run.policy) == (column, policy)), None)


def pool(columns: Mapping[str, Column], column: str, policy: str) -> dict[str, list[float]]:
    """Seconds of a policy's steps by kind, of all rounds together."""
    kinds: dict[str, list[float]] = {}
    for run in columns[column].runs:
        if run.policy == policy:
            for kind, seconds in steps_by_kind(run.raw).items():
                kinds.setdefault(kind, []).extend(seconds)
    return kinds


def count_tokens(columns: Mapping[str, Column], column: str, policy: str) -> int:
    """Canvas tokens that a policy's steps decided, of all rounds together."""
    return sum(run.canvas_tokens for run in columns[column].runs if run.policy == policy)


def make_ratios(columns: Mapping[str, Column], settings: Settings) -> Iterator[Ratio]:
    """Every run against eager PyTorch without a cache; a cached one against the published cache and against itself without."""
    bars, names = find_bars(settings), [name for name, _ in all_runs(columns)]
    reference = names[0] if names else ""
    for name, run in all_runs(columns):
        baselines = [(reference, NONE)]
        if run.policy != NONE:
            baselines += [("four-feature", run.policy), (name, NONE)]
        for baseline, policy in dict.fromkeys(baselines):
            if (baseline, policy) == (name, run.policy) or find_run(columns, baseline, policy) is None:
                continue
            fast, slow = pool(columns, name, run.policy), pool(columns, baseline, policy)
            gain = count_tokens(columns, name, run.policy) / count_tokens(columns, baseline, policy)
            value, low, high = bootstrap_ratio(slow, fast, gain=gain)
            bar = find_bar(bars, name, run.policy, baseline, policy)
            yield Ratio(
                column=name,
                policy=run.policy,
                baseline=baseline,
                baseline_policy=policy,
                value=value,
                low=low,
                high=high,
                bar=bar,
                met=None if bar is None else value >= bar,
            )


def find_bar(bars: Bars | None, column: str, policy: str, baseline: str, baseline_policy: str) -> float | None:
    """What a ratio is expected to be, if anything is."""
    if bars is None or (column, policy) != ("onnxruntime", "dllm-cache"):
        return None
    expected = {
        ("eager", NONE): bars.eager,
        ("four-feature", policy): bars.four_feature,
        ("onnxruntime", NONE): bars.own,
    }
    return expected.get((baseline, baseline_policy))


def make_products_ratios(columns: Mapping[str, Column], settings: Settings) -> Iterator[ProductsRatio]:
    """Runs of the runtime against their matrix products alone."""
    bars = find_bars(settings)
    for name, run in all_runs(columns):
        if run.times_products is not None:
            expected = bars.products if bars and (name, run.policy) == ("onnxruntime", "dllm-cache") else None
            value = run.times_products
            met = None if expected is None else value <= expected
            yield ProductsRatio(column=name, policy=run.policy, value=value, bar=expected, met=met)


def make_agreement(columns: Mapping[str, Column]) -> Iterator[Agreement]:
    """Every run against the first one of its policy, and every cached one against the first one without a cache."""
    first: dict[str, tuple[str, Run]] = {}
    for name, run in all_runs(columns):
        references = [first.setdefault(run.policy, (name, run))]
        if run.policy != NONE and NONE in first:
            references.append(first[NONE])
        for reference, expected in references:
            if (reference, expected.policy) == (name, run.policy):
                continue
            share, differs = compare_tokens(run.raw, expected.raw)
            yield Agreement(
                column=name,
                policy=run.policy,
                reference=reference,
                reference_policy=expected.policy,
                share=share,
                first_difference=differs,
            )


def find_doubts(columns: Mapping[str, Column]) -> Iterator[str]:
    """Why some figures are not to be believed."""
    runs = [(f"{name} {run.policy}", run) for name, column in columns.items() for run in column.runs]
    busy = {title: run.raw.others for title, run in runs if run.raw.others is not None and run.raw.others > QUIET}
    if busy:
        yield (
            f"other processes took up to {max(busy.values()):.0%} of the processors while these ran: "
            f"{', '.join(busy)}; measure again on a quiet machine"
        )
    for title, run in runs:
        spread = {
            kind: summary.times.spread
            for kind, summary in run.kinds.items()
            if summary.times.samples >= LEAST_SAMPLES and summary.times.spread > UNSTEADY
        }
        if spread:
            shares = ", ".join(f"{kind} {share:.0%}" for kind, share in spread.items())
            yield f"{title}: steps spread by more than {UNSTEADY:.0%} of their median: {shares}"
    seconds: dict[str, list[float]] = {}
    for title, run in runs:
        seconds.setdefault(title, []).append(run.seconds)
    for title, rounds in seconds.items():
        if max(rounds) > (1 + UNSTEADY) * min(rounds):
            yield f"{title}: rounds differ by {max(rounds) / min(rounds) - 1:.0%}"

"""Steps of all columns -> what the benchmark says: speeds, ratios with their spread, and agreement beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dllm_export.tools.bench_columns import Column, Step
from dllm_export.tools.machine import QUIET
from dllm_export.tools.output import make_table, notes, print_warning

OUTSIDE_BAR = 0.10
KINDS = ("full", "refresh_response", "refresh_prompt", "partial")

Rounds = Sequence[Sequence[Step]]
"""Steps of one column, by round."""


@dataclass(frozen=True, slots=True)
class KindTime:
    """Times of the steps of one kind, in milliseconds."""

    steps: int
    p10_ms: float
    p50_ms: float
    p90_ms: float


@dataclass(frozen=True, slots=True)
class ColumnReport:
    """One column. `outside_engines` is the share of its time not spent in engines, where that is known."""

    name: str
    what: str
    passes: int
    tokens: int
    seconds: float
    tokens_per_second: float
    kinds: dict[str, KindTime]
    outside_engines: float | None


@dataclass(frozen=True, slots=True)
class Ratio:
    """How much faster `column` is than `baseline` over whole generations; low and high are those of single intervals."""

    column: str
    baseline: str
    value: float
    low: float
    high: float
    bar: float
    met: bool


@dataclass(frozen=True, slots=True)
class Agreement:
    """Equal tokens of two finished responses, and the first step after which they differ (None: never)."""

    column: str
    reference: str
    share: float
    first_difference: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchReport:
    """Everything that a figure needs to be believed."""

    tool: str
    version: str
    command: str
    machine: dict[str, object]
    settings: dict[str, object]
    columns: list[ColumnReport]
    ratios: list[Ratio]
    outside_engines_bar: float
    outside_engines_met: bool
    agreement: list[Agreement]
    others: float | None
    """Share of the machine's processor time that other processes took meanwhile."""


def column_report(column: Column, rounds: Rounds) -> ColumnReport:
    """Totals over all rounds and times by kind of step."""
    steps = [step for steps in rounds for step in steps]
    seconds = sum(step.seconds for step in steps)
    inside = [step.engine_seconds for step in steps if step.engine_seconds is not None]
    kinds = {}
    for kind in KINDS:
        times = [1e3 * step.seconds for step in steps if step.kind == kind]
        if times:
            low, middle, high = (float(value) for value in np.percentile(times, (10, 50, 90)))
            kinds[kind] = KindTime(len(times), low, middle, high)
    return ColumnReport(
        name=column.name,
        what=column.what,
        passes=len(steps),
        tokens=len(steps),
        seconds=seconds,
        tokens_per_second=len(steps) / seconds,
        kinds=kinds,
        outside_engines=1 - sum(inside) / seconds if inside else None,
    )


def ratio(
    columns: Sequence[Column], times: Sequence[Rounds], pair: tuple[int, int], bar: float, interval: int
) -> Ratio:
    """The first column of the pair against the second. Every interval holds the same mix of steps."""
    fast, slow = (times[number] for number in pair)
    value = total(slow) / total(fast)
    single = [
        slower / faster for faster, slower in zip(intervals(fast, interval), intervals(slow, interval), strict=True)
    ]
    column, baseline = (columns[number].name for number in pair)
    return Ratio(column, baseline, value, min(single, default=value), max(single, default=value), bar, value >= bar)


def total(rounds: Rounds) -> float:
    """Seconds of all steps."""
    return sum(step.seconds for steps in rounds for step in steps)


def intervals(rounds: Rounds, length: int) -> list[float]:
    """Seconds of every whole interval of this many steps."""
    starts = [(steps, start) for steps in rounds for start in range(0, len(steps) - length + 1, length)]
    return [sum(step.seconds for step in steps[start : start + length]) for steps, start in starts]


def agreement(columns: Sequence[Column], times: Sequence[Rounds], pair: tuple[int, int]) -> Agreement:
    """Tokens of the first round of two columns, compared."""
    found, expected = (times[number][0] for number in pair)
    differing = (
        number
        for number, (a, b) in enumerate(zip(found, expected, strict=True), 1)
        if not np.array_equal(a.tokens, b.tokens)
    )
    share = float(np.mean(np.equal(found[-1].tokens, expected[-1].tokens)))
    column, reference = (columns[number].name for number in pair)
    return Agreement(column, reference, share, next(differing, None))


def print_report(report: BenchReport) -> None:
    """The report as tables on stderr."""
    console = notes()
    table = make_table("column", "tokens/s", *KINDS, "outside engines", right=("tokens/s", *KINDS, "outside engines"))
    for column in report.columns:
        times = [f"{column.kinds[kind].p50_ms:.1f}" if kind in column.kinds else "" for kind in KINDS]
        outside = "" if column.outside_engines is None else f"{column.outside_engines:.1%}"
        table.add_row(column.name, f"{column.tokens_per_second:.2f}", *times, outside)
    console.print(table)
    console.print("Columns named after a kind of step: median milliseconds.\n")
    table = make_table("ratio", "faster", "lowest", "highest", "bar", "", right=("faster", "lowest", "highest", "bar"))
    for one in report.ratios:
        numbers = (f"{number:.2f}x" for number in (one.value, one.low, one.high, one.bar))
        table.add_row(f"{one.column} / {one.baseline}", *numbers, "met" if one.met else "MISSED")
    worst = max(column.outside_engines for column in report.columns if column.outside_engines is not None)
    verdict = "met" if report.outside_engines_met else "MISSED"
    table.add_row("time outside engines, worst", f"{worst:.1%}", "", "", f"{report.outside_engines_bar:.0%}", verdict)
    console.print(table)
    console.print()
    for pair in report.agreement:
        first = "never differ" if pair.first_difference is None else f"differ from step {pair.first_difference}"
        console.print(f"{pair.column} = {pair.reference}: {pair.share:.1%} of the tokens, {first}")
    console.print()
    for part in (report.machine, report.settings):
        console.print(", ".join(f"{name} {value}" for name, value in part.items()), soft_wrap=True, style="dim")
    console.print(report.command, soft_wrap=True)
    if report.others is not None and report.others > QUIET:
        print_warning(
            f"other processes took {report.others:.0%} of the processors: these figures are not to be believed, measure "
            f"again on a quiet machine"
        )

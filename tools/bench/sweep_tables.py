"""A sweep as tables: every point, and how steps grow."""

from __future__ import annotations

from collections.abc import Iterable

from dllm_export.tools.bench.growth import Slopes
from dllm_export.tools.bench.records import BenchReport, Run
from dllm_export.tools.bench.summary import NONE, all_runs, find_run
from dllm_export.tools.bench.sweep import Axis, SweepReport
from dllm_export.tools.bench.tables import Row, describe_limits, describe_settings
from dllm_export.tools.output import make_table, print_note, print_table, print_warning

ADAPTIVE = "partial"
"""The kind of a cached step that recomputes some rows only."""

POINT_HEADER = (
    *("column", "policy", "tokens/s", "x first", "a pass", "full ms", "refresh", "adaptive", "limit", "% of it"),
    "equal",
)
GROWTH_HEADER = (
    *("column", "policy", "step", "us", "95 % interval", "reading", "x reading", "between points", "bend"),
    "growth",
)


def print_sweep(report: SweepReport) -> None:
    """Every axis with its slopes."""
    for axis in report.axes:
        for header, rows, texts in (
            ((axis.name, *POINT_HEADER), point_rows(axis), (1, 2)),
            (GROWTH_HEADER, growth_rows(axis), (0, 1, 2, 7, 9)),
        ):
            table = make_table(*header, right=[name for place, name in enumerate(header) if place not in texts])
            for row in rows:
                table.add_row(*row)
            print_table(table)
            print_note("")
        for line in describe_axis(axis):
            print_note(line)
        for warning in find_warnings(axis):
            print_warning(warning)
    print_note(report.command)


def point_rows(axis: Axis) -> Iterable[Row]:
    """One line for every run at every point; its speed also beside that of the first point where the run is."""
    for point in axis.points:
        for name, run in all_runs(point.report.columns):
            found = (find_run(other.report.columns, name, run.policy) for other in axis.points)
            first = next(one for one in found if one is not None)
            adaptive, full = run.kinds.get(ADAPTIVE), run.kinds.get("full")
            others = [summary.times.p50_ms for kind, summary in run.kinds.items() if kind not in (ADAPTIVE, "full")]
            limit = None if adaptive is None else adaptive.limit_ms
            share = None if adaptive is None else adaptive.share_of_limit
            yield (
                str(point.value),
                name,
                run.policy,
                f"{run.tokens_per_second:.2f}",
                f"{run.tokens_per_second / first.tokens_per_second:.2f}",
                f"{run.tokens_per_pass:.4g}",
                "" if full is None else f"{full.times.p50_ms:.2f}",
                ", ".join(f"{median:.2f}" for median in others),
                "" if adaptive is None else f"{adaptive.times.p50_ms:.2f}",
                "" if limit is None else f"{limit:.2f}",
                "" if share is None else f"{share:.0%}",
                find_share(point.report, name, run),
            )


def find_share(report: BenchReport, column: str, run: Run) -> str:
    """Share of tokens that equal those of the first run without a cache."""
    own = [
        one for one in report.agreement if (one.column, one.policy, one.reference_policy) == (column, run.policy, NONE)
    ]
    return f"{own[0].share:.0%}" if own else "-"


def growth_rows(axis: Axis) -> Iterable[Row]:
    """One line for every kind of step that is there at two points or more."""
    for growth in axis.growth:
        one = growth.slopes
        yield (
            growth.column,
            growth.policy,
            growth.kind,
            f"{1e3 * one.slope_ms:.4g}",
            f"{1e3 * one.low_ms:.4g} to {1e3 * one.high_ms:.4g}",
            "" if one.reading_ms is None else f"{1e3 * one.reading_ms:.4g}",
            "" if one.times_reading is None else f"{one.times_reading:.2f}",
            ", ".join(f"{1e3 * slope:.3g}" for slope in one.between_ms),
            "" if one.bend is None else f"{one.bend:.2f}",
            describe_growth(one),
        )


def describe_growth(slopes: Slopes) -> str:
    """What the points say of it."""
    if slopes.at_most_linear is None:
        return "-"
    return "at most linear" if slopes.at_most_linear else "MORE"


def describe_axis(axis: Axis) -> Iterable[str]:
    """What a slope is of, and what was measured at the last point."""
    last = axis.points[-1].report
    yield (
        "limit: of an adaptive step; equal: share of tokens that are those of the first column without a cache; us: time "
        f"for one more {axis.unit}, slope of the line through the medians; reading: the same of what a step must read"
    )
    yield next(iter(describe_limits(last)))
    yield f"last point: {describe_settings(last)}"


def find_warnings(axis: Axis) -> Iterable[str]:
    """Doubts and columns that did not run, each with its point."""
    for point in axis.points:
        for name, why in point.report.failures.items():
            yield f"{axis.name} {point.value}, {name}: {why}"
        for warning in point.report.warnings:
            yield f"{axis.name} {point.value}: {warning}"


def sweep_markdown(report: SweepReport) -> str:
    """The same tables in Markdown."""
    lines: list[str] = []
    for axis in report.axes:
        for header, rows in (((axis.name, *POINT_HEADER), point_rows(axis)), (GROWTH_HEADER, growth_rows(axis))):
            lines += [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
            lines += [f"| {' | '.join(row)} |" for row in rows]
            lines.append("")
        lines += [*describe_axis(axis), "", *(f"- {warning}" for warning in find_warnings(axis)), ""]
    return "\n".join([*lines, f"`{report.command}`"]) + "\n"

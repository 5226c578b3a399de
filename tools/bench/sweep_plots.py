"""A sweep as a picture: for every axis the speed, and the time of an adaptive step beside that of what it must read."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from dllm_export.tools.bench.plots import style
from dllm_export.tools.bench.summary import all_runs, find_run
from dllm_export.tools.bench.sweep import Axis, SweepReport
from dllm_export.tools.bench.sweep_tables import ADAPTIVE
from dllm_export.tools.frontier_chart import DPI, GREY, SMALL, TEXT

Line = tuple[str, list[int], list[float]]
"""Title, values and heights."""


def speed_lines(axis: Axis) -> Iterator[Line]:
    """Tokens per second of every run."""
    names = dict.fromkeys((name, run.policy) for point in axis.points for name, run in all_runs(point.report.columns))
    for name, policy in names:
        found = [(point.value, find_run(point.report.columns, name, policy)) for point in axis.points]
        there = [(value, run.tokens_per_second) for value, run in found if run is not None]
        yield f"{name} {policy}", [value for value, _ in there], [speed for _, speed in there]


def adaptive_lines(axis: Axis) -> Iterator[Line]:
    """Median milliseconds of the adaptive steps of every run that has some."""
    for growth in axis.growth:
        if growth.kind == ADAPTIVE:
            runs = [
                find_run(point.report.columns, growth.column, growth.policy)
                for point in axis.points
                if point.value in growth.values
            ]
            medians = [run.kinds[ADAPTIVE].times.p50_ms for run in runs if run is not None]
            yield f"{growth.column} {growth.policy}", list(growth.values), medians


def limit_line(axis: Axis) -> Line | None:
    """The limit of an adaptive step at every point: the same for all columns."""
    found: dict[int, float] = {}
    for point in axis.points:
        for _, run in all_runs(point.report.columns):
            summary = run.kinds.get(ADAPTIVE)
            if summary is not None and summary.limit_ms is not None:
                found.setdefault(point.value, summary.limit_ms)
    return ("limit of the machine", [*found], [*found.values()]) if found else None


def draw_sweep(report: SweepReport) -> Figure:
    """Two panels an axis."""
    figure = Figure(figsize=(8.4, 3.6 * len(report.axes) + 0.4), dpi=DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(report.axes), 2, squeeze=False)
    for (left, right), axis in zip(panels, report.axes, strict=True):
        names = [name for name, *_ in speed_lines(axis)]
        for lines, panel in ((speed_lines(axis), left), (adaptive_lines(axis), right)):
            for title, values, heights in lines:
                colour, line = style(names.index(title))
                panel.plot(values, heights, marker="o", markersize=4, color=colour, linestyle=line, label=title)
        limit = limit_line(axis)
        if limit is not None:
            right.plot(limit[1], limit[2], color=GREY, linestyle=":", label=limit[0])
        label(left, axis, "tokens per second", log=True)
        label(right, axis, "ms of an adaptive step, median", log=False)
    return figure


def label(panel: Axes, axis: Axis, what: str, *, log: bool) -> None:
    """Axes whose ticks are the points; time against the axis is straight where it is linear."""
    values = [point.value for point in axis.points]
    if log:
        panel.set_xscale("log")
        panel.set_yscale("log")
        for side in (panel.xaxis, panel.yaxis):
            side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_minor_formatter(NullFormatter())
    else:
        panel.set_ylim(bottom=0)
    shown = values if log else values[-4:]
    panel.set_xticks(shown, [str(value) for value in shown], fontsize=SMALL)
    panel.set_xlabel(axis.name, fontsize=TEXT)
    panel.set_ylabel(what, fontsize=TEXT)
    panel.tick_params(labelsize=SMALL, colors=GREY)
    panel.grid(visible=True, color="#e4e4e4", linewidth=0.5)
    for side_name in ("top", "right"):
        panel.spines[side_name].set_visible(False)
    if panel.has_data():
        panel.legend(fontsize=SMALL - 1, frameon=False)


def draw_sweep_svg(report: SweepReport) -> str:
    """The picture as an SVG element, without a date, so that equal reports give equal pages."""
    target = io.StringIO()
    with rc_context({"svg.hashsalt": "sweep"}):
        draw_sweep(report).savefig(target, format="svg", metadata={"Date": None, "Creator": None})
    text = target.getvalue()
    return text[text.index("<svg") :]


def save_sweep_chart(report: SweepReport, path: Path) -> None:
    """The picture in a file; its ending says in which format."""
    draw_sweep(report).savefig(path, dpi=DPI, facecolor="white")

"""Pictures of a report as SVG text: step by step, what a step consists of, and speed against agreement."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from dllm_export.tools.bench.records import BenchReport
from dllm_export.tools.bench.summary import NONE, all_runs
from dllm_export.tools.frontier import find_frontier
from dllm_export.tools.frontier_chart import COLOURS, GREY, SMALL, TEXT

LINES = ("-", "--", ":", "-.")
MARKS = ("o", "s", "^", "D")


def draw(name: str, paint: Callable[[Axes], None], height: float) -> str:
    """One picture as an SVG element, without a date, so that equal reports give equal pages."""
    figure = Figure(figsize=(8.4, height), facecolor="white", layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    paint(axes)
    axes.tick_params(labelsize=SMALL, colors=GREY)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    target = io.StringIO()
    with rc_context({"svg.hashsalt": name}):  # names inside the picture: the same every time, and no other picture's
        figure.savefig(target, format="svg", metadata={"Date": None, "Creator": None})
    text = target.getvalue()
    return text[text.index("<svg") :]


def style(number: int) -> tuple[str, str]:
    """A colour and a line that no other of the first 28 runs has."""
    return COLOURS[number % len(COLOURS)], LINES[number // len(COLOURS) % len(LINES)]


def draw_steps(report: BenchReport) -> str:
    """Milliseconds of every step."""

    def paint(axes: Axes) -> None:
        for number, (name, run) in enumerate(all_runs(report.columns)):
            times = [1e3 * step.seconds for step in run.raw.steps]
            colour, line = style(number)
            title = f"{name} {run.policy}"
            axes.plot(range(1, len(times) + 1), times, linewidth=1, label=title, color=colour, linestyle=line)
        axes.set_yscale("log")
        axes.set_xlabel("step", fontsize=TEXT)
        axes.set_ylabel("ms", fontsize=TEXT)
        axes.legend(fontsize=SMALL, frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.18))

    return draw("steps", paint, 4.4)


def draw_breakdown(report: BenchReport) -> str:
    """Median milliseconds of every kind of step beside what the machine could do."""
    bars = [
        (f"{name} {run.policy}, {kind}", summary.times.p50_ms, summary.limit_ms)
        for name, run in all_runs(report.columns)
        for kind, summary in run.kinds.items()
    ][::-1]

    def paint(axes: Axes) -> None:
        places = range(len(bars))
        axes.barh(places, [median for _, median, _ in bars], color=COLOURS[1], height=0.6, label="median")
        limits: Sequence[float] = [limit or 0.0 for _, _, limit in bars]
        if any(limits):
            axes.barh(places, limits, color=COLOURS[5], height=0.25, label="limit of the machine")
        axes.set_yticks(places, [title for title, _, _ in bars], fontsize=SMALL)
        axes.set_xlabel("ms a step", fontsize=TEXT)
        axes.legend(fontsize=SMALL, frameon=False)

    return draw("breakdown", paint, 1.2 + 0.24 * len(bars))


def draw_frontier(report: BenchReport) -> str:
    """Speed of every run against the share of its tokens that equal those of the first run without a cache."""
    runs = list(all_runs(report.columns))
    first = next((name for name, run in runs if run.policy == NONE), "")
    shares = {
        (one.column, one.policy): one.share
        for one in report.agreement
        if (one.reference, one.reference_policy) == (first, NONE)
    }
    points = [
        (f"{name} {run.policy}", run.tokens_per_second, 100 * shares.get((name, run.policy), 1.0)) for name, run in runs
    ]
    best = set(find_frontier([(speed, share) for _, speed, share in points]))

    def paint(axes: Axes) -> None:
        for number, (title, speed, share) in enumerate(points):
            marker, size = MARKS[number // len(COLOURS) % len(MARKS)], 9.0 if number in best else 5.0
            axes.plot(
                speed, share, marker=marker, markersize=size, color=style(number)[0], linestyle="none", label=title
            )
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(min(share for _, _, share in points) - 5, 105)
        axes.set_xlabel("tokens per second", fontsize=TEXT)
        axes.set_ylabel(f"% of tokens equal to {first} {NONE}", fontsize=TEXT)
        axes.legend(fontsize=SMALL, frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.2))

    return draw("frontier", paint, 4.4)

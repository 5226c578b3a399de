"""A report as one self-contained page: tables and pictures, no script, nothing loaded from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import Environment
from markupsafe import Markup

from dllm_export.tools.bench.plots import draw_breakdown, draw_frontier, draw_steps
from dllm_export.tools.bench.records import BenchReport
from dllm_export.tools.bench.sweep import SweepReport
from dllm_export.tools.bench.sweep_plots import draw_sweep_svg
from dllm_export.tools.bench.sweep_tables import (
    GROWTH_HEADER,
    POINT_HEADER,
    describe_axis,
    find_warnings,
    growth_rows,
    point_rows,
)
from dllm_export.tools.bench.tables import (
    GRAPH_HEADER,
    KIND_HEADER,
    RATIO_HEADER,
    RUN_HEADER,
    describe_limits,
    describe_memory,
    describe_settings,
    graph_columns,
    graph_rows,
    kind_rows,
    ratio_rows,
    run_rows,
)

TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{{ title }}</title>
<style>
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 0.5rem 0 1.5rem; font-size: 13px }
th, td { padding: 0.2rem 0.7rem 0.2rem 0; text-align: left; border-bottom: 1px solid #e4e4e4 }
td.number { text-align: right; font-variant-numeric: tabular-nums }
.warning { color: #8a4b00 }
svg { max-width: 100%; height: auto }
code { font-size: 13px; overflow-wrap: anywhere }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p>{{ settings }}</p>
<p><code>{{ command }}</code></p>
{% for warning in warnings %}<p class="warning">{{ warning }}</p>
{% endfor %}
{% for table in tables %}{% if table.rows or table.picture %}
<h2>{{ table.title }}</h2>
{% if table.picture %}{{ table.picture }}{% endif %}
{% if table.rows %}
<table>
<tr>{% for name in table.header %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in table.rows %}<tr>{% for cell in row %}
<td{% if loop.index > table.texts %} class="number"{% endif %}>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table>
{% endif %}{% endif %}{% endfor %}
{% if failures %}<h2>Columns that did not run</h2>
<ul>{% for failure in failures %}<li>{{ failure }}</li>{% endfor %}</ul>{% endif %}
<h2>Machine</h2>
{% for line in lines %}<p>{{ line }}</p>
{% endfor %}
<p>{% for name, version in machine.packages.items() if version %}{{ name }} {{ version }}{{ ", " if not loop.last }}
{% endfor %}</p>
</body>
</html>
"""


@dataclass(frozen=True, slots=True)
class Section:
    """A table under its title; the first `texts` columns hold no numbers."""

    title: str
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    texts: int = 0
    picture: Markup | None = None


def make_page(report: BenchReport) -> str:
    """The page's HTML."""
    tables = (
        Section("Speed and agreement", RUN_HEADER, list(run_rows(report)), 2, Markup(draw_frontier(report))),
        Section("Ratios", RATIO_HEADER, list(ratio_rows(report)), 1),
        Section("Kinds of steps", KIND_HEADER, list(kind_rows(report)), 3, Markup(draw_breakdown(report))),
        Section("Graphs", (GRAPH_HEADER, *graph_columns(report)), list(graph_rows(report)), 1),
        Section("Step by step", picture=Markup(draw_steps(report))),
    )
    return render(
        "dllm-export bench",
        tables,
        machine=report.machine,
        settings=describe_settings(report),
        command=report.command,
        warnings=report.warnings,
        failures=[f"{name}: {why}" for name, why in report.failures.items()],
        lines=[*describe_limits(report), *describe_memory(report)],
    )


def make_sweep_page(report: SweepReport) -> str:
    """The page of a sweep; its picture is that of --chart."""
    last = report.axes[-1].points[-1].report
    tables = [Section("Growth", picture=Markup(draw_sweep_svg(report)))]
    for axis in report.axes:
        tables += [
            Section(axis.name, (axis.name, *POINT_HEADER), list(point_rows(axis)), 3),
            Section(f"{axis.name}: slopes", GROWTH_HEADER, list(growth_rows(axis)), 3),
        ]
    return render(
        "dllm-export bench --sweep",
        tables,
        machine=last.machine,
        settings=describe_settings(last),
        command=report.command,
        warnings=[warning for axis in report.axes for warning in find_warnings(axis)],
        failures=(),
        lines=[line for axis in report.axes for line in describe_axis(axis)],
    )


def render(title: str, tables: Sequence[Section], **values: object) -> str:
    """The finished page."""
    template = Environment(autoescape=True, trim_blocks=True).from_string(TEMPLATE)
    page: str = template.render(title=title, tables=tables, **values)
    return page

"""A report as one self-contained page: tables and pictures, no script, nothing loaded from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import Environment
from markupsafe import Markup

from dllm_export.tools.bench.plots import draw_breakdown, draw_frontier, draw_steps
from dllm_export.tools.bench.records import BenchReport
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
<title>dllm-export bench</title>
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
<h1>dllm-export bench</h1>
<p>{{ settings }}</p>
<p><code>{{ report.command }}</code></p>
{% for warning in report.warnings %}<p class="warning">{{ warning }}</p>
{% endfor %}
{% for table in tables %}{% if table.rows %}
<h2>{{ table.title }}</h2>
{% if table.picture %}{{ table.picture }}{% endif %}
<table>
<tr>{% for name in table.header %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in table.rows %}<tr>{% for cell in row %}
<td{% if loop.index > table.texts %} class="number"{% endif %}>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table>
{% endif %}{% endfor %}
<h2>Step by step</h2>
{{ steps }}
{% if report.failures %}<h2>Columns that did not run</h2>
<ul>{% for name, why in report.failures.items() %}<li>{{ name }}: {{ why }}</li>{% endfor %}</ul>{% endif %}
<h2>Machine</h2>
{% for line in lines %}<p>{{ line }}</p>
{% endfor %}
<p>{% for name, version in report.machine.packages.items() if version %}{{ name }} {{ version }}{{ ", " if not loop.last }}
{% endfor %}</p>
</body>
</html>
"""


@dataclass(frozen=True, slots=True)
class Section:
    """A table under its title; the first `texts` columns hold no numbers."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: int
    picture: Markup | None = None


def make_page(report: BenchReport) -> str:
    """The page's HTML."""
    tables = (
        Section("Speed and agreement", RUN_HEADER, list(run_rows(report)), 2, Markup(draw_frontier(report))),
        Section("Ratios", RATIO_HEADER, list(ratio_rows(report)), 1),
        Section("Kinds of steps", KIND_HEADER, list(kind_rows(report)), 3, Markup(draw_breakdown(report))),
        Section("Graphs", (GRAPH_HEADER, *graph_columns(report)), list(graph_rows(report)), 1),
    )
    page: str = (
        Environment(autoescape=True, trim_blocks=True)
        .from_string(TEMPLATE)
        .render(
            report=report,
            settings=describe_settings(report),
            tables=tables,
            steps=Markup(draw_steps(report)),
            lines=[*describe_limits(report), *describe_memory(report)],
        )
    )
    return page

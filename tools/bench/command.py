"""`dllm-export bench`: every provider and plain PyTorch on the same request, against one another and against the machine."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import click

from dllm_export.errors import IncompatibleError, UsageError
from dllm_export.runtime.policies import CachePolicy
from dllm_export.runtime.transfers import Transfer
from dllm_export.tools.bench.comparison import compare_reports, print_comparison, require_ratios
from dllm_export.tools.bench.measure import measure
from dllm_export.tools.bench.records import BenchReport
from dllm_export.tools.bench.request import QUICK_SHAPE, BenchOptions, Request, ShapeOptions, plan_sweep
from dllm_export.tools.bench.sweep import AXES, Sweep, SweepReport, measure_sweep, read_sweeps
from dllm_export.tools.bench.sweep_tables import print_sweep, sweep_markdown
from dllm_export.tools.bench.tables import markdown, print_bench
from dllm_export.tools.bench.trace import make_trace
from dllm_export.tools.flags import (
    Command,
    Flag,
    check_chart,
    check_report,
    file_flag,
    from_fields,
    policy_flags,
    report_flag,
    shared_flags,
    transfer_flags,
)
from dllm_export.tools.machine import pip_line
from dllm_export.tools.output import print_json, show_progress, write_report, write_text

COMMAND = "dllm-export bench"


def run_sweep(
    request: Request, sweeps: Sequence[Sweep], command: str, report: Path | None, html: Path | None, chart: Path | None
) -> SweepReport:
    """Measure every point; the files are written after each."""

    def save(outcome: SweepReport) -> None:
        write_report(report, outcome)
        if report is not None:
            write_text(report.with_suffix(".md"), sweep_markdown(outcome))
        if html is not None:
            from dllm_export.tools.bench.page import make_sweep_page

            write_text(html, make_sweep_page(outcome))
        if chart is not None:
            from dllm_export.tools.bench.sweep_plots import save_sweep_chart

            save_sweep_chart(outcome, chart)

    with plan_sweep(request, sweeps) as planned, show_progress() as progress:
        return measure_sweep(planned, command, progress, save)


def check_page(context: click.Context, flag: click.Parameter, path: Path | None) -> Path | None:
    """The path, refused before anything runs if it cannot be written or drawn."""
    if path is not None and importlib.util.find_spec("matplotlib") is None:
        raise IncompatibleError(f"--html needs the package matplotlib: {pip_line('matplotlib')}")
    return check_report(context, flag, path)


@click.command("bench", cls=Command)
@click.argument("bundle", required=False, type=click.Path(path_type=Path))
@from_fields(BenchOptions, "options", "Options")
@policy_flags("dllm-cache", without=("shared-prefix",))
@transfer_flags("quota", "threshold")
@from_fields(ShapeOptions, "shape", "Random model, where no bundle is named")
@click.option(
    "--sweep",
    cls=Flag,
    section="Sweep",
    multiple=True,
    metavar="AXIS=A,B,...",
    help=f"measure at each of these values, one after the other, and how steps grow with them: {', '.join(AXES)}; may be "
    f"given again for another axis",
)
@file_flag("--chart", "draw a sweep into this .png, .svg or .pdf file", check_chart)
@click.option(
    "--compare",
    cls=Flag,
    section="Compare",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    nargs=2,
    metavar="A B",
    help="measure nothing: how many times less time the runs of report B take than those of A",
)
@click.option("--force", cls=Flag, section="Compare", is_flag=True, help="compare what is not comparable all the same")
@click.option(
    "--fail-below",
    cls=Flag,
    section="Compare",
    type=click.FLOAT,
    metavar="RATIO",
    help="exit with 3 if a run's ratio is surely below this",
)
@report_flag
@file_flag("--html", "write a page with plots to this file; needs the extra plots", check_page)
@file_flag("--trace", "write the steps as Chrome trace events, for Perfetto, to this file")
@shared_flags
def command(
    bundle: Path | None,
    options: BenchOptions,
    policy: CachePolicy,
    transfer: Transfer | None,
    shape: ShapeOptions,
    sweep: tuple[str, ...],
    chart: Path | None,
    compare: tuple[Path, Path] | None,
    force: bool,
    fail_below: float | None,
    report: Path | None,
    html: Path | None,
    trace: Path | None,
    as_json: bool,
) -> None:
    """Measure every provider and PyTorch on one request, against one another and the machine's limits.

    Each column runs in a process of its own, without a cache and with --policy; one that cannot run says why. Without a
    BUNDLE a random model is measured. docs/benchmarking.md has the rules.
    """
    if compare is not None:
        comparison = compare_reports(*compare, force=force)
        if as_json:
            print_json(comparison)
        else:
            print_comparison(comparison)
        write_report(report, comparison)
        require_ratios(comparison, fail_below)
        return
    sweeps = read_sweeps(sweep)
    if sweeps and trace is not None:
        raise UsageError("--trace shows the steps of one benchmark: leave it out with --sweep")
    if chart is not None and not sweeps:
        raise UsageError("--chart draws a sweep: add --sweep, or take --html for a page with plots")
    if options.quick:
        options = replace(options, prompt_length=24, gen_length=55, steps=min(options.steps or 55, 55))
        shape = QUICK_SHAPE if bundle is None else shape
    arguments = sys.argv[sys.argv.index("bench") + 1 :] if "bench" in sys.argv else []
    asked = shlex.join([*COMMAND.split(), *arguments])
    request = Request(path=bundle, options=options, policy=policy, transfer=transfer, shape=shape)
    if sweeps:
        swept = run_sweep(request, sweeps, asked, report, html, chart)
        if as_json:
            print_json(swept)
        else:
            print_sweep(swept)
        require_columns([point.report for axis in swept.axes for point in axis.points])
        return
    with request.prepare(request.rows) as opened, show_progress() as progress:
        outcome = measure(request.plan(*opened), asked, progress, partial(write_report, report))
    if as_json:
        print_json(outcome)
    else:
        print_bench(outcome)
    write_report(report, outcome)
    if report is not None:
        write_text(report.with_suffix(".md"), markdown(outcome))
    if html is not None:
        from dllm_export.tools.bench.page import make_page

        write_text(html, make_page(outcome))
    if trace is not None:
        write_report(trace, make_trace(outcome))
    require_columns([outcome])


def require_columns(reports: Sequence[BenchReport]) -> None:
    """Fail where nothing ran at all."""
    if not any(report.columns for report in reports):
        why = next(iter(reports[0].failures.values()))
        raise IncompatibleError(f"no column could be measured; the first reason: {why}")

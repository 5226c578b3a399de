"""A report as tables: on the terminal, and as Markdown beside its JSON and in the README."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dllm_export.tools.bench.records import Agreement, BenchReport, Run, Settings
from dllm_export.tools.bench.summary import NONE, all_runs
from dllm_export.tools.output import format_bytes, make_table, print_note, print_table, print_warning

Row = Sequence[str]

RUN_HEADER = (
    *("column", "policy", "tokens/s", "x first", "passes", "a pass", "outside", "% of limit", "x products"),
    "tokens equal to",
)
KIND_HEADER = (
    *("column", "policy", "step", "n", "p50 ms", "p90", "p99", "spread", "limit ms", "% of limit"),
    "bound by",
)
GRAPH_HEADER = "graph, ms per call"
RATIO_HEADER = ("ratio", "times as fast", "95 % interval", "bar", "")


def print_bench(report: BenchReport) -> None:
    """Every figure that a person looks for first; the JSON has the others."""
    sections = (
        (RUN_HEADER, run_rows(report), 2),
        (KIND_HEADER, kind_rows(report), 3),
        ((GRAPH_HEADER, *graph_columns(report)), graph_rows(report), 1),
        (RATIO_HEADER, ratio_rows(report), 1),
    )
    for header, rows, texts in sections:
        made = list(rows)
        if made:
            table = make_table(*header, right=header[texts:])
            for row in made:
                table.add_row(*row)
            print_table(table)
            print_note("")
    for line in (*describe_limits(report), *describe_memory(report)):
        print_note(line)
    for name, why in report.failures.items():
        print_note(f"{name}: {why}", "yellow")
    for warning in report.warnings:
        print_warning(warning)
    print_note(describe_settings(report))
    print_note(report.command)


def run_rows(report: BenchReport) -> Iterable[Row]:
    """One line for every run: speed beside agreement."""
    ratios = {(one.column, one.policy): one for one in reversed(report.ratios) if is_first(report, one.baseline)}
    for name, run in all_runs(report.columns):
        ratio = ratios.get((name, run.policy))
        yield (
            name,
            run.policy,
            f"{run.tokens_per_second:.2f}",
            f"{ratio.value:.2f}" if ratio else "1.00",
            str(run.passes),
            f"{run.tokens_per_pass:.4g}",
            "" if run.outside_engines is None else f"{run.outside_engines:.1%}",
            "" if run.share_of_limit is None else f"{run.share_of_limit:.0%}",
            "" if run.times_products is None else f"{run.times_products:.2f}",
            describe_agreement(report.agreement, name, run),
        )


def is_first(report: BenchReport, column: str) -> bool:
    """Whether this is the column that all are compared with."""
    return column == next(iter(report.columns), None)


def describe_agreement(agreement: Sequence[Agreement], column: str, run: Run) -> str:
    """Shares of equal tokens, with the run that they are equal to."""
    own = [one for one in agreement if (one.column, one.policy) == (column, run.policy)]
    return "; ".join(f"{one.reference} {one.reference_policy}: {one.share:.0%}" for one in own) or "-"


def kind_rows(report: BenchReport) -> Iterable[Row]:
    """One line for every kind of step of every run."""
    for name, run in all_runs(report.columns):
        for kind, summary in run.kinds.items():
            times = summary.times
            yield (
                name,
                run.policy,
                kind,
                str(times.samples),
                *(f"{value:.2f}" for value in (times.p50_ms, times.p90_ms, times.p99_ms)),
                f"{times.spread:.0%}",
                "" if summary.limit_ms is None else f"{summary.limit_ms:.2f}",
                "" if summary.share_of_limit is None else f"{summary.share_of_limit:.0%}",
                summary.bound_by or "",
            )


def graph_columns(report: BenchReport) -> tuple[str, ...]:
    """Columns whose graphs were timed."""
    return tuple(name for name, column in report.columns.items() if column.raw.graphs)


def graph_rows(report: BenchReport) -> Iterable[Row]:
    """One line for every graph and sizes."""
    names = graph_columns(report)
    cases: dict[str, dict[str, str]] = {}
    for name in names:
        for graph in report.columns[name].raw.graphs:
            sizes = ", ".join(f"{dim}={size}" for dim, size in graph.sizes.items() if dim != "B")
            cases.setdefault(f"{graph.graph}, {sizes}", {})[name] = f"{graph.call.p50_ms:.3f}"
    for case, times in cases.items():
        yield (case, *(times.get(name, "-") for name in names))


def ratio_rows(report: BenchReport) -> Iterable[Row]:
    """Cached runs against their baselines, and what a bar bounds."""
    for one in report.ratios:
        if one.bar is not None or one.policy != NONE:
            verdict = "" if one.met is None else "met" if one.met else "MISSED"
            bar = "" if one.bar is None else f"at least {one.bar:g}"
            title = f"{one.column} {one.policy} / {one.baseline} {one.baseline_policy}"
            yield title, f"{one.value:.2f}", f"{one.low:.2f} to {one.high:.2f}", bar, verdict
    for over in report.times_products:
        if over.bar is not None:
            verdict = "met" if over.met else "MISSED"
            title = f"{over.column} {over.policy}, time / its matrix products alone"
            yield title, f"{over.value:.2f}", "", f"at most {over.bar:g}", verdict


def describe_limits(report: BenchReport) -> Iterable[str]:
    """What the machine does at best."""
    limits = report.limits
    if limits is None:
        yield f"the machine's limits are not known: {report.limits_failure}"
        return
    yield (
        f"limits of this machine ({report.settings.device}, {' and '.join(limits.libraries)}): copies "
        f"{limits.bytes_per_second / 1e9:.1f} GB/s, multiplies {limits.flops_per_second / 1e9:.0f} GFLOP/s; below "
        f"{report.break_even_rows:.0f} rows a step is bound by reading weights"
    )
    alone = ", ".join(f"{policy} {milliseconds:.0f} ms" for policy, milliseconds in report.products_ms.items())
    if alone:
        yield f"matrix products of all timed steps, each timed alone: {alone}"


def describe_memory(report: BenchReport) -> Iterable[str]:
    """What every column held."""
    held = []
    for name, column in report.columns.items():
        device = column.raw.device_memory
        held.append(
            f"{name} {format_bytes(column.raw.host_memory)}" + (f" + {format_bytes(device)} GPU" if device else "")
        )
    if held:
        yield f"memory: {', '.join(held)}"


def describe_settings(report: BenchReport) -> str:
    """What was measured, where, with what."""
    settings, machine, shape = report.settings, report.machine, report.settings.shape
    libraries = dict.fromkeys(column.raw.library for column in report.columns.values())
    place = ", ".join([machine.cpu, f"{machine.cores} cores", *(gpu.name for gpu in machine.gpus)])
    return (
        f"d={shape.hidden}, {shape.layers} layers, {settings.dtype}, prompt {settings.prompt}, response "
        f"{settings.response}, batch {settings.batch}, {settings.steps} steps timed, {describe_rule(settings)}; {place}; "
        f"{', '.join(libraries)}"
    )


def describe_rule(settings: Settings) -> str:
    """How many tokens a step decides of each sequence, or which rule says so."""
    rule, count = settings.transfer, settings.tokens_per_step
    if rule.name == "quota":
        return "one token a step" if count == 1 else f"{count} tokens a step"
    options = "".join(f", {name} {value}" for name, value in rule.settings.items())
    return f"rule {rule.name}{options}"


def markdown(report: BenchReport) -> str:
    """The runs as a Markdown table: every speed beside its agreement."""
    lines = ["| | policy | tokens/s | x first | % of the limit | tokens equal to |", "|---|---|---|---|---|---|"]
    for name, policy, speed, ratio, *_rest, share, _products, equal in run_rows(report):
        lines.append(f"| {name} | {policy} | {speed} | {ratio} | {share or '-'} | {equal} |")
    lines += [f"| {name} | | | | | {why} |" for name, why in report.failures.items()]
    bars = [row for row in ratio_rows(report) if row[3]]
    if bars:
        lines += ["", "| ratio | | 95 % interval | bar | |", "|---|---|---|---|---|"]
        lines += [f"| {' | '.join(row)} |" for row in bars]
    return "\n".join([*lines, "", f"{describe_settings(report)}. `{report.command}`"]) + "\n"

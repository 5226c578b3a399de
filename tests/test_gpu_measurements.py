"""Measurements on GPUs: tables are made from the files, and the bars that were set for an H100 hold in them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import msgspec
import pytest

from dllm_export.tools.bench.growth import Slopes
from dllm_export.tools.bench.records import BenchReport, EmbeddedTimes, Ratio, Run
from dllm_export.tools.bench.sweep import SweepReport
from dllm_export.tools.bench.tables import markdown

ROOT = Path(__file__).resolve().parents[1]
PAGE = "docs/measurements/README.md"
GPU = "docs/measurements/h200.json"
GPU_BATCH = "docs/measurements/h200-batch4.json"
GPU_TOKENS = "docs/measurements/h200-tokens4.json"
GPU_ANSWERS = "docs/measurements/h200-answers.json"
GPU_EMBEDDED = "docs/measurements/h200-embedded.json"
GPU_SWEEP = "docs/measurements/sweep-h200.json"
H100 = "docs/measurements/h100.json"
H100_BATCH = "docs/measurements/h100-batch4.json"
H100_TOKENS = "docs/measurements/h100-tokens4.json"
H100_ENGINES = "docs/measurements/h100-tensorrt.json"
H100_EMBEDDED = "docs/measurements/h100-embedded.json"
H100_WHOLE = "docs/measurements/h100-tokens1.json"
H100_THRESHOLD = "docs/measurements/h100-threshold.json"
H100_PROMPT_SWEEP = "docs/measurements/sweep-h100.json"
H100_BATCH_SWEEP = "docs/measurements/sweep-batch-h100.json"


def gpu_report(file: str = GPU) -> BenchReport:
    """Every provider in one run of tools/gpu_check."""
    return msgspec.convert(json.loads((ROOT / file).read_text())["bench"], BenchReport)


def gpu_run(report: BenchReport, column: str, policy: str) -> Run:
    """A column's run with a policy."""
    (run,) = (run for run in report.columns[column].runs if run.policy == policy)
    return run


def gpu_graph(report: BenchReport, column: str, graph: str, count: int) -> float:
    """Milliseconds of a graph with this many rows, by itself."""
    return next(
        timed.call.p50_ms
        for timed in report.columns[column].raw.graphs
        if timed.graph == graph and timed.sizes.get("Q") == count
    )


def gpu_tables(report: BenchReport) -> str:
    """Steps of every kind, memory and opening of every provider on a GPU, and graphs by themselves."""
    sizes: dict[str, dict[str, float]] = {}
    for name, column in report.columns.items():
        for graph in column.raw.graphs:
            dims = ", ".join(f"{dim}={size}" for dim, size in graph.sizes.items() if dim != "B")
            sizes.setdefault(f"{graph.graph}, {dims}", {})[name] = graph.call.p50_ms
    timed = [name for name, column in report.columns.items() if column.raw.graphs]
    rows = [f"| ms per call | {' | '.join(timed)} |", "|---" * (len(timed) + 1) + "|"]
    rows += [f"| {case} | {' | '.join(f'{times[name]:.3f}' for name in timed)} |" for case, times in sizes.items()]
    rows += ["", "| | policy | ms a step, median | outside engines | GB | opened in |", "|---|---|---|---|---|---|"]
    for name, column in report.columns.items():
        memory, opened = f"{(column.raw.device_memory or 0) / 1e9:.1f}", f"{column.raw.open_seconds:.1f} s"
        for run in column.runs:
            kinds = ", ".join(f"{kind} {one.times.p50_ms:.2f}" for kind, one in run.kinds.items())
            outside = "" if run.outside_engines is None else f"{run.outside_engines:.1%}"
            rows.append(f"| {name} | {run.policy} | {kinds} | {outside} | {memory} | {opened} |")
    return "\n".join(rows) + "\n"


def gpu_sweep(file: str, name: str) -> str:
    """Speed and adaptive steps at several points of an axis, on a GPU."""
    axes = msgspec.json.decode((ROOT / file).read_bytes(), type=SweepReport).axes
    (axis,) = (axis for axis in axes if axis.name == name)
    rows = [
        f"| {name} | none, tokens/s | dllm-cache, tokens/s | adaptive step, ms | its limit |",
        "|---|---|---|---|---|",
    ]
    for point in axis.points:
        plain, cached = (gpu_run(point.report, "torch-compile-graph", policy) for policy in ("none", "dllm-cache"))
        step = cached.kinds["partial"]
        rows.append(
            f"| {point.value} | {plain.tokens_per_second:.0f} | {cached.tokens_per_second:.0f} | "
            f"{step.times.p50_ms:.2f} | {step.limit_ms:.2f} |"
        )
    return "\n".join(rows) + "\n"


def gpu_embedded() -> str:
    """A partial layer's stages with weights as inputs and as constants, on both GPUs."""
    found = embedded_times()
    rows = ["| microseconds | first stage | second stage | both |", "|---|---|---|---|"]
    for form, parts in found.ms.items():
        rows.append(f"| {found.gpu}, {form} | {' | '.join(f'{1e3 * median(times):.1f}' for times in parts.values())} |")
    times = json.loads((ROOT / H100_EMBEDDED).read_text())["ms"]
    for form in ("bound", "embedded", "bound, q, k and v joined", "embedded, q, k and v joined"):
        second = f"{form.split(',')[0]}: finish"  # the joined product is the first stage's alone
        cells = (f"{1e3 * median(times[name]):.1f}" for name in (f"{form}: project", second, form))
        rows.append(f"| H100, {form} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def embedded_times() -> EmbeddedTimes:
    """What `gpu_check --embedded` measured."""
    return msgspec.convert(json.loads((ROOT / GPU_EMBEDDED).read_text())["embedded"]["tensorrt"], EmbeddedTimes)


def gpu_answers() -> str:
    """Share of the demo model's tokens that equal the reference's, the least of captured and not."""
    answers = json.loads((ROOT / GPU_ANSWERS).read_text())["answers"]
    generations = list(dict.fromkeys(answer["generation"] for answer in answers))
    rows = [f"| tokens equal to the reference | {' | '.join(generations)} |", "|---" * (len(generations) + 1) + "|"]
    for provider, dtype in dict.fromkeys((answer["column"], answer["dtype"]) for answer in answers):
        shares = (
            min(
                answer["equal"]
                for answer in answers
                if (answer["column"], answer["dtype"], answer["generation"]) == (provider, dtype, generation)
            )
            for generation in generations
        )
        rows.append(f"| {provider}, {dtype} | {' | '.join(f'{share:.1%}' for share in shares)} |")
    return "\n".join(rows) + "\n"


def gpu_ratio(report: BenchReport, baseline: str) -> Ratio:
    """The best provider with the cache against a baseline."""
    (found,) = (
        one
        for one in report.ratios
        if (one.column, one.policy, one.baseline) == ("torch-compile-graph", "dllm-cache", baseline)
    )
    return found


def times_the_best(file: str, report: BenchReport) -> float:
    """Tokens/s of the best provider in a file over those in the report."""
    other = msgspec.json.decode((ROOT / file).read_bytes(), type=BenchReport)
    speeds = [gpu_run(one, "torch-compile-graph", "dllm-cache").tokens_per_second for one in (other, report)]
    return speeds[0] / speeds[1]


def times_its_graphs(report: BenchReport) -> float:
    """An adaptive step of TensorRT over its graphs: the first layer is partial, the others adaptive."""
    parts = gpu_graph(report, "tensorrt", "layer_partial", 64) + gpu_graph(report, "tensorrt", "head", 256)
    parts += 31 * gpu_graph(report, "tensorrt", "layer_adaptive", 64)
    return gpu_run(report, "tensorrt", "dllm-cache").kinds["partial"].times.p50_ms / parts


def times_what_it_must_hold(report: BenchReport) -> float:
    """Device memory of TensorRT over weights once, caches in one copy, and workspace."""
    raw = report.columns["tensorrt"].raw
    assert raw.session is not None
    caches = 32 * (2 * 1149 + 256) * 4096 * 2  # keys and values of all rows, deltas of the response
    return raw.session.peak_memory / (raw.session.memory["weights"] + caches + raw.session.memory["workspace"])


@dataclass(frozen=True)
class Bar:
    """One bar of an H100, and what was measured there and on an H200."""

    what: str
    limit: float
    h100: float
    h200: float | None
    unit: str = ""
    at_least: bool = False

    def holds(self, value: float) -> bool:
        """Whether the bar is met."""
        return value >= self.limit if self.at_least else value <= self.limit


def gpu_bars() -> list[Bar]:
    """Every bar that was set for an H100; engines there are those of a later file than the best provider."""
    first, now, engines = gpu_report(H100), gpu_report(GPU), gpu_report(H100_ENGINES)
    best = [gpu_run(report, "torch-compile-graph", "dllm-cache") for report in (first, now)]
    plain = [gpu_run(report, "torch-compile-graph", "none").kinds["full"].times.p50_ms for report in (first, now)]
    compiled = [gpu_run(report, "eager-compile-graph", "none").kinds["full"].times.p50_ms for report in (first, now)]
    adaptive = [run.kinds["partial"] for run in best]
    limits = [one.times.p50_ms / (one.limit_ms or 0.0) for one in adaptive]
    outside = [100 * (run.outside_engines or 0.0) for run in best]
    embedded, first_embedded = embedded_times().ms, json.loads((ROOT / H100_EMBEDDED).read_text())["ms"]
    fastest = min(median(first_embedded[form]) for form in ("embedded", "embedded, q, k and v joined"))
    bound = median(first_embedded["bound"]) / fastest
    bound_now = median(embedded["bound"]["all"]) / median(embedded["embedded"]["all"])
    many = msgspec.json.decode((ROOT / H100_THRESHOLD).read_bytes(), type=BenchReport)
    run = gpu_run(many, "torch-compile-graph", "dllm-cache")
    whole = msgspec.json.decode((ROOT / H100_WHOLE).read_bytes(), type=BenchReport)
    threshold = times_the_best(H100_THRESHOLD, whole) / (run.canvas_tokens / run.passes)
    ratios = {name: [gpu_ratio(report, name).value for report in (first, now)] for name in ("eager", "four-feature")}
    tensorrt = [gpu_graph(report, "tensorrt", "layer_partial", 64) for report in (engines, now)]
    onnxruntime = [gpu_graph(report, "onnxruntime-cuda", "layer_partial", 64) for report in (first, now)]
    opened = [report.columns["tensorrt"].raw.open_seconds for report in (engines, now)]
    batch = (times_the_best(H100_BATCH, first), times_the_best(GPU_BATCH, now))
    tokens = (times_the_best(H100_TOKENS, first) / 4, times_the_best(GPU_TOKENS, now) / 4)
    return [
        Bar("best provider, tokens/s", 100, best[0].tokens_per_second, best[1].tokens_per_second, at_least=True),
        Bar("... times plain PyTorch without a cache", 4, *ratios["eager"], at_least=True),
        Bar("... times plain PyTorch with the published cache", 3.3, *ratios["four-feature"], at_least=True),
        Bar("full step, times the compiled and captured model", 1.05, plain[0] / compiled[0], plain[1] / compiled[1]),
        Bar("adaptive step, times its limit", 1.6, *limits),
        Bar("time outside engines", 3, *outside, unit=" %"),
        Bar("batch 4, times the tokens/s of batch 1", 1.6, *batch, at_least=True),
        Bar("four tokens a step, tokens/s over four times those of one", 0.9, *tokens, at_least=True),
        Bar("threshold decoding, tokens/s over what tokens a pass promise", 0.9, threshold, None, at_least=True),
        Bar("TensorRT 8.6, partial layer of 64 rows", 0.48, *tensorrt, unit=" ms"),
        Bar("... bound weights, times embedded ones", 1.03, bound, bound_now),
        Bar("... adaptive step, times its graphs", 1.10, times_its_graphs(engines), times_its_graphs(now)),
        Bar(
            "... device memory, times weights once, caches and workspace",
            1.05,
            times_what_it_must_hold(engines),
            times_what_it_must_hold(now),
        ),
        Bar("... opening", 12, *opened, unit=" s"),
        Bar("ONNX Runtime on CUDA, partial layer of 64 rows", 0.42, *onnxruntime, unit=" ms"),
    ]


def bar_table() -> str:
    """The bars as Markdown."""
    rows = ["| bar | | H100 | H200 |", "|---|---|---|---|"]
    for bar in gpu_bars():
        way = "at least" if bar.at_least else "at most"

        def cell(value: float | None, bar: Bar = bar) -> str:
            if value is None:
                return "not measured"
            digits = 1 if bar.limit >= 3 and bar.unit else 3 if bar.unit else 1 if bar.limit >= 100 else 2
            return f"{value:.{digits}f}{bar.unit}{'' if bar.holds(value) else ', **missed**'}"

        rows.append(f"| {bar.what} | {way} {bar.limit:g}{bar.unit} | {cell(bar.h100)} | {cell(bar.h200)} |")
    return "\n".join(rows) + "\n"


SECTIONS: Mapping[tuple[str, str], Callable[[], str]] = {
    (PAGE, "gpu-speed"): lambda: f"{markdown(gpu_report())}\n",
    (PAGE, "gpu-bars"): bar_table,
    (PAGE, "gpu"): lambda: gpu_tables(gpu_report()),
    (PAGE, "gpu-embedded"): gpu_embedded,
    (PAGE, "gpu-sweep-prompt"): lambda: gpu_sweep(H100_PROMPT_SWEEP, "prompt-length"),
    (PAGE, "gpu-sweep-batch"): lambda: gpu_sweep(H100_BATCH_SWEEP, "batch"),
    (PAGE, "gpu-sweep-response"): lambda: gpu_sweep(GPU_SWEEP, "gen-length"),
    (PAGE, "gpu-sweep-layers"): lambda: gpu_sweep(GPU_SWEEP, "layers"),
    (PAGE, "gpu-answers"): gpu_answers,
    ("README.md", "measured-gpu"): lambda: f"{markdown(gpu_report())}\nAll figures: [{GPU}]({GPU}).\n",
}
"""(page, section) -> what stands there."""


@pytest.mark.parametrize("file", [PAGE, "README.md"])
def test_every_table_of_a_gpu_is_made_from_the_measurements(file: str, tmp_path: Path) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    names = {name for page, name in SECTIONS if page == file}

    def renew(match: re.Match[str]) -> str:
        return match[1] + SECTIONS[file, match[2]]() + match[3]

    pattern = rf"(<!-- ({'|'.join(names)}): begin -->\n).*?(<!-- \2: end -->)"
    renewed, count = re.subn(pattern, renew, text, flags=re.DOTALL)
    assert count == len(names)
    made = tmp_path / Path(file).name
    made.write_text(renewed, encoding="utf-8")
    assert renewed == text, f"the page is behind the measurements: cp {made} {ROOT / file}"


def test_every_token_of_the_bundled_model_is_the_references_on_every_provider() -> None:
    answers = json.loads((ROOT / GPU_ANSWERS).read_text())["answers"]
    asked = {(one["column"], one["dtype"], one["generation"], one["captures"] > 0) for one in answers}
    columns = {"torch": (False,), **dict.fromkeys(("torch-graph", "onnxruntime-cuda", "tensorrt"), (False, True))}
    assert asked == {
        (column, dtype, generation, captured)
        for column, ways in columns.items()
        for captured in ways
        for dtype in ("float32", "float16")
        for generation in ("none", "dllm-cache", "guided")
    }
    assert {one["equal"] for one in answers} == {1.0}


@pytest.mark.parametrize("bar", gpu_bars(), ids=lambda bar: bar.what)
def test_the_bars_that_were_set_for_an_h100_hold_there(bar: Bar) -> None:
    """Ratios within one run; a batch, more tokens a step and whole generations were measured right behind."""
    assert bar.holds(bar.h100)


def test_an_h200_misses_one_of_them() -> None:
    """Its memory is 1.4 times as fast as an H100's and its arithmetic is not, so that the limit of a step is nearer."""
    assert "H200" in gpu_report().machine.gpus[0].name
    assert "H100" in gpu_report(H100).machine.gpus[0].name
    missed = [bar.what for bar in gpu_bars() if bar.h200 is not None and not bar.holds(bar.h200)]
    assert missed == ["adaptive step, times its limit"]


@pytest.mark.parametrize("file", [GPU, H100])
def test_the_published_caches_bar_holds_at_the_low_end_of_the_interval(file: str) -> None:
    """Its steps spread widely on both machines."""
    assert gpu_ratio(gpu_report(file), "four-feature").low >= 3.3


@pytest.mark.parametrize("file", [GPU, H100, H100_ENGINES])
def test_engines_keep_their_bars_in_every_run(file: str) -> None:
    """Also with the engines before values were multiplied apart."""
    report = gpu_report(file)
    for policy in ("none", "dllm-cache"):
        outside = gpu_run(report, "tensorrt", policy).outside_engines
        assert outside is not None
        assert outside <= 0.03
    assert gpu_graph(report, "tensorrt", "layer_partial", 64) <= 0.48
    assert times_its_graphs(report) <= 1.10
    assert times_what_it_must_hold(report) <= 1.05
    assert report.columns["tensorrt"].raw.open_seconds < 12


def test_a_threshold_commits_several_tokens_in_a_pass_and_leaves_no_gaps() -> None:
    """Both generations whole, one after the other on one GPU."""
    one, many = (
        gpu_run(msgspec.json.decode((ROOT / file).read_bytes(), type=BenchReport), "torch-compile-graph", "dllm-cache")
        for file in (H100_WHOLE, H100_THRESHOLD)
    )
    assert one.passes == one.canvas_tokens == many.canvas_tokens == 256
    assert many.passes < 256
    assert many.outside_engines is not None
    assert many.outside_engines <= 0.03


@pytest.mark.parametrize("file", [GPU, H100])
def test_intervals_in_the_text_are_those_of_the_files(file: str) -> None:
    text = " ".join((ROOT / PAGE).read_text(encoding="utf-8").split())
    for baseline in ("eager", "four-feature"):
        ratio = gpu_ratio(gpu_report(file), baseline)
        assert f"{ratio.low:.2f} to {ratio.high:.2f}" in text


def test_engines_that_are_compared_compute_the_same() -> None:
    """float16: engines may sum 4096 products in it, in any order."""
    assert embedded_times().difference < 0.01


def growth(file: str, axis: str) -> Slopes:
    """How an adaptive step of the best provider grows with an axis."""
    report = msgspec.json.decode((ROOT / file).read_bytes(), type=SweepReport)
    (found,) = (
        one.slopes
        for swept in report.axes
        if swept.name == axis
        for one in swept.growth
        if (one.policy, one.kind) == ("dllm-cache", "partial")
    )
    return found


def test_an_adaptive_step_on_a_gpu_grows_with_the_prompt_as_reading_its_keys_and_values_does() -> None:
    slopes = growth(H100_PROMPT_SWEEP, "prompt-length")
    assert slopes.at_most_linear
    assert slopes.reading_ms is not None
    assert slopes.low_ms <= slopes.reading_ms <= slopes.high_ms


def test_an_adaptive_step_on_a_gpu_grows_at_most_linearly_with_the_layers_and_faster_with_the_response() -> None:
    assert growth(GPU_SWEEP, "layers").at_most_linear
    assert not growth(GPU_SWEEP, "gen-length").at_most_linear

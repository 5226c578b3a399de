"""The documentation says what the code does: tables are regenerated, README blocks are executed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
import pytest

from dllm_export.graphs import ModelShape, TensorSpec, graph_specs
from dllm_export.runtime.manifest import Manifest
from dllm_export.tools.bench.columns import COLUMNS
from dllm_export.tools.bench.records import BenchReport, Run
from dllm_export.tools.bench.summary import BARS
from dllm_export.tools.bench.sweep import SweepReport
from dllm_export.tools.bench.tables import markdown

ROOT = Path(__file__).resolve().parents[1]
MEASURED = "docs/measurements/cpu-2-core.json"
FRONTIER = "docs/measurements/frontier-2-core.json"
DREAM_FRONTIER = "docs/measurements/frontier-dream-2-core.json"
SWEEP = "docs/measurements/sweep-2-core.json"
SDAR_FRONTIER = "docs/measurements/frontier-sdar-2-core.json"
GPU = "docs/measurements/h100.json"
GPU_BATCH = "docs/measurements/h100-batch4.json"
GPU_TOKENS = "docs/measurements/h100-tokens4.json"
GPU_SWEEP = "docs/measurements/sweep-h100.json"
GPU_BATCH_SWEEP = "docs/measurements/sweep-batch-h100.json"
GPU_H200 = "docs/measurements/h200.json"
GPU_ANSWERS = "docs/measurements/h100-answers.json"
GPU_ENGINES = "docs/measurements/h100-tensorrt.json"
GPU_EMBEDDED = "docs/measurements/h100-embedded.json"
GPU_WHOLE = "docs/measurements/h100-tokens1.json"
GPU_THRESHOLD = "docs/measurements/h100-threshold.json"


def section(file: str, name: str) -> str:
    text = (ROOT / file).read_text()
    found = re.search(rf"<!-- {name}: begin -->\n(.*?)<!-- {name}: end -->", text, re.DOTALL)
    assert found, f"{file} has no generated section '{name}'"
    return found.group(1)


def show(tensor: TensorSpec) -> str:
    return f"`{tensor.name}` {tensor.type} [{', '.join(map(str, tensor.dims))}]"


def graph_table(shape: ModelShape) -> str:
    rows = ["| graph | inputs | weights | outputs |", "|---|---|---|---|"]
    for name, spec in graph_specs(shape).items():
        columns = ("<br>".join(map(show, tensors)) for tensors in (spec.inputs, spec.weights, spec.outputs))
        rows.append(f"| `{name}` | {' | '.join(columns)} |")
    return "\n".join(rows) + "\n"


def measured_table() -> str:
    """The README's table from the CPU measurement: every speed beside its agreement."""
    data = (ROOT / MEASURED).read_bytes()
    report = json.loads(data)
    if "schema" in report:
        return f"{markdown(msgspec.json.decode(data, type=BenchReport))}\nAll figures: [{MEASURED}]({MEASURED}).\n"
    agreement = {(row["column"], row["reference"]): row for row in report["agreement"]}
    rows = ["| | tokens/s | x eager, no cache | tokens equal to |", "|---|---|---|---|"]
    base = report["columns"][0]["tokens_per_second"]
    for column in report["columns"]:
        equal = [
            f"{reference}: {row['share']:.0%}" for (name, reference), row in agreement.items() if name == column["name"]
        ]
        speed = column["tokens_per_second"]
        rows.append(f"| {column['name']} | {speed:.2f} | {speed / base:.1f} | {'; '.join(equal) or '-'} |")
    settings, machine = report["settings"], report["machine"]
    shape = settings["shape"]
    rows += [
        "",
        f"Random weights, d={shape['hidden']}, {shape['layers']} layers, {settings['dtype']}, prompt {settings['prompt']}, "
        f"response {settings['response']}, batch {settings['batch']}, one token per step; {machine['cpu']}, "
        f"{machine['cores']} cores, onnxruntime {machine['onnxruntime']}, torch {machine['torch']}. "
        f"`{report['command']}`; all figures: [{MEASURED}]({MEASURED}).",
    ]
    return "\n".join(rows) + "\n"


def frontier_table(file: str) -> str:
    """Every policy at one token a step and with its fastest rule; every speed beside its answers."""
    outcomes = json.loads((ROOT / file).read_text())["outcomes"]
    by_policy: dict[str, list[dict[str, Any]]] = {}
    for one in sorted(outcomes, key=lambda one: one["seconds"]):
        by_policy.setdefault(one["policy"], []).append(one)
    (slowest,) = (one for one in outcomes if (one["policy"], one["transfer"]) == ("none", "quota"))
    rows = [
        "| policy | `quota`: tokens/s | x none | right | plan and sampling "
        "| fastest rule | tokens/s | x none | tokens per pass | right |",
        "|---" * 10 + "|",
    ]

    def speed(one: dict[str, Any]) -> str:
        return f"{one['tokens'] / one['seconds']:.0f} | {slowest['seconds'] / one['seconds']:.2f}"

    singles = [one for one in outcomes if one["transfer"] == "quota"]
    for single in sorted(singles, key=lambda one: one["seconds"]):
        policy, best = single["policy"], by_policy[single["policy"]][0]
        rows.append(
            f"| `{policy}` | {speed(single)} | {single['right']} of {single['asked']} | "
            f"{single['strategy_seconds'] / single['seconds']:.1%} | `{best['transfer']}` | {speed(best)} | "
            f"{best['tokens'] / best['passes']:.1f} | {best['right']} of {best['asked']} |"
        )
    return "\n".join(rows) + "\n"


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


def gpu_sweep(file: str, what: str) -> str:
    """Speed and adaptive steps at several points of an axis, on a GPU."""
    (axis,) = msgspec.json.decode((ROOT / file).read_bytes(), type=SweepReport).axes
    rows = [
        f"| {what} | none, tokens/s | dllm-cache, tokens/s | adaptive step, ms | its limit |",
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
    """A partial layer's stages with weights as inputs and as constants."""
    times = json.loads((ROOT / GPU_EMBEDDED).read_text())["ms"]
    rows = ["| microseconds | first stage | second stage | both |", "|---|---|---|---|"]
    for form in ("bound", "embedded", "bound, q, k and v joined", "embedded, q, k and v joined"):
        second = f"{form.split(',')[0]}: finish"  # the joined product is the first stage's alone
        cells = (f"{1e3 * median(times[name]):.1f}" for name in (f"{form}: project", second, form))
        rows.append(f"| {form} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


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


def test_the_tables_of_a_gpu_equal_the_measurement() -> None:
    """In the README, and where they are explained."""
    table = markdown(gpu_report())
    assert section("docs/measurements/README.md", "gpu-speed") == f"{table}\n"
    assert section("README.md", "measured-gpu") == f"{table}\nAll figures: [{GPU}]({GPU}).\n"
    assert section("docs/measurements/README.md", "gpu") == gpu_tables(gpu_report())
    assert section("docs/measurements/README.md", "gpu-engines") == gpu_tables(gpu_report(GPU_ENGINES))
    assert section("docs/measurements/README.md", "gpu-embedded") == gpu_embedded()
    assert section("docs/measurements/README.md", "gpu-sweep") == gpu_sweep(GPU_SWEEP, "prompt")
    assert section("docs/measurements/README.md", "gpu-sweep-batch") == gpu_sweep(GPU_BATCH_SWEEP, "batch")
    assert section("docs/measurements/README.md", "gpu-answers") == gpu_answers()


@pytest.mark.parametrize("file", [GPU, GPU_H200])
def test_figures_beside_the_bars_are_those_of_the_files(file: str) -> None:
    report, text = gpu_report(file), (ROOT / "docs/measurements/README.md").read_text()
    best = gpu_run(report, "torch-compile-graph", "dllm-cache")
    adaptive = best.kinds["partial"]
    ratios = {
        one.baseline: one for one in report.ratios if (one.column, one.policy) == ("torch-compile-graph", "dllm-cache")
    }
    published = ratios["four-feature"]
    assert adaptive.limit_ms is not None
    for figure in (
        f"{best.tokens_per_second:.1f}",
        f"{ratios['eager'].value:.2f}",
        f"{published.value:.2f} ({published.low:.2f} to {published.high:.2f})",
        f"{adaptive.times.p50_ms / adaptive.limit_ms:.2f} ({adaptive.times.p50_ms:.2f} ms)",
    ):
        assert figure in text


def test_the_bars_that_the_best_provider_met_on_a_gpu_stay_in_the_measurement() -> None:
    """Ratios within one run: the cache against plain PyTorch and against the published one, a full step against a captured,
    compiled model, an adaptive one against its limit. A batch and more tokens a step were measured right behind.
    """
    report = gpu_report()
    assert "H100" in report.machine.gpus[0].name
    ratios = {
        one.baseline: one for one in report.ratios if (one.column, one.policy) == ("torch-compile-graph", "dllm-cache")
    }
    assert ratios["eager"].value >= 4
    assert ratios["four-feature"].low >= 3.3
    full = gpu_run(report, "torch-compile-graph", "none").kinds["full"].times.p50_ms
    assert full <= 1.05 * gpu_run(report, "eager-compile-graph", "none").kinds["full"].times.p50_ms
    best = gpu_run(report, "torch-compile-graph", "dllm-cache")
    one, adaptive, outside = best.tokens_per_second, best.kinds["partial"], best.outside_engines
    assert one >= 100
    assert adaptive.limit_ms is not None
    assert adaptive.times.p50_ms <= 1.6 * adaptive.limit_ms
    assert outside is not None
    assert outside <= 0.03
    faster = {
        name: gpu_run(
            msgspec.json.decode((ROOT / name).read_bytes(), type=BenchReport), "torch-compile-graph", "dllm-cache"
        ).tokens_per_second
        / one
        for name in (GPU_BATCH, GPU_TOKENS)
    }
    assert faster[GPU_BATCH] >= 1.6
    assert faster[GPU_TOKENS] >= 0.9 * 4


def test_tokens_a_second_keep_up_with_the_tokens_that_a_threshold_commits_in_a_pass() -> None:
    """Both generations whole, one after the other on one GPU."""
    one, many = (
        gpu_run(msgspec.json.decode((ROOT / file).read_bytes(), type=BenchReport), "torch-compile-graph", "dllm-cache")
        for file in (GPU_WHOLE, GPU_THRESHOLD)
    )
    assert one.passes == one.canvas_tokens == many.canvas_tokens == 256
    tokens_a_pass = many.canvas_tokens / many.passes
    assert many.tokens_per_second >= 0.9 * tokens_a_pass * one.tokens_per_second
    assert many.outside_engines is not None
    assert many.outside_engines <= 0.03


def test_weights_as_inputs_cost_no_more_than_three_percent_over_constants() -> None:
    times = json.loads((ROOT / GPU_EMBEDDED).read_text())["ms"]
    bound = median(times["bound"])
    for form in ("embedded", "embedded, q, k and v joined"):
        assert bound <= 1.03 * median(times[form])


@pytest.mark.parametrize("file", [GPU, GPU_ENGINES])
def test_the_bars_that_engines_met_on_a_gpu_stay_in_the_measurement(file: str) -> None:
    report = gpu_report(file)
    assert gpu_graph(report, "tensorrt", "layer_partial", 64) <= 0.48
    if "onnxruntime-cuda" in report.columns:
        assert gpu_graph(report, "onnxruntime-cuda", "layer_partial", 64) <= 0.42
    # An adaptive step of this policy: the first layer is partial, the others adaptive.
    parts = gpu_graph(report, "tensorrt", "layer_partial", 64) + 31 * gpu_graph(
        report, "tensorrt", "layer_adaptive", 64
    )
    parts += gpu_graph(report, "tensorrt", "head", 256)
    for policy in ("none", "dllm-cache"):
        outside = gpu_run(report, "tensorrt", policy).outside_engines
        assert outside is not None
        assert outside <= 0.03
    assert gpu_run(report, "tensorrt", "dllm-cache").kinds["partial"].times.p50_ms <= 1.10 * parts
    raw = report.columns["tensorrt"].raw
    assert raw.open_seconds < 12
    assert raw.session is not None
    caches = 32 * (2 * 1149 + 256) * 4096 * 2  # keys and values of all rows, deltas of the response, one copy
    held = raw.session.memory
    assert raw.session.peak_memory <= 1.05 * (held["weights"] + caches + held["workspace"])


def test_an_adaptive_step_on_a_gpu_grows_with_the_prompt_as_reading_its_keys_and_values_does() -> None:
    report = msgspec.json.decode((ROOT / GPU_SWEEP).read_bytes(), type=SweepReport)
    (axis,) = report.axes
    (growth,) = (one for one in axis.growth if (one.policy, one.kind) == ("dllm-cache", "partial"))
    slopes = growth.slopes
    assert slopes.at_most_linear
    assert slopes.reading_ms is not None
    assert slopes.low_ms <= slopes.reading_ms <= slopes.high_ms


def shared_table() -> str:
    """Requests that share a prefix, beside the same base policy without: every speed beside its answers."""
    rows = [
        "| base | rule | policy | tokens/s | x base | problems right | 95 % interval |",
        "|---|---|---|---|---|---|---|",
    ]
    for file in sorted((ROOT / "docs/measurements").glob("shared-prefix-*-2-core.json")):
        outcomes = json.loads(file.read_text())["outcomes"]
        plain = {one["transfer"]: one for one in outcomes if one["policy"] != "shared-prefix"}
        for one in sorted(outcomes, key=lambda one: (one["transfer"], one["policy"] == "shared-prefix")):
            base = plain[one["transfer"]]
            speed, reference = (each["tokens"] / each["seconds"] for each in (one, base))
            rows.append(
                f"| {base['policy']} | {one['transfer']} | {one['policy']} | {speed:.1f} | {speed / reference:.2f} | "
                f"{one['right'] / one['asked']:.1%} of {one['asked']} | {one['low']:.1%} to {one['high']:.1%} |"
            )
    return "\n".join(rows) + "\n"


def test_the_shared_prefix_table_equals_the_measurements() -> None:
    assert section("docs/policies.md", "shared") == shared_table()


def test_the_bar_of_shared_prefixes_is_met_one_token_a_step() -> None:
    """1.5 times the tokens/s of the same base policy at most one point of accuracy below it."""
    report = json.loads((ROOT / "docs/measurements/shared-prefix-none-2-core.json").read_text())
    plain, shared = (one for one in report["outcomes"] if one["transfer"] == "quota")
    assert (plain["policy"], shared["policy"], report["settings"]["suite"]["sheets"]) == ("none", "shared-prefix", 50)
    assert plain["seconds"] / shared["seconds"] >= 1.5
    assert 100 * (plain["right"] - shared["right"]) <= plain["asked"]


def test_an_adaptive_step_grows_no_more_than_linearly_with_the_prompt() -> None:
    report = msgspec.json.decode((ROOT / SWEEP).read_bytes(), type=SweepReport)
    assert [(axis.name, axis.points[-1].value) for axis in report.axes] == [
        ("prompt-length", 8192),
        ("gen-length", 512),
        ("batch", 8),
        ("layers", 8),
    ]
    found = {(one.policy, one.kind): one.slopes.at_most_linear for one in report.axes[0].growth}
    assert found["dllm-cache", "partial"]
    assert not found["none", "full"], "attention of every row to every row"


def test_the_bars_of_policies_and_rules_are_met_in_one_run() -> None:
    """dllm-cache three times as fast as no cache within a point, the best pair twelve times within two.

    Plan and sampling take no more than a twentieth of any pair's time.
    """
    report = json.loads((ROOT / FRONTIER).read_text())
    assert len(report["outcomes"]) == 100
    outcomes = {(one["policy"], one["transfer"]): one for one in report["outcomes"]}
    plain, cached = outcomes["none", "quota"], outcomes["dllm-cache", "quota"]
    best = min(outcomes.values(), key=lambda one: one["seconds"])
    assert plain["seconds"] / cached["seconds"] >= 3
    assert 100 * abs(plain["right"] - cached["right"]) <= plain["asked"]
    assert plain["seconds"] / best["seconds"] >= 12
    assert 100 * (plain["right"] - best["right"]) <= 2 * plain["asked"]
    assert all(one["strategy_seconds"] <= 0.05 * one["seconds"] for one in outcomes.values())


@pytest.mark.parametrize(
    ("name", "file"),
    [("frontier", FRONTIER), ("frontier-dream", DREAM_FRONTIER), ("frontier-sdar", SDAR_FRONTIER)],
)
def test_the_frontier_equals_the_measurement(name: str, file: str) -> None:
    assert section("docs/policies.md", name) == frontier_table(file)


def test_caches_of_the_dream_layout_cost_no_answer_but_where_keys_are_dropped() -> None:
    for one in json.loads((ROOT / DREAM_FRONTIER).read_text())["outcomes"]:
        assert (one["right"] == one["asked"] == 96) == ((one["policy"], one["transfer"]) != ("sparse", "quota"))


def test_kept_blocks_of_the_sdar_layout_cost_no_answer_and_are_the_fastest() -> None:
    outcomes = {
        (one["policy"], one["transfer"]): one for one in json.loads((ROOT / SDAR_FRONTIER).read_text())["outcomes"]
    }
    for (policy, rule), one in outcomes.items():
        assert (one["right"] == one["asked"] == 96) == ((policy, rule) != ("dllm-cache", "dynamic"))
        assert one["others"] < 0.05
    for rule in ("quota", "dynamic"):
        kept, plain = outcomes["block", rule], outcomes["none", rule]
        assert kept["passes"] == plain["passes"]
        assert kept["seconds"] == min(one["seconds"] for (_, other), one in outcomes.items() if other == rule)


def test_the_graph_table_equals_the_catalog(llada_8b: ModelShape) -> None:
    assert section("docs/graphs.md", "graphs") == graph_table(llada_8b)


def test_the_measured_table_equals_the_measurement() -> None:
    """After a new measurement: UPDATE_GOLDEN=1 pytest tests/test_docs.py -k measured_table"""
    if os.environ.get("UPDATE_GOLDEN"):
        text = (ROOT / "README.md").read_text()
        (ROOT / "README.md").write_text(text.replace(section("README.md", "measured"), measured_table()))
    assert section("README.md", "measured") == measured_table()


def test_the_trained_model_of_the_readme_is_as_measured() -> None:
    report = json.loads((ROOT / "docs/measurements/demo-2-core.json").read_text())
    plain, cached = report["policies"]
    sentence = (
        f"{cached['right']} of {cached['problems']} problems right with the cache and {plain['right']} without, "
        f"{cached['agreement']:.1%} of the tokens equal, {cached['tokens_per_second'] / plain['tokens_per_second']:.1f} times "
        f"the tokens/s"
    )
    assert sentence in (ROOT / "README.md").read_text().replace("\n", " ")


def test_the_bars_of_the_measurement_are_met_on_a_quiet_machine() -> None:
    report = json.loads((ROOT / MEASURED).read_text())
    assert all(ratio["met"] for ratio in report["ratios"] if ratio["met"] is not None)
    if "schema" in report:
        runs = [run for column in report["columns"].values() for run in column["runs"]]
        outside, others = [run["outside_engines"] for run in runs], [run["raw"]["others"] for run in runs]
        assert max(share for share in outside if share is not None) <= 0.10
        assert max(others) < 0.05
    else:
        assert report["outside_engines_met"]
        assert report["others"] < 0.05


@pytest.mark.parametrize(("file", "kind"), [("manifest", Manifest), ("bench", BenchReport), ("sweep", SweepReport)])
def test_a_schema_is_the_one_in_the_code(file: str, kind: type) -> None:
    """After a wanted change: UPDATE_GOLDEN=1 pytest tests/test_docs.py -k schema"""
    path, made = ROOT / f"docs/{file}.schema.json", json.loads(msgspec.json.encode(msgspec.json.schema(kind)))
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(json.dumps(made, indent=1) + "\n")
    assert json.loads(path.read_text()) == made


def test_the_benchmarking_page_has_every_column_and_every_bar() -> None:
    text = (ROOT / "docs/benchmarking.md").read_text()
    assert all(f"`{name}`" in text for name in COLUMNS)
    for bars in BARS:
        assert f"d={bars.hidden}, {bars.layers} layers, prompt {bars.prompt}, response {bars.response}" in text
        assert f"at least {bars.eager:g}x | at least {bars.four_feature:g}x" in text


def test_the_make_targets_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A directory that looks like a checkout to the README's commands and that they may write into."""
    (tmp_path / "models").symlink_to(ROOT / "models")
    return tmp_path


@pytest.mark.usefixtures("one_core")
def test_the_readme_runs_as_printed(workspace: Path) -> None:
    blocks = re.findall(r"^```(sh|python)\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert {language for language, _ in blocks} == {"sh", "python"}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for language, code in blocks:
        command = ["sh", "-ec", code] if language == "sh" else [sys.executable, "-c", code]
        done = subprocess.run(
            command, cwd=workspace, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{code}\n{done.stderr}"
        assert done.stdout.strip(), code

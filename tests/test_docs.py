"""The documentation says what the code does: tables are regenerated, README blocks are executed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from dllm_export.graphs import ModelShape, TensorSpec, graph_specs
from dllm_export.runtime.manifest import Manifest
from dllm_export.tools.bench.columns import COLUMNS
from dllm_export.tools.bench.records import BenchReport
from dllm_export.tools.bench.summary import BARS
from dllm_export.tools.bench.sweep import SweepReport
from dllm_export.tools.bench.tables import markdown

ROOT = Path(__file__).resolve().parents[1]
MEASURED = "docs/measurements/cpu-2-core.json"
MEASURED_D1024 = "docs/measurements/cpu-2-core-d1024.json"
FRONTIER = "docs/measurements/frontier-2-core.json"
DREAM_FRONTIER = "docs/measurements/frontier-dream-2-core.json"
SWEEP = "docs/measurements/sweep-2-core.json"
SDAR_FRONTIER = "docs/measurements/frontier-sdar-2-core.json"


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


def test_the_bar_that_is_missed_on_a_cpu_lies_beyond_its_matrix_products_alone() -> None:
    report = msgspec.json.decode((ROOT / MEASURED_D1024).read_bytes(), type=BenchReport)
    (published,) = (one for one in report.ratios if (one.column, one.baseline) == ("onnxruntime", "four-feature"))
    (products,) = (one for one in report.times_products if (one.column, one.policy) == ("onnxruntime", "dllm-cache"))
    assert not published.met
    assert products.met
    assert published.value * products.value < 2.5


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

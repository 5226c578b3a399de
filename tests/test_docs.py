"""The documentation says what the code does: tables are regenerated, README blocks are executed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from dllm_export.graphs import ModelShape, TensorSpec, graph_specs
from dllm_export.runtime.manifest import Manifest

ROOT = Path(__file__).resolve().parents[1]
MEASURED = "docs/measurements/cpu-2-core.json"
FRONTIER = "docs/measurements/frontier-2-core.json"


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
    report = json.loads((ROOT / MEASURED).read_text())
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


def frontier_table() -> str:
    """Policies and rules, the fastest first; every speed beside its answers."""
    outcomes = json.loads((ROOT / FRONTIER).read_text())["outcomes"]
    rows = [
        "| policy | rule | tokens/s | tokens per pass | problems right | 95 % interval |",
        "|---|---|---|---|---|---|",
    ]
    for one in sorted(outcomes, key=lambda one: one["seconds"]):
        speed, share = one["tokens"] / one["seconds"], one["right"] / one["asked"]
        rows.append(
            f"| {one['policy']} | {one['transfer']} | {speed:.0f} | {one['tokens'] / one['passes']:.1f} | {share:.1%} of "
            f"{one['asked']} | {one['low']:.1%} to {one['high']:.1%} |"
        )
    return "\n".join(rows) + "\n"


def test_the_frontier_equals_the_measurement() -> None:
    assert section("docs/policies.md", "frontier") == frontier_table()


def test_the_graph_table_equals_the_catalog(llada_8b: ModelShape) -> None:
    assert section("docs/graphs.md", "graphs") == graph_table(llada_8b)


def test_the_measured_table_equals_the_measurement() -> None:
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
    assert all(ratio["met"] for ratio in report["ratios"])
    assert report["outside_engines_met"]
    assert report["others"] < 0.05


def test_the_manifest_schema_is_the_one_in_the_code() -> None:
    schema = json.loads((ROOT / "docs/manifest.schema.json").read_text())
    assert schema == json.loads(msgspec.json.encode(msgspec.json.schema(Manifest)))


def test_the_make_targets_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A directory that looks like a checkout to the README's commands and that they may write into."""
    (tmp_path / "models").symlink_to(ROOT / "models")
    return tmp_path


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

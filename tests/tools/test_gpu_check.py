"""The GPU check on the CPU: the whole script with a tiny model; its figures mean nothing, its report is complete."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from dllm_export.errors import UsageError
from dllm_export.tools import cli
from dllm_export.tools.gpu_check import LLADA_8B, GpuCheckOptions, fixed_sizes
from dllm_export.tools.gpu_column import GraphTimes, Request, Times, sum_parts

ROOT = Path(__file__).resolve().parents[2]
SIZES = ["--prompt", "40", "--response", "32", "--steps", "8"]


def test_every_column_that_works_is_measured_and_the_others_say_why(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    script = ["tools/gpu_check", "--quick", "--device", "cpu", "--no-answers", *SIZES, "--report", str(report)]
    missing = ["--tensorrt", f"{sys.executable} -S"]  # an interpreter without packages
    environment = {"PYTHON": sys.executable, "PATH": "/usr/bin:/bin"}
    result = subprocess.run([*script, *missing], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = json.loads(report.read_text())
    assert set(found["columns"]) == {"onnxruntime", "torch", "eager"}
    assert "No module named" in found["failures"]["tensorrt"]
    assert found["command"].startswith("tools/gpu_check --quick")
    graphs = {graph["graph"] for graph in found["columns"]["onnxruntime"]["graphs"]}
    assert graphs == {"layer_full", "layer_partial", "layer_adaptive", "embed", "head"}
    for column in found["columns"].values():
        assert [run["policy"] for run in column["runs"]] == ["none", "dllm-cache"]
    # Random weights in float32: the columns run the same model, so they decide the same tokens.
    tokens = [column["runs"][0]["tokens"] for column in found["columns"].values()]
    assert tokens[0] == tokens[1] == tokens[2]
    assert len(set(tokens[0])) > 2
    assert "layer_partial S=72 Q=32" in result.stdout


def test_engines_are_tuned_for_exactly_the_measured_sizes() -> None:
    assert fixed_sizes(GpuCheckOptions()) == "S=1149,X=256,Q=64;S=1149;S=1149,Q=64;S=1149,Q=256"
    assert (LLADA_8B.layers, LLADA_8B.vocab) == (32, 126464)


def test_the_sum_of_a_partial_step_counts_every_layer() -> None:
    def times(graph: str, milliseconds: float, **sizes: int) -> GraphTimes:
        values = Times(samples=1, p10_ms=milliseconds, p50_ms=milliseconds, p90_ms=milliseconds)
        return GraphTimes(graph=graph, sizes=sizes, calls=1, call=values)

    graphs = [times("layer_adaptive", 2, X=8, Q=2), times("embed", 10, X=8), times("head", 100, Q=1)]
    graphs.append(times("head", 1000, Q=8))
    assert sum_parts(graphs, 3, Request(prompt=4, response=8, steps=4)) == 3 * 2 + 10 + 1000


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--columns tensort", "--columns has tensort"),
        ("--columns ,", "--columns has nothing"),
        ("--layers 0", "--layers is 0, expected at least 1"),
        ("--steps 300", "--steps is 300, expected at most --response, 256"),
    ],
)
def test_wrong_options_are_refused_before_anything_runs(arguments: str, sentence: str) -> None:
    result = CliRunner().invoke(cli.cli, ["gpu-check", *arguments.split()])
    assert isinstance(result.exception, UsageError) or result.exit_code == UsageError.exit_code
    assert sentence in f"{result.exception} {result.output}"

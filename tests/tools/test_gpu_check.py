"""The GPU check on the CPU: the whole script with a tiny model; its figures mean nothing, its report is complete."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from click.testing import CliRunner

from dllm_export.errors import IncompatibleError, UsageError
from dllm_export.runtime.bundle import Bundle
from dllm_export.runtime.model import DiffusionLM
from dllm_export.runtime.options import GenerationOptions
from dllm_export.runtime.policies import DllmCache, NoCache
from dllm_export.tools import cli
from dllm_export.tools.bench.columns import COLUMNS
from dllm_export.tools.bench.metering import MeteredSession, OutlineSession
from dllm_export.tools.bench.records import EmbeddedTimes
from dllm_export.tools.bench.roofline import Model
from dllm_export.tools.gpu_check import (
    GENERATION_GRAPHS,
    GENERATIONS,
    LLADA_8B,
    Answer,
    GpuCheckOptions,
    fixed_sizes,
    plan_answers,
    print_answers,
    print_weights,
)
from dllm_export.tools.machine import find_gpus

ROOT = Path(__file__).resolve().parents[2]
SIZES = ["--prompt", "40", "--response", "32", "--steps", "8"]


@pytest.mark.usefixtures("one_core")
def test_every_column_that_works_is_measured_and_the_others_say_why(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    columns = ["--columns", "eager,four-feature,torch,onnxruntime,tensorrt"]
    script = [
        "tools/gpu_check",
        "--quick",
        "--device",
        "cpu",
        "--no-answers",
        "--embedded",
        *SIZES,
        "--report",
        str(report),
    ]
    missing = ["--tensorrt", f"{sys.executable} -S"]  # an interpreter without packages
    environment = {"PYTHON": sys.executable, "PATH": "/usr/bin:/bin"}
    environment |= {
        name: os.environ[name]
        for name in ("PYTHONPATH", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        if name in os.environ
    }
    result = subprocess.run([*script, *columns, *missing], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = json.loads(report.read_text())
    bench = found["bench"]
    assert set(bench["columns"]) == {"eager", "four-feature", "torch", "onnxruntime"}
    assert "No module named" in result.stderr
    assert bench["failures"].keys() == {"tensorrt"}
    assert found["embedded"] == {}
    assert "tensorrt, weights as constants: " in result.stderr
    assert found["command"].startswith("tools/gpu_check --quick")
    # Random weights in float32: the columns run the same model, so they decide the same tokens.
    equal = [one for one in bench["agreement"] if one["policy"] == one["reference_policy"]]
    assert len(equal) == 4
    assert all(one["share"] == 1 for one in equal)
    assert "layer_partial, S=72, Q=32" in result.stdout


def test_engines_are_tuned_for_exactly_the_measured_sizes() -> None:
    assert fixed_sizes(GpuCheckOptions()) == "S=1149,X=256,Q=64;S=1149;S=1149,Q=64;S=1149,Q=256"
    assert (LLADA_8B.layers, LLADA_8B.vocab) == (32, 126464)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--columns tensort", "--columns has tensort"),
        ("--columns ,", "--columns has nothing"),
        ("--layers 0", "--layers is 0, expected at least 1"),
        ("--steps 300", "--steps is 300, expected at most --response, 256"),
        ("--embedded --columns torch", "--embedded compares engines: add tensorrt or tensorrt-rtx to --columns"),
    ],
)
def test_wrong_options_are_refused_before_anything_runs(arguments: str, sentence: str) -> None:
    result = CliRunner().invoke(cli.cli, ["gpu-check", *arguments.split()])
    assert isinstance(result.exception, UsageError) or result.exit_code == UsageError.exit_code
    assert sentence in f"{result.exception} {result.output}"


def test_a_provider_without_engines_says_why_once_in_each_type_and_is_not_asked() -> None:
    kinds = {name: COLUMNS[name] for name in ("torch", "torch-graph", "tensorrt", "tensorrt-calls")}
    failures = {("tensorrt", "float32"): "", ("tensorrt", "float16"): "no GPU"}
    planned = list(plan_answers(kinds, ("float32", "float16"), failures, gpu=True))
    asked = Counter((one.column, one.dtype, one.captures > 0) for one in planned if not one.failure)
    each = len(GENERATIONS)
    assert asked == {
        **{("torch", dtype, False): each for dtype in ("float32", "float16")},
        **{("torch-graph", dtype, captured): each for dtype in ("float32", "float16") for captured in (False, True)},
        **{("tensorrt", "float32", captured): each for captured in (False, True)},
        ("tensorrt-calls", "float32", False): each,
    }
    failed = [(one.column, one.dtype, one.generation, one.failure) for one in planned if one.failure]
    assert failed == [(name, "float16", "build", "no GPU") for name in ("tensorrt", "tensorrt-calls")]


@pytest.mark.skipif(any(find_gpus()), reason="there is a GPU")
def test_without_a_gpu_it_says_so_before_anything_is_drawn() -> None:
    result = CliRunner().invoke(cli.cli, ["gpu-check"])
    assert str(result.exception) == "--device cuda: nvidia-smi lists no NVIDIA GPU; use --device cpu"
    assert isinstance(result.exception, IncompatibleError)


def test_columns_that_need_a_gpu_are_not_asked_without_one() -> None:
    kinds = {name: COLUMNS[name] for name in ("torch", "torch-graph", "tensorrt")}
    failed = {one.column: one for one in plan_answers(kinds, ("float32",), {}, gpu=False) if one.failure}
    assert failed.keys() == {"torch-graph", "tensorrt"}
    assert {one.failure for one in failed.values()} == {"needs an NVIDIA GPU, and nvidia-smi lists none"}
    assert {one.generation for one in failed.values()} == {"all"}


def test_a_failure_of_a_column_is_printed_once(capsys: pytest.CaptureFixture[str]) -> None:
    failed = [
        Answer(column="torch", dtype="float32", generation=name, captures=0, equal=None, failure="no room")
        for name in GENERATIONS
    ]
    print_answers([*failed, Answer(column="torch", dtype="float16", generation="none", captures=0, equal=0.5)])
    printed = capsys.readouterr().out
    assert printed.count("no room") == 1
    assert ", ".join(GENERATIONS) in printed
    assert "50.0%" in printed


def test_what_bound_weights_cost_is_printed_beside_how_far_the_outputs_are_apart(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = EmbeddedTimes(
        gpu="a GPU",
        library="tensorrt 8.6.0",
        graph="layer_partial",
        sizes={"B": 1, "S": 8, "Q": 4},
        ms={"bound": {"all": [0.3, 0.3, 9.0]}, "embedded": {"all": [0.2, 0.2, 0.2]}},
        plan_bytes={"bound": 1_000_000, "embedded": 5_000_000},
        build_seconds={"bound": 3, "embedded": 60},
        difference=0.01,
    )
    print_weights("tensorrt", found)
    printed = capsys.readouterr()
    assert [line.split() for line in printed.out.splitlines()][1:] == [
        ["bound", "0.3000", "1.0", "3"],
        ["embedded", "0.2000", "5.0", "60"],
    ]
    told = " ".join(printed.err.split())
    assert "1.500 times as long as constants" in told
    assert "1.0e-02 of the largest" in told


def test_engines_are_built_for_what_the_compared_generations_run(tiny_bundle: Bundle) -> None:
    manifest, cached = tiny_bundle.manifest, DllmCache(prompt_interval=10, response_interval=4)
    session = MeteredSession(OutlineSession(manifest.dtype), Model(tiny_bundle.specs, manifest.shape, manifest.dtype))
    with DiffusionLM(tiny_bundle, session) as lm:
        for policy, scale in ((NoCache(), 0.0), (cached, 0.0), (cached, 0.5)):
            options = GenerationOptions(gen_length=64, cfg_scale=scale)
            for _ in lm.stream(lm.continuation([[1, 2, 3]], options), options, policy):
                pass
    assert session.meter.graphs | {"commit"} == set(GENERATION_GRAPHS.split(",")), "the device decides by commit"

"""`build`, `export --build` and the engines that `inspect` shows, through the command line and the real compiler."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dllm_export.exporter import engines
from dllm_export.exporter.build_options import BuildOptions
from dllm_export.exporter.options import ExportOptions
from dllm_export.exporter.pipeline import export
from dllm_export.graphs import graph_specs
from dllm_export.runtime.bundle import open_bundle
from dllm_export.tools import cli
from dllm_export.tools.build_engines import spell_flags
from dllm_export.tools.engine_table import describe_profiles
from dllm_export.tools.gpu_check import LLADA_8B

pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX has wheels for Linux on x86-64 only")

GRAPHS = len(graph_specs(LLADA_8B))
ROOT = Path(__file__).resolve().parents[2]
README_LINE = "dllm-export export models/worksheets-4m -o b --build --flavour tensorrt-rtx --sm 8.9,12.0"
RTX = ("--flavour", "tensorrt-rtx", "--sm", "8.9,12.0")
FEW = "embed,layer_full,layer_partial,head"
"""What is built where the number of graphs shows nothing."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a command line gave."""

    code: int
    out: str
    err: str


class Shell:
    """Runs command lines in this process, in a directory that looks like a checkout."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: object) -> Outcome:
        self._capsys.readouterr()
        code = cli.run([str(argument) for argument in arguments])
        captured = self._capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    def json(self, *arguments: object) -> Any:
        """The result of a command that works, as JSON."""
        result = self(*arguments, "--json")
        assert result.code == 0, result.err
        return json.loads(result.out)


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shell:
    (tmp_path / "models").symlink_to(ROOT / "models")
    monkeypatch.chdir(tmp_path)
    return Shell(capsys)


@pytest.fixture(scope="module")
def exported(tiny_checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle without engines; not to be written to."""
    root = tmp_path_factory.mktemp("build") / "bundle"
    return export(tiny_checkpoints["tied"], root, ExportOptions(dtype="bfloat16", no_tokenizer=True)).path


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "bundle"))


# -- from a model to engines
def test_the_readmes_line_makes_engines_out_of_a_model(shell: Shell) -> None:
    assert README_LINE in (ROOT / "README.md").read_text(encoding="utf-8")
    result = shell(*shlex.split(README_LINE)[1:])
    assert (result.code, result.out) == (0, "b\n")
    assert result.err.startswith("tensorrt-rtx 1.")
    assert f": asked for; compute capabilities 8.9, 12.0\nbuilt {GRAPHS} engines in " in result.err
    opened = open_bundle("b")
    assert {record.graph for record in opened.manifest.engines} == set(opened.specs)


def test_export_with_build_as_json_is_export_and_build(shell: Shell, tiny_checkpoints: dict[str, Path]) -> None:
    result = shell.json(
        "export",
        tiny_checkpoints["gqa"],
        "-o",
        "b",
        "--no-tokenizer",
        "--build",
        *RTX,
        "--max-batch",
        1,
        "--graphs",
        FEW,
    )
    assert result["build"]["built"] == 4
    assert result["build"]["library"]["reason"] == "asked for"
    assert result["build"]["options"]["max_batch"] == 1
    assert result["digest"] == open_bundle("b").manifest.digest, "the digest is the finished bundle's"


def test_only_the_graphs_that_are_asked_for_are_built(shell: Shell, bundle: Path) -> None:
    asked = (*RTX, "--max-batch", 1, "--graphs", "embed, gather")
    assert shell.json("build", bundle, *asked)["built"] == 2
    assert {record.graph for record in open_bundle(bundle).manifest.engines} == {"embed", "gather"}
    assert shell.json("build", bundle, *asked)["built"] == 0
    planned = shell.json("build", bundle, "--dry-run", "--sm", "8.9", "--graphs", "gather")
    assert [*planned["commands"]] == ["gather"]
    refused = shell("build", bundle, *RTX, "--graphs", "embed,heart")
    assert refused.code == 2
    assert "--graphs has heart, expected some of this bundle's: embed, " in refused.err


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (
            "--build --flavour tensorrt-rtx --sm 8.9,9.0",
            4,
            "does not run on compute capability 9.0; use --flavour tensorrt",
        ),
        ("--build --flavour tensorrt-rtx --sm 5.0", 2, "--sm 5.0 is none of"),
        ("--build --flavour tensorrt", 4, "pip install 'dllm-export[tensorrt]'"),
        ("--build --flavour tensorrt-rtx --sm 8.9 --max-length 641", 2, "this model takes at most 640 tokens"),
        ("--build --sm 8.9 --max-length 0", 2, "--max-length is 0, expected at least 1"),
        (
            "--build --sm 8.9 --compatible versions",
            2,
            "--compatible is for standard TensorRT, an engine of TensorRT for RTX",
        ),
        (
            "--build --sm 8.9 --timing-cache strict",
            2,
            "--timing-cache strict is for standard TensorRT, TensorRT for RTX",
        ),
        ("--sm 8.9", 2, "--sm applies to --build: add --build, or leave it out"),
        ("--max-batch 4", 2, "--max-batch applies to --build"),
    ],
)
def test_what_cannot_be_built_is_refused_before_the_export(flags: str, code: int, message: str, shell: Shell) -> None:
    result = shell("export", "models/worksheets-4m", "-o", "b", *flags.split())
    assert (result.code, result.out) == (code, "")
    assert message in result.err
    assert result.err.count("\n") == 1
    assert not Path("b").exists()


def test_a_failed_build_leaves_the_export_and_says_how_to_go_on(
    shell: Shell, tiny_checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    build_plan, graphs = engines.build_plan, []

    def fail(library: Any, onnx: bytes, spec: Any, *rest: Any, **named: Any) -> Any:
        graphs.append(spec.name)
        return build_plan(library, b"no graph" if len(graphs) == 3 else onnx, spec, *rest, **named)

    monkeypatch.setattr(engines, "build_plan", fail)
    asked = ("--build", *RTX, "--graphs", FEW, "--rows", "64")
    result = shell("export", tiny_checkpoints["bias"], "-o", "a b", "--no-tokenizer", *asked)
    assert (result.code, result.out) == (4, "")
    assert "error: TensorRT could not parse graph 'layer_partial'" in result.err
    line = f"dllm-export build 'a b' --flavour tensorrt-rtx --sm 8.9,12.0 --graphs {FEW} --rows 64"
    assert f"the export is finished and stays in a b, engines are missing; to go on: {line}\n" in result.err
    assert len(open_bundle("a b").manifest.engines) == 2
    monkeypatch.setattr(engines, "build_plan", build_plan)
    assert shell(*shlex.split(line)[1:]).code == 0
    assert len(open_bundle("a b").manifest.engines) == 4


def test_options_are_spelt_as_flags_where_they_differ_from_the_defaults() -> None:
    assert spell_flags(BuildOptions()) == ""
    assert spell_flags(BuildOptions(sm="8.9", max_length=64)) == "--sm 8.9 --max-length 64"


# -- build
def test_a_build_says_what_it_built_and_the_next_that_all_is_there(shell: Shell, bundle: Path) -> None:
    asked = ("--sm", "8.9,12.0", "--graphs", FEW)
    first = shell("build", bundle, *asked)
    assert first.code == 0
    assert ": the only one installed; compute capabilities 8.9, 12.0\nbuilt 4 engines in " in first.err
    assert "B 1..4, S 1..512" in first.out
    second = shell("build", bundle, *asked)
    assert second.err.splitlines()[1:] == ["4 engines are up to date"]
    assert second.out == first.out
    result = shell.json("build", bundle, *asked)
    assert (result["built"], result["up_to_date"]) == (0, 4)
    assert result["library"]["flavour"] == "tensorrt-rtx"
    assert result["library"]["reason"] == "the only one installed"
    assert all(engine["seconds"] > 0 and engine["bytes"] > 1000 for engine in result["engines"])


def test_a_damaged_plan_stops_a_generation_with_the_command_that_repairs_it(shell: Shell, bundle: Path) -> None:
    """A plan that was cut; what else may have happened to one: tests/exporter/test_engines.py."""
    assert shell("build", bundle, *RTX).code == 0
    plan = bundle / open_bundle(bundle).manifest.engines[4].file
    plan.write_bytes(plan.read_bytes()[:1000])
    line = f"dllm-export build {bundle} --flavour tensorrt-rtx --sm 8.9,12.0"
    for refused in (
        shell("generate", bundle, "--prompt-ids", "1 2", "--gen-length", 4),
        shell("inspect", bundle),
    ):
        assert refused.code == 5
        assert " ".join(refused.err.split()).endswith(f"build again with '{line}'")
    repaired = shell(*shlex.split(line)[1:])
    assert repaired.code == 0
    assert f"1 engine missing or damaged, no longer listed: {plan.relative_to(bundle)}" in " ".join(
        repaired.err.split()
    )
    assert "built 1 engine in " in repaired.err
    assert f"{GRAPHS - 1} engines are up to date" in repaired.err
    open_bundle(bundle)
    again = shell(*shlex.split(line)[1:])
    assert again.err.splitlines()[1:] == [f"{GRAPHS} engines are up to date"]


@pytest.mark.parametrize("flags", ["--compatible ampere-plus", "--timing-cache strict"])
@pytest.mark.parametrize("where", ["--sm 8.9", "--flavour tensorrt-rtx --dry-run"])
def test_switches_of_standard_tensorrt_are_refused_in_one_sentence(
    flags: str, where: str, shell: Shell, bundle: Path
) -> None:
    result = shell("build", bundle, *where.split(), *flags.split())
    assert (result.code, result.out) == (2, "")
    assert " is for standard TensorRT, " in result.err
    assert result.err.count("\n") == 1
    dry = shell("build", bundle, "--dry-run", "--flavour", "tensorrt", *flags.split(), "--graphs", "embed")
    assert dry.code == 0
    assert ("--hardwareCompatibilityLevel=ampere+" in dry.out) is ("ampere" in flags)
    assert ("--errorOnTimingCacheMiss" in dry.out) is ("strict" in flags)


def test_a_dry_run_prints_a_command_per_graph_and_builds_nothing(shell: Shell, bundle: Path) -> None:
    before = sorted(bundle.rglob("*"))
    result = shell("build", bundle, "--dry-run", "--flavour", "tensorrt")
    assert result.code == 0
    assert [shlex.split(line)[:2] for line in result.out.splitlines()] == [
        ["trtexec", f"--onnx={bundle}/graphs/{name}.onnx"] for name in open_bundle(bundle).specs
    ]
    assert result.err == "for trtexec: tensorrt is not installed\n"
    lines = shell.json("build", bundle, "--dry-run", *RTX)["commands"]
    assert all(line.startswith("tensorrt_rtx ") and " --computeCapabilities=89,120 " in line for line in lines.values())
    assert sorted(bundle.rglob("*")) == before


STANDARD_WITHOUT_CUDA = """
import sys, types
import tensorrt_rtx
standard = types.ModuleType("tensorrt")  # the same compiler, as if it built for the GPU at hand only
standard.__dict__.update({name: value for name, value in vars(tensorrt_rtx).items() if name != "ComputeCapability"})
sys.modules |= {"tensorrt": standard, "cuda": None}
from dllm_export.tools.cli import run
sys.exit(run(sys.argv[1:]))
"""


@pytest.mark.parametrize("command", ["build {bundle}", "export {model} -o b --no-tokenizer --build"])
def test_standard_tensorrt_without_the_cuda_bindings_gives_the_pip_line_before_any_work(
    command: str, bundle: Path, tiny_checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 8.9\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    words = command.format(bundle=bundle, model=tiny_checkpoints["tied"]).split()
    done = subprocess.run(
        [sys.executable, "-c", STANDARD_WITHOUT_CUDA, *words, "--flavour", "tensorrt"],
        env={**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stdout) == (4, "")
    error = " ".join(done.stderr.partition("error: ")[2].split())
    assert "needs the package cuda-bindings: pip install 'dllm-export[tensorrt]'" in error
    assert not (tmp_path / "b").exists()
    assert not (bundle / "engines").exists()


IN_STAGES_WITHOUT_ONNX = """
import sys
sys.modules |= {"onnx": None, "torch": None}
from dllm_export.runtime.tensorrt.library import TensorRt
TensorRt.staged = True
from dllm_export.tools.cli import run
sys.exit(run(sys.argv[1:]))
"""


def test_building_needs_neither_onnx_nor_torch_even_in_stages(bundle: Path) -> None:
    """TensorRT 8.6 comes for Python 3.10 at most, where people have nothing else."""
    graphs = "layer_partial,layer_adaptive"
    command = [sys.executable, "-c", IN_STAGES_WITHOUT_ONNX, "build", bundle, *RTX, "--graphs", graphs]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert {record.graph for record in open_bundle(bundle).manifest.engines} == {
        "layer_partial.project",
        "layer_partial.finish",
        "layer_adaptive.project",
        "layer_adaptive.finish",
    }


# -- inspect
def test_inspect_lists_the_engines(shell: Shell, bundle: Path) -> None:
    assert "compute capabilities" not in shell("inspect", bundle).out
    asked = ("--sm", "8.9", "--graphs", FEW)
    assert shell("build", bundle, *asked).code == 0
    text = shell("inspect", bundle).out
    row = next(line for line in text.splitlines() if line.startswith("head ") and "tensorrt-rtx" in line)
    assert row.endswith("B 1..4, Q 1..256, X 1..512")
    found = shell.json("inspect", bundle)["engines"]
    assert found == shell.json("build", bundle, *asked)["engines"]


def test_profiles_in_short() -> None:
    assert describe_profiles([{"B": (1, 1, 4), "Q": (1, 64, 256)}, {"B": (1, 1, 4), "Q": (1, 64, 4096)}]) == (
        "B 1..4, Q 1..256 | B 1..4, Q 1..4096"
    )

"""Command lines for NVIDIA's tools: read back, they say what the builder is told."""

from __future__ import annotations

import shlex
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest

from dllm_export.errors import IncompatibleError, UsageError
from dllm_export.exporter.build_options import BuildOptions
from dllm_export.exporter.ranges import input_ranges, make_profiles
from dllm_export.exporter.trtexec import Tool, Typing, choose_tool, list_commands, write_command
from dllm_export.graphs import DType, ModelShape, graph_specs
from dllm_export.runtime.bundle import Bundle
from dllm_export.runtime.tensorrt.library import Flavour

RTX = Tool("tensorrt_rtx", "strong", ("8.9", "12.0"), "")
STANDARD = Tool("trtexec", "strong", (), "")


def read_back(line: str) -> tuple[dict[str, str], list[dict[str, tuple[list[int], ...]]]]:
    """(flags and values, sizes by input of every profile) of a command line."""
    flags: dict[str, str] = {}
    profiles: list[dict[str, list[list[int]]]] = []
    for word in shlex.split(line)[1:]:
        name, _, value = word.partition("=")
        if name == "--profile":
            assert int(value) == len(profiles)
            profiles.append(defaultdict(list))
        elif name in ("--minShapes", "--optShapes", "--maxShapes"):
            profiles = profiles or [defaultdict(list)]
            for item in value.split(","):
                tensor, _, sizes = item.partition(":")
                profiles[-1][tensor].append([int(size) for size in sizes.split("x")])
        else:
            assert name not in flags
            flags[name] = value
    return flags, [{name: tuple(sizes) for name, sizes in profile.items()} for profile in profiles]


@pytest.mark.parametrize(("tool", "flavour"), [(RTX, "tensorrt-rtx"), (STANDARD, "tensorrt")])
def test_the_profiles_of_a_line_are_those_of_the_build(tool: Tool, flavour: Flavour, llada_8b: ModelShape) -> None:
    options = BuildOptions(max_batch=2, rows=128)
    for spec in graph_specs(llada_8b).values():
        profiles = make_profiles(flavour, spec, 4096, options)
        _, found = read_back(write_command(tool, "graph.onnx", spec, "float16", profiles))
        assert found == [input_ranges(spec, ranges) for ranges in profiles]


def test_a_line_as_a_whole(llada_8b: ModelShape) -> None:
    spec = graph_specs(llada_8b)["embed"]
    profiles = make_profiles("tensorrt-rtx", spec, 4096, BuildOptions())
    assert write_command(RTX, "my bundle/embed.onnx", spec, "bfloat16", profiles) == (
        "tensorrt_rtx '--onnx=my bundle/embed.onnx' --saveEngine=embed.plan --skipInference --computeCapabilities=89,120 "
        "--minShapes=tokens:1x1 --optShapes=tokens:1x256 --maxShapes=tokens:4x4096"
    )


@pytest.mark.parametrize(
    ("typing", "dtype", "flags"),
    [
        ("strong", "float16", set()),
        ("strong", "float32", {"--noTF32"}),
        ("asked", "bfloat16", {"--stronglyTyped"}),
        ("asked", "float32", {"--stronglyTyped", "--noTF32"}),
        ("weak", "float16", {"--fp16", "--precisionConstraints", "--preview"}),
        ("weak", "float32", {"--noTF32", "--preview"}),
    ],
)
def test_types_are_asked_for_where_the_release_needs_it(
    typing: Typing, dtype: DType, flags: set[str], llada_8b: ModelShape
) -> None:
    spec = graph_specs(llada_8b)["embed"]
    profiles = make_profiles("tensorrt", spec, 4096, BuildOptions())
    found, _ = read_back(write_command(Tool("trtexec", typing, (), ""), "e.onnx", spec, dtype, profiles))
    assert set(found) == {"--onnx", "--saveEngine", "--skipInference"} | flags
    assert found.get("--precisionConstraints", "obey") == "obey"


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        (BuildOptions(), {}),
        (BuildOptions(compatible="versions"), {"--versionCompatible": ""}),
        (BuildOptions(compatible="same-capability"), {"--hardwareCompatibilityLevel": "sameComputeCapability"}),
        (BuildOptions(compatible="ampere-plus"), {"--hardwareCompatibilityLevel": "ampere+"}),
        (BuildOptions(timing_cache="strict"), {"--timingCacheFile": "timing.cache", "--errorOnTimingCacheMiss": ""}),
    ],
)
def test_switches_are_named_as_the_tool_names_them(
    options: BuildOptions, flags: dict[str, str], tiny_bundle: Bundle
) -> None:
    plain = dict(list_commands(Path("b"), tiny_bundle.manifest, BuildOptions(), STANDARD))
    for name, line in list_commands(Path("b"), tiny_bundle.manifest, options, STANDARD):
        found, without = read_back(line)[0], read_back(plain[name])[0]
        assert found == without | flags


def test_switches_that_the_tool_lacks_are_refused() -> None:
    for options in (BuildOptions(sm="8.9", compatible="versions"), BuildOptions(sm="8.9", timing_cache="strict")):
        with pytest.raises(UsageError, match="is for standard TensorRT"):
            choose_tool(replace(options, flavour="tensorrt-rtx"), "float16")


def test_the_current_gpu_needs_none_here(tiny_bundle: Bundle) -> None:
    options = BuildOptions(flavour="tensorrt-rtx")
    tool = choose_tool(options, "float32")
    lines = dict(list_commands(Path("b"), tiny_bundle.manifest, options, tool))
    assert list(lines) == list(tiny_bundle.specs)
    assert all(" --useGpu " in line and "--computeCapabilities" not in line for line in lines.values())
    assert all(f" --onnx=b/graphs/{name}.onnx " in line for name, line in lines.items())


def test_without_any_library_the_line_is_for_standard_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dllm_export.exporter.trtexec.find_library", lambda flavour: None)
    assert choose_tool(BuildOptions(), "bfloat16") == Tool("trtexec", "strong", (), "tensorrt is not installed")
    options = BuildOptions(flavour="tensorrt-rtx", sm="8.9, 12.0")
    assert choose_tool(options, "float16").targets == ("8.9", "12.0")
    with pytest.raises(IncompatibleError, match="builds only for the GPU it runs on"):
        choose_tool(BuildOptions(sm="8.9"), "float16")
    with pytest.raises(IncompatibleError, match=r"does not run on compute capability 9\.0"):
        choose_tool(BuildOptions(flavour="tensorrt-rtx", sm="9.0"), "float16")
    with pytest.raises(UsageError, match="--sm ada is no compute capability"):
        choose_tool(BuildOptions(flavour="tensorrt-rtx", sm="ada"), "float16")


def test_a_length_beyond_the_models_is_refused(tiny_bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="--max-length is 513"):
        list(list_commands(Path("b"), tiny_bundle.manifest, BuildOptions(max_length=513), STANDARD))

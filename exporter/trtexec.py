"""The same builds as command lines of NVIDIA's own tools, to try a graph without this package. Needs no TensorRT."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from dllm_export.errors import IncompatibleError, UsageError
from dllm_export.exporter.build_options import BuildOptions, choose_graphs
from dllm_export.exporter.build_target import check_length, check_switches
from dllm_export.exporter.precision import check_dtype, engine_type
from dllm_export.exporter.ranges import check_fixed_sizes, input_ranges, make_profiles
from dllm_export.graphs import DType, GraphSpec, engine_specs, graph_specs
from dllm_export.runtime.manifest import Compatible, Manifest
from dllm_export.runtime.tensorrt.library import REFUSED_BY_RTX, Flavour, TensorRt, choose_targets, find_library
from dllm_export.runtime.tensorrt.profiles import Range

Typing = Literal["weak", "asked", "strong"]
"""Whether numbers' types come from the graph: never (8.6), when asked (9 and 10), always (11 and TensorRT for RTX)."""

COMPATIBILITY: Mapping[Compatible, tuple[str, ...]] = {
    "none": (),
    "versions": ("--versionCompatible",),
    "same-capability": ("--hardwareCompatibilityLevel=sameComputeCapability",),
    "ampere-plus": ("--hardwareCompatibilityLevel=ampere+",),
}


@dataclass(frozen=True, slots=True)
class Tool:
    """A command-line builder and what must be said to it."""

    name: str
    typing: Typing
    targets: tuple[str, ...]
    """Compute capabilities to name; empty for the GPU of this machine."""
    reason: str
    """Why this one, for people."""


def choose_tool(options: BuildOptions, dtype: DType) -> Tool:
    """The tool that belongs to the options; where no library is installed, that of the newest standard TensorRT."""
    flavours: tuple[Flavour, ...] = get_args(Flavour)
    wanted = [flavour for flavour in flavours if options.flavour in ("auto", flavour)]
    library = next(filter(None, map(find_library, wanted)), None)
    if library is not None:
        check_dtype(library, dtype)
    flavour: Flavour = library.flavour if library else wanted[0]
    check_switches(options, flavour, library)
    targets = () if options.sm == "current" else name_targets(options, library, flavour)
    reason = f"{library.flavour} {library.version} is installed" if library else f"{flavour} is not installed"
    return Tool("tensorrt_rtx" if flavour == "tensorrt-rtx" else "trtexec", _typing(library), targets, reason)


def name_targets(options: BuildOptions, library: TensorRt | None, flavour: Flavour) -> tuple[str, ...]:
    """Compute capabilities as given, checked as far as that goes without the library."""
    if library is not None:
        return choose_targets(library, options.sm)
    if flavour == "tensorrt":
        raise IncompatibleError(
            "tensorrt builds only for the GPU it runs on: use --sm current, or the flavour tensorrt-rtx"
        )
    targets = tuple(part.strip() for part in options.sm.split(",") if part.strip())
    for target in targets:
        if not re.fullmatch(r"\d+\.\d", target):
            raise UsageError(f"--sm {target} is no compute capability, such as 8.9")
        if target in REFUSED_BY_RTX:
            raise IncompatibleError(
                f"TensorRT for RTX does not run on compute capability {target}; use --flavour tensorrt"
            )
    return targets


def list_commands(root: Path, manifest: Manifest, options: BuildOptions, tool: Tool) -> Iterator[tuple[str, str]]:
    """Graph and command line, for every graph that is asked for."""
    check_length(options, manifest.shape.max_length)
    flavour: Flavour = "tensorrt-rtx" if tool.name == "tensorrt_rtx" else "tensorrt"
    specs = engine_specs(choose_graphs(graph_specs(manifest.shape), options), staged=tool.typing == "weak")
    check_fixed_sizes(specs, manifest.shape.max_length, options)
    for name, spec in specs.items():
        profiles = make_profiles(flavour, spec, manifest.shape.max_length, options)
        onnx = str(root / manifest.graphs[name].file)
        yield name, write_command(tool, onnx, spec, manifest.dtype, profiles, name_switches(options))


def name_switches(options: BuildOptions) -> tuple[str, ...]:
    """The tool's words for a strict timing cache, which lies beside the plan, and for compatibility."""
    timing = ("--timingCacheFile=timing.cache", "--errorOnTimingCacheMiss") if options.timing_cache == "strict" else ()
    return timing + COMPATIBILITY[options.compatible]


def write_command(
    tool: Tool,
    onnx: str,
    spec: GraphSpec,
    dtype: DType,
    profiles: Sequence[Mapping[str, Range]],
    switches: Sequence[str] = (),
) -> str:
    """The line that builds one graph into a plan in the working directory, as a shell takes it."""
    words = [tool.name, f"--onnx={onnx}", f"--saveEngine={spec.name}.plan", "--skipInference"]
    words += [*_types(tool, engine_type(spec, dtype)), *switches]
    if tool.name == "tensorrt_rtx":
        named = ",".join(target.replace(".", "") for target in tool.targets)
        words.append(f"--computeCapabilities={named}" if named else "--useGpu")
    for place, ranges in enumerate(profiles):
        words += [f"--profile={place}"] if len(profiles) > 1 else []
        words += _shapes(spec, ranges)
    return shlex.join(words)


def _types(tool: Tool, dtype: DType) -> Iterator[str]:
    if dtype == "float32":
        yield "--noTF32"
    if tool.typing == "weak":
        yield "--preview=+profileSharing0806"
        if dtype != "float32":
            yield from ("--fp16", "--precisionConstraints=obey")
    elif tool.typing == "asked":
        yield "--stronglyTyped"


def _shapes(spec: GraphSpec, ranges: Mapping[str, Range]) -> Iterator[str]:
    """For an input whose value is needed the tools read the numbers as the value."""
    inputs = input_ranges(spec, ranges)
    for place, name in enumerate(("min", "opt", "max")) if inputs else ():
        yield f"--{name}Shapes=" + ",".join(
            f"{key}:{'x'.join(map(str, sizes[place]))}" for key, sizes in inputs.items()
        )


def _typing(library: TensorRt | None) -> Typing:
    if library is None:
        return "strong"
    if not library.strongly_typed:
        return "weak"
    # 11 and TensorRT for RTX dropped the older flag together with every other typing.
    return "asked" if hasattr(library.module.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH") else "strong"

"""Bundle -> TensorRT engines, one per graph: weights stay inputs, so a plan is about a megabyte and serves all layers."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from dllm_export.errors import UsageError
from dllm_export.exporter.precision import set_precision
from dllm_export.graphs import DType, GraphSpec
from dllm_export.runtime.bundle import Bundle, file_digest, open_bundle
from dllm_export.runtime.manifest import MANIFEST, EngineRecord, FileRecord, Manifest, encode_manifest
from dllm_export.runtime.options import flag, option
from dllm_export.runtime.tensorrt.library import TensorRt, choose_targets, current_platform, load_tensorrt

if TYPE_CHECKING:
    import tensorrt as trt

Range = tuple[int, int, int]
"""Smallest, usual and largest size of a dim."""

BUILD = 2
"""Counts changes of this module that make other plans from the same graph."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """For which library, GPUs and sizes to build."""

    flavour: str = option("auto", "TensorRT library", choices=("auto", "tensorrt", "tensorrt-rtx"))
    sm: str = option("current", "compute capabilities, such as 8.9,12.0; current asks the GPU of this machine")
    max_batch: int = option(4, "most sequences in a batch")
    max_length: int | None = option(None, "longest prompt and response together; default: the model's own")
    rows: int = option(256, "response rows that engines are tuned for; the head takes no more of them in a step")

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_length", "rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{flag(name)} is {value}, expected at least 1")


def build_engines(
    bundle: Bundle, options: BuildOptions, progress: Callable[[str, int, int], None] | None = None
) -> Bundle:
    """Build what the bundle lacks for these options; the bundle's manifest then lists the plans."""
    library = load_tensorrt(options.flavour)
    targets = choose_targets(library, options.sm)
    report = progress or (lambda what, step, steps: None)
    folder = f"engines/{library.flavour}-{library.version}-{'_'.join(targets)}"
    manifest, steps = bundle.manifest, len(bundle.specs)
    for number, (name, spec) in enumerate(bundle.specs.items()):
        report(f"engine {name}", number, steps)
        profiles = make_profiles(library, spec, manifest.shape.max_length, options)
        key = _build_key(bundle, name, library, targets, profiles)
        if any(record.key == key for record in manifest.engines):
            continue
        start = time.perf_counter()
        plan, flags = build_plan(library, bundle.graph_bytes(name), spec, manifest.dtype, profiles, targets)
        record = EngineRecord(
            graph=name,
            file=f"{folder}/{name}-{key[:12]}.plan",
            flavour=library.flavour,
            version=library.version,
            targets=targets,
            platform=current_platform(),
            cuda="" if library.targets else _driver_cuda(),
            flags=flags,
            profiles=tuple({dim: profile[dim] for dim in sorted(profile)} for profile in profiles),
            key=key,
            seconds=round(time.perf_counter() - start, 3),
        )
        manifest = _add_engine(bundle.path, manifest, record, plan)
    report("engines", steps, steps)
    return open_bundle(bundle.path)


def _driver_cuda() -> str:
    from dllm_export.runtime.cuda import driver_cuda  # where no GPU is needed, no CUDA is installed either

    return driver_cuda()


def make_profiles(
    library: TensorRt, spec: GraphSpec, model_length: int, options: BuildOptions
) -> tuple[dict[str, Range], ...]:
    """Size ranges of a graph, the narrowest first.

    Standard TensorRT tunes for a profile's usual sizes, so that layers get one for the response's rows and one for the
    whole sequence. TensorRT for RTX specialises at run time: one wide profile serves.
    """
    wide = dim_ranges(spec, model_length, options)
    rows = min(options.rows, wide.get("S", (0, 0, 0))[2])
    narrow = wide | {dim: (1, min(wide[dim][1], rows), rows) for dim in ("X", "Q") if dim in wide}
    if library.targets or narrow == wide or not spec.name.startswith("layer_"):
        return (wide,)
    return (narrow, wide)


def dim_ranges(spec: GraphSpec, model_length: int, options: BuildOptions) -> dict[str, Range]:
    """The widest sizes of a graph: a range for each of its dynamic dims."""
    length = min(options.max_length or model_length, model_length)
    rows = min(options.rows, length)
    whole, some = (1, min(1024, length), length), (1, rows, length)
    by_dim: dict[str, Range] = {
        "B": (1, 1, options.max_batch),
        "S": whole,
        "N": whole,
        "X": some,
        "Q": (1, min(64, rows), rows if spec.name.startswith("head") else length),
    }
    dims = {dim for tensor in spec.inputs for dim in tensor.dims if isinstance(dim, str)}
    return {dim: by_dim[dim] for dim in dims} | ({"Q": by_dim["Q"]} if _has_budget(spec) else {})


def build_plan(
    library: TensorRt,
    onnx: bytes,
    spec: GraphSpec,
    dtype: DType,
    profiles: Sequence[Mapping[str, Range]],
    targets: Sequence[str],
) -> tuple[bytes, tuple[str, ...]]:
    """One serialised engine and the builder flags it was made with, or an error with the library's own messages."""
    module = library.module
    builder: trt.Builder = library.require(module.Builder(library.logger), "create a builder")
    network = library.require(builder.create_network(library.network_flags()), "create a network")
    parser: trt.OnnxParser = module.OnnxParser(network, library.logger)
    if not parser.parse(onnx):
        library.logger.messages = [
            *(str(parser.get_error(place).desc()) for place in range(parser.num_errors)),
            *library.logger.messages,
        ]
        library.require(None, f"parse graph '{spec.name}'")
    config = builder.create_builder_config()
    for ranges in profiles:
        profile = make_profile(builder, spec, ranges)
        if ranges:
            library.require(config.add_optimization_profile(profile), f"accept the size ranges of '{spec.name}'")
    flags = set_precision(library, network, config, dtype)
    set_targets(library, config, targets)
    plan = library.require(builder.build_serialized_network(network, config), f"build graph '{spec.name}'")
    return bytes(plan), flags


def make_profile(builder: trt.Builder, spec: GraphSpec, ranges: Mapping[str, Range]) -> trt.IOptimizationProfile:
    """The ranges as an optimisation profile: shapes of the inputs, and the value of `budget`."""
    profile = builder.create_optimization_profile()
    for tensor in spec.inputs:
        if tensor.name == "budget":
            profile.set_shape_input(tensor.name, *([size] for size in ranges["Q"]))
        elif any(isinstance(dim, str) for dim in tensor.dims):
            shapes = [[ranges[dim][at] if isinstance(dim, str) else dim for dim in tensor.dims] for at in range(3)]
            profile.set_shape(tensor.name, *shapes)
    return profile


def set_targets(library: TensorRt, config: Any, targets: Sequence[str]) -> None:
    """What only one flavour has: named compute capabilities, or contexts that share a profile."""
    if library.targets:
        config.num_compute_capabilities = len(targets)
        for place, target in enumerate(targets):
            config.set_compute_capability(library.capability(target), place)
    sharing = getattr(getattr(library.module, "PreviewFeature", None), "PROFILE_SHARING_0806", None)
    if sharing is not None:
        config.set_preview_feature(sharing, True)


def _has_budget(spec: GraphSpec) -> bool:
    return any(tensor.name == "budget" for tensor in spec.inputs)


def _build_key(
    bundle: Bundle,
    graph: str,
    library: TensorRt,
    targets: Sequence[str],
    profiles: Sequence[Mapping[str, Range]],
) -> str:
    """Digest of everything a plan depends on: builds of the same inputs differ in bytes, so plans cannot be compared."""
    sorted_profiles = [dict(sorted(profile.items())) for profile in profiles]
    parts = (BUILD, library.flavour, library.version, targets, current_platform(), sorted_profiles)
    return hashlib.sha256(bundle.graph_bytes(graph) + msgspec.json.encode(parts)).hexdigest()


def _add_engine(root: Path, manifest: Manifest, record: EngineRecord, plan: bytes) -> Manifest:
    """Write the plan under its key, then the manifest that lists it, then drop what it replaces.

    Whenever this stops, the manifest in place lists files that are there and unchanged.
    """
    path = root / record.file
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, plan)
    replaced = {
        other.file
        for other in manifest.engines
        if (other.graph, other.flavour, other.version, other.targets)
        == (record.graph, record.flavour, record.version, record.targets)
    }
    entry = FileRecord(path=record.file, size=len(plan), sha256=file_digest(path))
    manifest = msgspec.structs.replace(
        manifest,
        engines=(*(other for other in manifest.engines if other.file not in replaced), record),
        files=(*(other for other in manifest.files if other.path not in replaced | {record.file}), entry),
    )
    _replace(root / MANIFEST, encode_manifest(manifest))
    for file in replaced - {record.file}:
        (root / file).unlink(missing_ok=True)
    return manifest


def _replace(path: Path, data: bytes) -> None:
    work = path.with_name(f".{path.name}.partial")
    work.write_bytes(data)
    os.replace(work, path)

"""Bundle -> TensorRT engines, one per graph: weights stay inputs, so a plan is about a megabyte and serves all layers."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import msgspec
from numpy.typing import NDArray

from dllm_export.errors import IntegrityError
from dllm_export.exporter.build_options import BuildOptions, choose_graphs
from dllm_export.exporter.build_progress import BuildProgress
from dllm_export.exporter.build_target import BuildTarget, check_build, choose_target, find_build_cuda
from dllm_export.exporter.files import require_writable
from dllm_export.exporter.plans import build_plan, make_builder
from dllm_export.exporter.ranges import check_fixed_sizes, make_profiles
from dllm_export.exporter.timing import TIMING_CACHE
from dllm_export.graphs import GraphSpec, engine_specs, graph_specs
from dllm_export.runtime.bundle import (
    ENGINES,
    Bundle,
    file_digest,
    find_misstatement,
    open_bundle,
    read_manifest,
    verify_file,
)
from dllm_export.runtime.files import replace_file
from dllm_export.runtime.manifest import MANIFEST, Compatible, EngineRecord, FileRecord, Manifest, encode_manifest
from dllm_export.runtime.tensorrt.library import current_platform
from dllm_export.runtime.tensorrt.profiles import Range

if TYPE_CHECKING:
    import tensorrt as trt

BUILD = 4
"""Counts changes of the build that make other plans from the same graph."""


def build_engines(
    bundle: Bundle, options: BuildOptions, progress: Callable[[str, int, int], None] | None = None
) -> Bundle:
    """Build what the bundle lacks for these options and graphs; the bundle's manifest then lists the plans.

    Progress is counted in hundredths of the whole build.
    """
    target, manifest = choose_target(options), bundle.manifest
    check_build(target.library, options, manifest.dtype, manifest.shape.max_length)
    specs = engine_specs(choose_graphs(bundle.specs, options), staged=target.library.staged)
    check_fixed_sizes(specs, manifest.shape.max_length, options)
    report = progress or (lambda what, step, steps: None)
    missing = find_missing(bundle, specs, options, target)
    if missing:
        require_writable(bundle.path)
        builder = make_builder(target.library)
    for number, (name, (profiles, key)) in enumerate(missing.items()):

        def show(share: float, number: int = number, name: str = name) -> None:
            report(f"engine {name} ({number + 1} of {len(missing)})", int(100 * (number + share) / len(missing)), 100)

        show(0.0)
        record, plan = build_engine(bundle, specs[name], options, target, profiles, key, builder, BuildProgress(show))
        manifest = _add_engine(bundle.path, manifest, record, plan)
    report("engines", 100, 100)
    return open_bundle(bundle.path)


def drop_damaged_engines(root: Path) -> tuple[str, ...]:
    """Take plans that are missing or changed out of the manifest, so that they can be built again; returns their files.

    Every other file is left to `open_bundle`, and so is what a plan's directory may hold beside the listed ones.
    """
    manifest = read_manifest(root)
    specs = graph_specs(manifest.shape)
    plans = {record.path: record for record in manifest.files if record.path.startswith(ENGINES)}
    dropped = {path for path, record in plans.items() if _is_damaged(root, manifest, record)}
    dropped |= {engine.file for engine in manifest.engines if find_misstatement(manifest, engine, specs)}
    if not dropped:
        return ()
    require_writable(root)
    manifest = msgspec.structs.replace(
        manifest,
        engines=tuple(engine for engine in manifest.engines if engine.file not in dropped),
        files=tuple(record for record in manifest.files if record.path not in dropped & plans.keys()),
    )
    replace_file(root / MANIFEST, encode_manifest(manifest))
    return tuple(sorted(dropped))


def _is_damaged(root: Path, manifest: Manifest, record: FileRecord) -> bool:
    try:
        verify_file(root, manifest, record)
    except IntegrityError:
        return True
    return False


def find_missing(
    bundle: Bundle, specs: Mapping[str, GraphSpec], options: BuildOptions, target: BuildTarget
) -> dict[str, tuple[tuple[dict[str, Range], ...], str]]:
    """Graphs without an engine for these options, with the size ranges and the key it will have."""
    present = {record.key for record in bundle.manifest.engines}
    missing = {}
    for name, spec in specs.items():
        profiles = make_profiles(target.library.flavour, spec, bundle.manifest.shape.max_length, options)
        key = _build_key(bundle.graph_bytes(spec.name), target, profiles, options.compatible)
        if key not in present:
            missing[name] = (profiles, key)
    return missing


def build_engine(
    bundle: Bundle,
    spec: GraphSpec,
    options: BuildOptions,
    target: BuildTarget,
    profiles: tuple[dict[str, Range], ...],
    key: str,
    builder: trt.Builder,
    progress: BuildProgress,
    constants: Mapping[str, NDArray[Any]] = MappingProxyType({}),
) -> tuple[EngineRecord, bytes]:
    """The engine of one graph, and its record; one with `constants` belongs in no manifest, since its record names none."""
    library, start = target.library, time.perf_counter()
    timing = None if library.targets else bundle.path / target.folder / TIMING_CACHE
    if timing is not None and options.timing_cache != "strict":
        timing.parent.mkdir(parents=True, exist_ok=True)
    plan, flags = build_plan(
        library,
        bundle.graph_bytes(spec.name),
        spec,
        bundle.manifest.dtype,
        profiles,
        target.targets,
        builder=builder,
        progress=progress,
        timing=timing,
        strict=options.timing_cache == "strict",
        compatible=options.compatible,
        constants=constants,
    )
    record = EngineRecord(
        graph=spec.name,
        file=f"{target.folder}/{spec.name}-{key[:12]}.plan",
        flavour=library.flavour,
        version=library.version,
        targets=target.targets,
        platform=current_platform(),
        cuda=find_build_cuda(library),
        compatible=options.compatible,
        flags=flags,
        profiles=tuple({dim: profile[dim] for dim in sorted(profile)} for profile in profiles),
        key=key,
        seconds=round(time.perf_counter() - start, 3),
    )
    return record, plan


def _build_key(
    onnx: bytes, target: BuildTarget, profiles: Sequence[Mapping[str, Range]], compatible: Compatible
) -> str:
    """Digest of everything a plan depends on: builds of the same inputs differ in bytes, so plans cannot be compared.

    A strict timing cache is left out: it decides whether a plan is made, not which.
    """
    sorted_profiles = [dict(sorted(profile.items())) for profile in profiles]
    library = target.library
    parts = (BUILD, library.flavour, library.version, target.targets, current_platform(), sorted_profiles, compatible)
    return hashlib.sha256(onnx + msgspec.json.encode(parts)).hexdigest()


def _add_engine(root: Path, manifest: Manifest, record: EngineRecord, plan: bytes) -> Manifest:
    """Write the plan under its key, then the manifest that lists it, then drop what it replaces.

    Whenever this stops, the manifest in place lists files that are there and unchanged.
    """
    path = root / record.file
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, plan)
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
    replace_file(root / MANIFEST, encode_manifest(manifest))
    for file in replaced - {record.file}:
        (root / file).unlink(missing_ok=True)
    return manifest

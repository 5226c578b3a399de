"""`dllm-export build`: TensorRT engines into a bundle, ahead of time and without a GPU where the library can."""

from __future__ import annotations

import time
from pathlib import Path

import click

from dllm_export.exporter.engines import BuildOptions, build_engines
from dllm_export.runtime.bundle import open_bundle
from dllm_export.runtime.manifest import EngineRecord, Manifest
from dllm_export.tools.flags import Command, describe, from_fields, shared_flags
from dllm_export.tools.output import (
    format_bytes,
    make_table,
    plural,
    print_json,
    print_note,
    print_table,
    show_progress,
)


@click.command("build", cls=Command)
@click.argument("bundle", type=click.Path(path_type=Path))
@from_fields(BuildOptions, "options", "Options")
@shared_flags
def command(bundle: Path, options: BuildOptions, as_json: bool) -> None:
    """Build TensorRT engines of a bundle's graphs.

    Weights stay inputs, so one plan of about a megabyte serves all layers. TensorRT for RTX builds for named compute
    capabilities on a machine without a GPU. Engines that are there already are not built again.
    """
    opened = open_bundle(bundle)
    before = {record.key for record in opened.manifest.engines}
    start = time.perf_counter()
    with show_progress() as progress:
        manifest = build_engines(opened, options, progress).manifest
    seconds = time.perf_counter() - start
    built = [record for record in manifest.engines if record.key not in before]
    if as_json:
        engines = [describe_engine(manifest, record) for record in manifest.engines]
        print_json({"options": describe(options), "seconds": seconds, "built": len(built), "engines": engines})
        return
    table = make_table("graph", "library", "compute capabilities", "size", "seconds")
    for record in manifest.engines:
        library, size = f"{record.flavour} {record.version}", format_bytes(plan_bytes(manifest, record))
        table.add_row(record.graph, library, " ".join(record.targets), size, f"{record.seconds:.2f}")
    print_table(table)
    print_note(f"built {plural(len(built), 'engine')} in {seconds:.1f} s")


def plan_bytes(manifest: Manifest, record: EngineRecord) -> int:
    """Size of an engine's plan."""
    return next(file.size for file in manifest.files if file.path == record.file)


def describe_engine(manifest: Manifest, record: EngineRecord) -> dict[str, object]:
    """An engine as JSON."""
    return {
        "graph": record.graph,
        "file": record.file,
        "flavour": record.flavour,
        "version": record.version,
        "targets": record.targets,
        "profiles": record.profiles,
        "flags": record.flags,
        "bytes": plan_bytes(manifest, record),
        "seconds": record.seconds,
    }

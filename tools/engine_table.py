"""Engines of a bundle as JSON and as a table, for every command that shows them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rich.table import Table

from dllm_export.runtime.manifest import EngineRecord, Manifest
from dllm_export.runtime.tensorrt.profiles import Range
from dllm_export.tools.output import format_bytes, make_table


def describe_engine(manifest: Manifest, record: EngineRecord) -> dict[str, object]:
    """An engine as JSON."""
    return {
        "graph": record.graph,
        "file": record.file,
        "flavour": record.flavour,
        "version": record.version,
        "targets": record.targets,
        "platform": record.platform,
        "cuda": record.cuda,
        "compatible": record.compatible,
        "profiles": record.profiles,
        "flags": record.flags,
        "bytes": plan_bytes(manifest, record),
        "seconds": record.seconds,
    }


def make_engine_table(manifest: Manifest) -> Table:
    """One row per engine."""
    columns = ("graph", "library", "compute capabilities", "size", "seconds", "sizes")
    table = make_table(*columns, right=("size", "seconds"))
    for record in manifest.engines:
        table.add_row(
            record.graph,
            f"{record.flavour} {record.version}",
            " ".join(record.targets),
            format_bytes(plan_bytes(manifest, record)),
            f"{record.seconds:.2f}",
            describe_profiles(record.profiles),
        )
    return table


def describe_profiles(profiles: Iterable[Mapping[str, Range]]) -> str:
    """B 1..4, S 1..4096, and ` | ` between profiles."""
    return " | ".join(
        ", ".join(f"{dim} {low}..{high}" for dim, (low, _, high) in profile.items()) for profile in profiles
    )


def plan_bytes(manifest: Manifest, record: EngineRecord) -> int:
    """Size of an engine's plan; 0 if the manifest does not list it, which opening the bundle refuses."""
    return next((file.size for file in manifest.files if file.path == record.file), 0)

"""`dllm-export build`: TensorRT engines into a bundle, ahead of time and without a GPU where the library can."""

from __future__ import annotations

import shlex
import time
from dataclasses import dataclass, fields
from pathlib import Path

import click

from dllm_export.exporter.build_options import BuildOptions, choose_graphs
from dllm_export.exporter.build_target import BuildTarget, choose_target
from dllm_export.exporter.engines import build_engines, drop_damaged_engines
from dllm_export.exporter.trtexec import choose_tool, list_commands
from dllm_export.graphs import engine_specs
from dllm_export.runtime.bundle import Bundle, open_bundle, read_manifest
from dllm_export.runtime.options import flag
from dllm_export.tools.engine_table import describe_engine, make_engine_table
from dllm_export.tools.flags import Command, Flag, describe, from_fields, shared_flags
from dllm_export.tools.output import Report, plural, print_json, print_note, print_table, print_warning, show_progress


@click.command("build", cls=Command)
@click.argument("bundle", type=click.Path(path_type=Path))
@from_fields(BuildOptions, "options", "Options")
@click.option(
    "--dry-run",
    cls=Flag,
    is_flag=True,
    help="build nothing: print the equivalent command of trtexec or tensorrt_rtx for every graph",
)
@shared_flags
def command(bundle: Path, options: BuildOptions, dry_run: bool, as_json: bool) -> None:
    """Build TensorRT engines of a bundle's graphs.

    Weights stay inputs, so one plan of about a megabyte serves all layers. TensorRT for RTX builds for named compute
    capabilities on a machine without a GPU. Engines that are there already are not built again.
    """
    if dry_run:
        print_commands(bundle, options, as_json)
        return
    read_manifest(bundle)  # a wrong path is said before a missing library
    target = choose_target(options)
    opened = open_repaired(bundle)
    print_target(target)
    with show_progress() as progress:
        result = build(opened, options, target, progress)
    if as_json:
        print_json(result.describe())
    else:
        print_table(make_engine_table(result.bundle.manifest))
        result.print_note()


@dataclass(frozen=True, slots=True)
class Result:
    """What a build did."""

    bundle: Bundle
    options: BuildOptions
    target: BuildTarget
    built: int
    present: int
    """Engines that were there already."""
    seconds: float

    def describe(self) -> dict[str, object]:
        """The result as JSON."""
        library, manifest = self.target.library, self.bundle.manifest
        return {
            "library": {"flavour": library.flavour, "version": library.version, "reason": self.target.reason},
            "targets": self.target.targets,
            "options": describe(self.options),
            "seconds": self.seconds,
            "built": self.built,
            "up_to_date": self.present,
            "engines": [describe_engine(manifest, record) for record in manifest.engines],
        }

    def print_note(self) -> None:
        """How many engines were built and how many there were."""
        is_are = "engine is" if self.present == 1 else "engines are"
        parts = [f"built {plural(self.built, 'engine')} in {self.seconds:.1f} s"] if self.built else []
        parts += [f"{self.present} {is_are} up to date"] if self.present else []
        print_note("; ".join(parts))


def open_repaired(path: Path) -> Bundle:
    """The bundle without its damaged plans, which are named; any other damage is an error."""
    dropped = drop_damaged_engines(path)
    if dropped:
        print_warning(f"{plural(len(dropped), 'engine')} missing or damaged, no longer listed: {', '.join(dropped)}")
    return open_bundle(path)


def build(bundle: Bundle, options: BuildOptions, target: BuildTarget, progress: Report) -> Result:
    """Build what is missing and count it."""
    before = {record.key for record in bundle.manifest.engines}
    start = time.perf_counter()
    finished = build_engines(bundle, options, progress)
    built = sum(record.key not in before for record in finished.manifest.engines)
    wanted = engine_specs(choose_graphs(bundle.specs, options), staged=target.library.staged)
    return Result(finished, options, target, built, len(wanted) - built, time.perf_counter() - start)


def print_target(target: BuildTarget) -> None:
    """The library and why, before the work with it."""
    library = target.library
    print_note(
        f"{library.flavour} {library.version}: {target.reason}; compute capabilities {', '.join(target.targets)}"
    )


def spell_flags(options: BuildOptions) -> str:
    """The options as flags, as far as they are not the defaults."""
    values = ((field, getattr(options, field.name)) for field in fields(options))
    return shlex.join(
        word for field, value in values if value != field.default for word in (flag(field.name), str(value))
    )


def print_commands(bundle: Path, options: BuildOptions, as_json: bool) -> None:
    """One line per graph on stdout, to be run or read by a machine."""
    manifest = read_manifest(bundle)
    tool = choose_tool(options, manifest.dtype)
    lines = dict(list_commands(bundle, manifest, options, tool))
    if as_json:
        print_json({"tool": tool.name, "reason": tool.reason, "options": describe(options), "commands": lines})
        return
    print_note(f"for {tool.name}: {tool.reason}")
    for line in lines.values():
        click.echo(line)

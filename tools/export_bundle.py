"""`dllm-export export`: a model directory becomes a bundle."""

from __future__ import annotations

import shlex
import time
from dataclasses import fields
from pathlib import Path

import click

from dllm_export.errors import UsageError
from dllm_export.exporter.build_options import BuildOptions
from dllm_export.exporter.build_target import BuildTarget, check_build, choose_target
from dllm_export.exporter.options import ExportOptions
from dllm_export.runtime.bundle import Bundle
from dllm_export.runtime.options import flag
from dllm_export.tools.build_engines import Result, build, print_target, spell_flags
from dllm_export.tools.engine_table import make_engine_table
from dllm_export.tools.flags import Command, Flag, describe, from_fields, shared_flags
from dllm_export.tools.output import (
    Report,
    format_bytes,
    on_terminal,
    print_json,
    print_pairs,
    print_table,
    print_warning,
    printable,
    show_progress,
)

BUILD = "With --build"


@click.command("export", cls=Command)
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    cls=Flag,
    type=click.Path(path_type=Path),
    required=True,
    metavar="BUNDLE",
    help="directory to write; it appears when the export is complete",
)
@from_fields(ExportOptions, "options", "Options")
@click.option("--build", "with_engines", cls=Flag, is_flag=True, section=BUILD, help="then build TensorRT engines")
@from_fields(BuildOptions, "build_options", BUILD)
@shared_flags
def command(
    model: Path, output: Path, options: ExportOptions, with_engines: bool, build_options: BuildOptions, as_json: bool
) -> None:
    """Turn a model directory into a bundle of ONNX graphs and weights.

    MODEL is a local directory with config.json, .safetensors files and a tokenizer.json, as downloaded from a hub.
    Needs the extra `export` (torch and onnx), and for --build `tensorrt-rtx` or `tensorrt`.
    """
    from dllm_export.exporter.pipeline import export

    target = check_before_export(model, options, build_options) if with_engines else None
    if target is None:
        refuse_build_flags()
    else:
        print_target(target)
    start = time.perf_counter()
    with show_progress() as progress:
        bundle = export(model, output, options, progress)
        seconds = time.perf_counter() - start
        for value in bundle.manifest.assumed:
            print_warning(f"assumed {value}")
        result = build_after_export(bundle, build_options, target, progress) if target else None
    if result is not None:
        bundle = result.bundle
    if as_json:
        engines = {"build": result.describe()} if result else {}
        print_json({**summarize(bundle), "options": describe(options), "seconds": seconds, **engines})
    elif on_terminal():
        print_summary(bundle, seconds)
        if result is not None:
            click.echo()
            print_table(make_engine_table(bundle.manifest))
    else:
        click.echo(bundle.path)
    if result is not None and not as_json:
        result.print_note()


def refuse_build_flags() -> None:
    """Flags of a build that was not asked for are a mistake."""
    context = click.get_current_context()
    for field in fields(BuildOptions):
        if context.get_parameter_source(field.name) is click.core.ParameterSource.COMMANDLINE:
            raise UsageError(f"{flag(field.name)} applies to --build: add --build, or leave it out")


def check_before_export(model: Path, options: ExportOptions, build_options: BuildOptions) -> BuildTarget:
    """The target of the build, or its refusal while nothing has been done yet."""
    from dllm_export.exporter.checkpoint import open_checkpoint

    target = choose_target(build_options)
    checkpoint = open_checkpoint(
        model,
        family=options.family,
        mask_id=options.mask_id,
        layers=options.num_layers,
        tokenizer=options.tokenizer,
    )
    check_build(target.library, build_options, options.dtype, checkpoint.config.shape.max_length)
    return target


def build_after_export(bundle: Bundle, options: BuildOptions, target: BuildTarget, progress: Report) -> Result:
    """The engines; whatever goes wrong, the export stays and the user reads how to go on."""
    try:
        return build(bundle, options, target, progress)
    except BaseException:
        line = f"dllm-export build {shlex.quote(str(bundle.path))} {spell_flags(options)}".rstrip()
        print_warning(f"the export is finished and stays in {bundle.path}, engines are missing; to go on: {line}")
        raise


def summarize(bundle: Bundle) -> dict[str, object]:
    """What was written, in numbers."""
    manifest = bundle.manifest
    graphs = {record.file for record in manifest.graphs.values()}
    sizes = {record.path: record.size for record in manifest.files}
    return {
        "bundle": str(bundle.path),
        "family": manifest.family,
        "layers": manifest.shape.layers,
        "parameters": manifest.shape.weight_count,
        "dtype": manifest.dtype,
        "graph_bytes": sum(sizes[file] for file in graphs),
        "weight_bytes": sum(size for path, size in sizes.items() if path.startswith("weights/")),
        "assumed": manifest.assumed,
        "digest": manifest.digest,
    }


def print_summary(bundle: Bundle, seconds: float) -> None:
    """The same for a person."""
    facts = summarize(bundle)
    size = {name: format_bytes(float(str(facts[f"{name}_bytes"]))) for name in ("graph", "weight")}
    print_pairs(
        (
            ("bundle", facts["bundle"]),
            ("model", f"{facts['family']}, {facts['layers']} layers, {_millions(bundle)} parameters"),
            ("dtype", facts["dtype"]),
            ("graphs", f"{len(bundle.manifest.graphs)} files, {size['graph']}"),
            ("weights", size["weight"]),
            ("time", f"{seconds:.1f} s"),
            ("next", printable(f"dllm-export verify {bundle.path}")),
        )
    )


def _millions(bundle: Bundle) -> str:
    return f"{bundle.manifest.shape.weight_count / 1e6:.1f} M"

"""`dllm-export export`: a model directory becomes a bundle."""

from __future__ import annotations

import time
from pathlib import Path

import click

from dllm_export.exporter.options import ExportOptions
from dllm_export.runtime.bundle import Bundle
from dllm_export.tools.flags import Command, Flag, describe, from_fields, shared_flags
from dllm_export.tools.output import (
    format_bytes,
    on_terminal,
    print_json,
    print_pairs,
    print_warning,
    printable,
    show_progress,
)


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
@shared_flags
def command(model: Path, output: Path, options: ExportOptions, as_json: bool) -> None:
    """Turn a model directory into a bundle of ONNX graphs and weights.

    MODEL is a local directory with config.json, .safetensors files and a tokenizer.json, as downloaded from a hub.
    Needs the extra `export` (torch and onnx).
    """
    from dllm_export.exporter.pipeline import export

    start = time.perf_counter()
    with show_progress() as progress:
        bundle = export(model, output, options, progress)
    seconds = time.perf_counter() - start
    for value in bundle.manifest.assumed:
        print_warning(f"assumed {value}")
    if as_json:
        print_json({**summarize(bundle), "options": describe(options), "seconds": seconds})
    elif on_terminal():
        print_summary(bundle, seconds)
    else:
        click.echo(bundle.path)


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

"""`dllm-export inspect`: what a bundle says about itself. Reads the manifest and file sizes, nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import click

from dllm_export.errors import IntegrityError
from dllm_export.graphs import graph_specs
from dllm_export.runtime.bundle import EXPORT_AGAIN, find_misstatement, find_rebuild, find_remedy, read_manifest
from dllm_export.runtime.manifest import Manifest, TensorRecord
from dllm_export.tools.engine_table import describe_engine, make_engine_table
from dllm_export.tools.flags import Command, shared_flags
from dllm_export.tools.output import format_bytes, make_table, print_json, print_pairs, print_table


@click.command("inspect", cls=Command)
@click.argument("bundle", type=click.Path(path_type=Path))
@shared_flags
def command(bundle: Path, as_json: bool) -> None:
    """Show what is in a bundle.

    Reads the manifest and looks at the files' sizes, which takes no time even for large bundles; every command that
    runs a bundle checks the contents as well.
    """
    manifest = read_manifest(bundle)
    problems = dict(find_problems(bundle, manifest))
    mask = mask_text(bundle, manifest)
    if as_json:
        print_json(summarize(bundle, manifest, mask, list(problems)))
    else:
        print_manifest(bundle, manifest, mask)
    if problems:
        # A new bundle needs new engines, too, so that the export comes first.
        remedy = EXPORT_AGAIN if EXPORT_AGAIN in problems.values() else next(iter(problems.values()))
        raise IntegrityError(f"{'; '.join(list(problems)[:3])}{'; ...' if len(problems) > 3 else ''}: {remedy}")


def find_problems(bundle: Path, manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Files that are missing or have another size than the manifest states, and engines that cannot be; with remedies."""
    for record in manifest.files:
        path, remedy = bundle / record.path, find_remedy(bundle, manifest, record.path)
        if not path.is_file():
            yield f"{record.path} is missing", remedy
        elif path.stat().st_size != record.size:
            yield f"{record.path} has {path.stat().st_size} bytes, expected {record.size}", remedy
    specs = graph_specs(manifest.shape)
    for engine in manifest.engines:
        problem = find_misstatement(manifest, engine, specs)
        if problem:
            yield f"the engine of graph '{engine.graph}' {problem}", find_rebuild(bundle, engine)


def mask_text(bundle: Path, manifest: Manifest) -> str | None:
    """How the mask token is written in a text for infilling, where the tokenizer can be read."""
    from dllm_export.runtime.tokenizer import Tokenizer

    record = manifest.tokenizer
    if record is None or not (bundle / record.file).is_file():
        return None
    try:
        return Tokenizer(bundle / record.file, record.chat_template, record.bos).piece(manifest.tokens.mask)
    except IntegrityError:
        return None


def summarize(bundle: Path, manifest: Manifest, mask: str | None, problems: list[str]) -> dict[str, object]:
    """The manifest without digests of single files and without the bindings themselves."""
    return {
        "bundle": str(bundle),
        "format": manifest.format,
        "digest": manifest.digest,
        "family": manifest.family,
        "architecture": manifest.architecture,
        "dtype": manifest.dtype,
        "opset": manifest.opset,
        "weights": manifest.weights,
        "parameters": manifest.shape.weight_count,
        "shape": asdict(manifest.shape),
        "tokens": {**asdict(manifest.tokens), "mask_text": mask},
        "tokenizer": manifest.tokenizer is not None,
        "chat_template": manifest.tokenizer is not None and manifest.tokenizer.chat_template is not None,
        "sampler": asdict(manifest.sampler),
        "graphs": {
            name: {"file": record.file, "bytes": _size(manifest, record.file)}
            | {kind: _tensors(getattr(record, kind)) for kind in ("inputs", "weights", "outputs")}
            for name, record in manifest.graphs.items()
        },
        "bindings": _count_bindings(manifest),
        "files": [{"path": record.path, "bytes": record.size} for record in manifest.files],
        "engines": [describe_engine(manifest, record) for record in manifest.engines],
        "assumed": manifest.assumed,
        "tools": manifest.tools,
        "problems": problems,
    }


def print_manifest(bundle: Path, manifest: Manifest, mask: str | None) -> None:
    """The same for a person: facts, then graphs, engines and files."""
    shape, tokens = manifest.shape, asdict(manifest.tokens)
    chat = manifest.tokenizer is not None and manifest.tokenizer.chat_template is not None
    counted = " from the response on" if shape.block_anchor == "response" else ""
    print_pairs(
        (
            ("bundle", f"{bundle}  (format {manifest.format}, opset {manifest.opset})"),
            ("model", f"{manifest.family} ({manifest.architecture}), {shape.weight_count / 1e6:.1f} M parameters"),
            ("dtype", f"{manifest.dtype}, weights {manifest.weights}"),
            (
                "shape",
                f"{shape.layers} layers, hidden {shape.hidden}, {shape.heads} heads ({shape.kv_heads} key/value)",
            ),
            ("", f"mlp {shape.mlp}, vocabulary {shape.vocab}, at most {shape.max_length} tokens"),
            *(
                (("attention", f"by blocks of {shape.block} rows{counted}: --policy block is exact"),)
                if shape.block
                else ()
            ),
            ("tokens", ", ".join(f"{name} {number}" for name, number in tokens.items() if number is not None)),
            ("mask text", mask or "no tokenizer: prompts are token ids"),
            ("chat", "--chat works" if chat else "no chat template"),
            ("bindings", f"{_count_bindings(manifest)} weights bound to graphs"),
            ("made with", ", ".join(f"{name} {version}" for name, version in manifest.tools.items())),
            *(("assumed", text) for text in manifest.assumed),
        )
    )
    graphs = make_table("graph", "size", "weights", "inputs -> outputs", right=("size", "weights"))
    for name, graph in manifest.graphs.items():
        inputs, outputs = (" ".join(map(_signature, kind)) for kind in (graph.inputs, graph.outputs))
        size, weights = format_bytes(_size(manifest, graph.file)), str(len(graph.weights))
        graphs.add_row(name, size, weights, f"{inputs} -> {outputs}")
    folders: dict[str, list[int]] = {}
    for record in manifest.files:
        folders.setdefault(record.path.rpartition("/")[0] + "/", []).append(record.size)
    files = make_table("folder", "files", "size", right=("files", "size"))
    for folder, sizes in (*folders.items(), ("in all", [record.size for record in manifest.files])):
        files.add_row(folder if folder != "/" else "./", str(len(sizes)), format_bytes(sum(sizes)))
    engines = (make_engine_table(manifest),) if manifest.engines else ()
    for table in (graphs, *engines, files):
        click.echo()
        print_table(table)


def _size(manifest: Manifest, file: str) -> int:
    return next(record.size for record in manifest.files if record.path == file)


def _tensors(records: tuple[TensorRecord, ...]) -> dict[str, str]:
    return {record.name: f"{record.type}[{','.join(map(str, record.dims))}]" for record in records}


def _signature(record: TensorRecord) -> str:
    return f"{record.name}[{','.join(map(str, record.dims))}]"


def _count_bindings(manifest: Manifest) -> int:
    return len(manifest.model_bindings) + sum(map(len, manifest.layer_bindings))

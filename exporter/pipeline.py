"""Checkpoint -> bundle, in order: check, convert weights, build graphs, write the manifest, rename."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from dllm_export import __version__
from dllm_export.exporter.checkpoint import Checkpoint, add_indicator, open_checkpoint
from dllm_export.exporter.onnx_graph import ExternalTensor, build_onnx
from dllm_export.exporter.onnx_ops import OPSET
from dllm_export.exporter.options import ExportOptions
from dllm_export.exporter.pack import list_files, replacing, require_space
from dllm_export.exporter.plaid_files import write_schedule
from dllm_export.exporter.probe import Probe
from dllm_export.exporter.tokenizer import SOURCES, write_tokenizer
from dllm_export.exporter.weights import FOLDER, StoredWeights, write_weights
from dllm_export.graphs import DType, graph_layers, graph_specs, has_experts, with_stages
from dllm_export.runtime.bundle import PLACEHOLDER, Bundle, file_digest, open_bundle
from dllm_export.runtime.manifest import (
    FORMAT,
    MANIFEST,
    GraphRecord,
    Manifest,
    encode_manifest,
    tensor_records,
)
from dllm_export.runtime.safetensors_file import read_header

ITEM_SIZE = {"float32": 4, "float16": 2, "bfloat16": 2}

Progress = Callable[[str, int, int], None]
"""Called with what is being done, the step and the number of steps."""


def export(
    model: Path,
    target: Path,
    options: ExportOptions = ExportOptions(),
    progress: Progress | None = None,
) -> Bundle:
    """Export a model directory and return the verified bundle."""
    report = progress or (lambda what, step, steps: None)
    checkpoint = open_checkpoint(
        model,
        family=options.family,
        mask_id=options.mask_id,
        layers=options.num_layers,
        tokenizer=options.tokenizer,
    )
    checkpoint = replace(checkpoint, config=add_indicator(checkpoint.config, options.indicator_rank))
    require_space(target, checkpoint.config.shape.weight_count * ITEM_SIZE[options.dtype])
    steps = checkpoint.config.shape.layers + 3
    with replacing(target, force=options.force) as root:
        probe = Probe(checkpoint.config)
        stored: StoredWeights | None = None
        for layer, stored in enumerate(write_weights(checkpoint, options.dtype, root, probe)):
            report(f"weights of layer {layer + 1}" if stored is None else "embedding and head", layer + 1, steps)
        assert stored is not None
        graphs = write_graphs(checkpoint, options.dtype, root)
        embedded = write_embedded(checkpoint, options.dtype, stored, root) if options.weights == "embedded" else {}
        report("graphs", steps - 1, steps)
        tokenizer = (
            None if options.no_tokenizer else write_tokenizer(options.tokenizer or model, checkpoint.config, root)
        )
        manifest = Manifest(
            format=FORMAT,
            digest="",
            family=checkpoint.config.family,
            architecture=checkpoint.architecture,
            dtype=options.dtype,
            opset=OPSET,
            shape=checkpoint.config.shape,
            tokens=replace(checkpoint.config.tokens, end_of_turn=tokenizer.end_of_turn if tokenizer else None),
            sampler=checkpoint.config.sampler,
            weights=options.weights,
            graphs=graphs,
            embedded=embedded,
            layer_bindings=stored.layers,
            model_bindings=stored.model,
            tokenizer=tokenizer.record if tokenizer else None,
            probe=probe.save(root),
            schedule=write_latent_schedule(checkpoint, root) if checkpoint.config.shape.latent else None,
            assumed=(*checkpoint.config.assumed, *stored.notes, *(tokenizer.assumed if tokenizer else ())),
            source=_source_digests(model, options.tokenizer or model),
            tools=_tool_versions(),
            files=list_files(root),
        )
        (root / MANIFEST).write_bytes(encode_manifest(manifest))
        bundle = open_bundle(root)
        report("manifest", steps, steps)
    return replace(bundle, path=target)


def write_latent_schedule(checkpoint: Checkpoint, root: Path) -> str:
    """The noise schedule of a continuous model; returns its file."""
    names = checkpoint.config.names.others
    slots = ("schedule_in", "schedule_bias", "schedule_out", "gamma_first", "gamma_last")
    with checkpoint.reading() as load:
        return write_schedule({slot: load(names[slot]) for slot in slots}, root)


def write_graphs(checkpoint: Checkpoint, dtype: DType, root: Path) -> dict[str, GraphRecord]:
    """Every graph twice: weights as inputs, and as initialisers whose data comes at opening. Kilobytes each.

    Stages are for engines alone, which take weights as inputs.
    """
    (root / "graphs").mkdir()
    records, whole = {}, graph_specs(checkpoint.config.shape)
    for name, spec in with_stages(whole).items():
        file = f"graphs/{name}.onnx"
        (root / file).write_bytes(build_onnx(spec, checkpoint.config.shape, dtype).SerializeToString())
        inputs, weights, outputs = map(tensor_records, (spec.inputs, spec.weights, spec.outputs))
        constant = f"graphs/{name}.constant.onnx" if spec.weights and name in whole else None
        if constant is not None:
            places = {weight.name: ExternalTensor(PLACEHOLDER, 0, 0) for weight in spec.weights}
            model = build_onnx(spec, checkpoint.config.shape, dtype, places, contrib=True)
            (root / constant).write_bytes(model.SerializeToString())
        contrib = f"graphs/{name}.contrib.onnx" if name in whole and has_experts(spec) else None
        if contrib is not None:
            model = build_onnx(spec, checkpoint.config.shape, dtype, contrib=True)
            (root / contrib).write_bytes(model.SerializeToString())
        records[name] = GraphRecord(
            file=file,
            constant_file=constant,
            contrib_file=contrib,
            inputs=inputs,
            weights=weights,
            outputs=outputs,
        )
    return records


def write_embedded(
    checkpoint: Checkpoint, dtype: DType, stored: StoredWeights, root: Path
) -> dict[str, tuple[str, ...]]:
    """Self-contained graphs. They lie beside the weights, since ONNX reads external data only beside or below a file."""
    files = {}
    for name, spec in graph_specs(checkpoint.config.shape).items():
        layers = graph_layers(checkpoint.config.shape, name)
        bindings = {layer: stored.layers[layer] for layer in layers} if layers and spec.weights else {0: stored.model}
        paths = []
        for number, records in bindings.items():
            suffix = "" if layers is None else f".{number:03d}"
            paths.append(f"{FOLDER}/{name}{suffix}.onnx")
            places = {weight.name: _place(root, records[weight.name].file, weight.name) for weight in spec.weights}
            model = build_onnx(spec, checkpoint.config.shape, dtype, places)
            (root / paths[-1]).write_bytes(model.SerializeToString())
        files[name] = tuple(paths)
    return files


def _place(root: Path, file: str, tensor: str) -> ExternalTensor:
    entry = read_header(root / file)[tensor]
    return ExternalTensor(location=Path(file).name, offset=entry.offset, length=entry.length)


def _source_digests(model: Path, tokenizer: Path) -> dict[str, str]:
    files = [
        model / "config.json",
        *(tokenizer / name for name in SOURCES),
        *(model / f"{stem}.index.json" for stem in ("model.safetensors", "pytorch_model.bin")),
    ]
    return {file.name: file_digest(file) for file in files if file.is_file()}


def _tool_versions() -> dict[str, str]:
    return {"dllm-export": __version__, **{name: importlib.metadata.version(name) for name in ("onnx", "torch")}}

"""Open a bundle: nothing in it is parsed or mapped before its size and digest match the manifest."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from dllm_export.errors import IntegrityError, UsageError
from dllm_export.graphs import DType, GraphSpec, graph_layers, graph_specs, with_stages
from dllm_export.runtime.manifest import (
    MANIFEST,
    EngineRecord,
    FileRecord,
    Manifest,
    WeightRecord,
    decode_manifest,
    tensor_records,
)
from dllm_export.runtime.safetensors_file import SafetensorsFile, StoredTensor
from dllm_export.runtime.tensorrt.library import build_command

READ_SIZE = 8 * 2**20
PLACEHOLDER = "given-when-opened"
"""Location of a constant graph's weights: no file; the provider gets them from the bundle's safetensors."""
LOCATION = b"\x0a\x08location\x12" + bytes([len(PLACEHOLDER)]) + PLACEHOLDER.encode()
REFERENCE = bytes([0x6A, len(LOCATION)]) + LOCATION
"""That location as ONNX encodes it: field 13 of TensorProto with its length, so that nothing can hide inside it."""
ENGINES = "engines/"
"""Where plans lie: what can be built again without an export."""
EXPORT_AGAIN = "export again"
STORED_TYPES: Mapping[DType, str] = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}


@dataclass(frozen=True, slots=True)
class Bundle:
    """A verified bundle directory."""

    path: Path
    manifest: Manifest
    specs: dict[str, GraphSpec]
    _weights: dict[str, SafetensorsFile] = field(default_factory=dict)

    def file(self, relative: str) -> Path:
        """The path of a file that the manifest lists."""
        if not any(record.path == relative for record in self.manifest.files):
            raise IntegrityError(f"{MANIFEST} refers to '{relative}' but does not list it; export again")
        return self.path / relative

    def graph_bytes(self, graph: str, *, contrib: bool = False) -> bytes:
        """The ONNX bytes of a graph with weights as inputs; `contrib` takes ONNX Runtime's own form where there is one."""
        record = self.manifest.graphs[graph]
        return self._read_graph(graph, (record.contrib_file if contrib else None) or record.file, 0)

    def constant_graph_bytes(self, graph: str) -> bytes:
        """The ONNX bytes of a graph with weights as initialisers, whose data the caller must give."""
        file = self.manifest.graphs[graph].constant_file
        if file is None:
            raise IntegrityError(f"graph '{graph}' has no weights, so no constant form")
        return self._read_graph(graph, file, len(self.specs[graph].weights))

    def _read_graph(self, graph: str, file: str, references: int) -> bytes:
        """Bytes of a graph with exactly this many references to data outside it."""
        data = self.file(file).read_bytes()
        if not data.count(b"location") == data.count(REFERENCE) == references:
            raise IntegrityError(f"{file}: the graph refers to data that graph '{graph}' does not have; export again")
        return data

    @property
    def weight_bytes(self) -> int:
        """Bytes of all stored weights."""
        files = {
            record.file
            for records in (*self.manifest.layer_bindings, self.manifest.model_bindings)
            for record in records.values()
        }
        return sum(record.size for record in self.manifest.files if record.path in files)

    def stored(self, record: WeightRecord) -> StoredTensor:
        """Type, shape and place of a stored weight."""
        if record.file not in self._weights:
            self._weights[record.file] = SafetensorsFile(self.file(record.file))
        tensors = self._weights[record.file].tensors
        if record.tensor not in tensors:
            raise IntegrityError(f"{record.file} has no tensor '{record.tensor}'; export again")
        return tensors[record.tensor]

    def weight(self, record: WeightRecord) -> NDArray[Any]:
        """A stored weight, mapped and not copied."""
        self.stored(record)
        return self._weights[record.file].view(record.tensor)

    def graph_weights(self, graph: str, layer: int | None) -> dict[str, NDArray[Any]]:
        """The weights of a graph by input name; `layer` for the layer graphs."""
        bindings = self.manifest.model_bindings if layer is None else self.manifest.layer_bindings[layer]
        return {spec.name: self.weight(bindings[spec.name]) for spec in self.specs[graph].weights}


def open_bundle(path: str | os.PathLike[str]) -> Bundle:
    """A verified bundle, or IntegrityError (damaged), IncompatibleError (format) or UsageError (no bundle there)."""
    root = Path(path)
    manifest = read_manifest(root)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        list(pool.map(partial(verify_file, root, manifest), manifest.files))
    bundle = Bundle(root, manifest, dict(graph_specs(manifest.shape)))
    check_graphs(bundle)
    check_bindings(bundle)
    check_engines(bundle)
    return bundle


def read_manifest(root: Path) -> Manifest:
    """The manifest of a bundle directory, checked against its own digest; no other file is looked at."""
    path = root / MANIFEST
    if path.is_symlink():
        raise IntegrityError(f"{MANIFEST} is a symbolic link; a bundle holds plain files only")
    if not path.is_file():
        reason = f"it has no {MANIFEST}" if root.is_dir() else "it is a file" if root.exists() else "it does not exist"
        remedy = "make one with 'dllm-export export MODEL -o BUNDLE'"
        raise UsageError(f"{root} is not a bundle: {reason}; {remedy}")
    return decode_manifest(path.read_bytes())


def check_graphs(bundle: Bundle) -> None:
    """Every graph that this version runs is there, with the signature that it runs."""
    specs = with_stages(bundle.specs)
    for name in specs.keys() | bundle.manifest.graphs.keys():
        spec, record = specs.get(name), bundle.manifest.graphs.get(name)
        if record is None:
            raise IntegrityError(f"graph '{name}' is missing from {MANIFEST}; export again")
        signature = (record.inputs, record.weights, record.outputs)
        if spec is None or signature != tuple(map(tensor_records, (spec.inputs, spec.weights, spec.outputs))):
            raise IntegrityError(f"graph '{name}' does not have the signature this version runs; export again")
        for file in filter(None, (record.file, record.constant_file, record.contrib_file)):
            bundle.file(file)


def check_bindings(bundle: Bundle) -> None:
    """Every weight of every layer is bound to a stored tensor of its shape and type."""
    manifest = bundle.manifest
    if len(manifest.layer_bindings) != manifest.shape.layers:
        raise IntegrityError(
            f"{MANIFEST} binds {len(manifest.layer_bindings)} layers of {manifest.shape.layers}; export again"
        )
    for name, spec in bundle.specs.items():
        layers = graph_layers(manifest.shape, name)
        bindings = (
            (manifest.model_bindings,) if layers is None else [manifest.layer_bindings[layer] for layer in layers]
        )
        for records in bindings:
            for weight in spec.weights:
                kind = STORED_TYPES["float32" if weight.type == "float32" else manifest.dtype]
                if weight.name not in records:
                    raise IntegrityError(
                        f"{MANIFEST} binds no tensor to weight '{weight.name}' of '{name}'; export again"
                    )
                stored = bundle.stored(records[weight.name])
                if stored.shape != weight.dims or stored.dtype != kind:
                    raise IntegrityError(
                        f"{records[weight.name].file}: '{records[weight.name].tensor}' is {stored.dtype} {stored.shape}, "
                        f"expected {kind} {weight.dims}; export again"
                    )


def check_engines(bundle: Bundle) -> None:
    """Every engine is a listed plan of a graph, with size ranges of that graph's dims."""
    for record in bundle.manifest.engines:
        problem = find_misstatement(bundle.manifest, record, bundle.specs)
        if problem:
            remedy = find_rebuild(bundle.path, record)
            raise IntegrityError(f"{MANIFEST}: the engine of graph '{record.graph}' {problem}; {remedy}")


def find_misstatement(manifest: Manifest, record: EngineRecord, specs: Mapping[str, GraphSpec]) -> str | None:
    """What an engine's record says that cannot be so, as words after "the engine"; None if there is nothing."""
    known = with_stages(specs)
    if record.graph not in known:
        return "belongs to no graph that this version runs"
    if not record.file.startswith(ENGINES) or not any(file.path == record.file for file in manifest.files):
        return f"is in '{record.file}', which {MANIFEST} does not list under {ENGINES}"
    if not record.targets or not re.fullmatch(r"(\d+\.\d+)?", record.cuda):
        return "does not say for which GPUs and driver it is"
    if record.flavour == "tensorrt-rtx" and record.compatible != "none":
        return f"is of tensorrt-rtx and says to be compatible with {record.compatible}, which only tensorrt builds"
    if not record.profiles:
        return "has no size ranges"
    inputs = known[record.graph].inputs
    dims = {dim for tensor in inputs for dim in tensor.dims if isinstance(dim, str)}
    dims |= {"Q"} if any(tensor.name == "budget" for tensor in inputs) else set()
    for profile in record.profiles:
        if profile.keys() != dims:
            return f"has size ranges of {', '.join(sorted(profile)) or 'nothing'}, expected {', '.join(sorted(dims))}"
        for dim, (least, usual, most) in profile.items():
            if not 1 <= least <= usual <= most:
                return f"takes {dim} from {least} to {most}, usually {usual}, which is no range"
    return None


def find_remedy(root: Path, manifest: Manifest, file: str) -> str:
    """What replaces a file: a plan is built again, everything else comes from an export."""
    if not file.startswith(ENGINES):
        return EXPORT_AGAIN
    return find_rebuild(root, next((engine for engine in manifest.engines if engine.file == file), None))


def find_rebuild(root: Path, engine: EngineRecord | None) -> str:
    """The command that builds an engine again, or all of them."""
    line = f"dllm-export build {shlex.quote(str(root))}"
    if engine is not None and engine.targets:
        line = build_command(str(root), engine.flavour, engine.targets)
    return f"build again with '{line}'"


def verify_file(root: Path, manifest: Manifest, record: FileRecord) -> None:
    """Refuse a file that is missing, a link, or not the bytes that the manifest states."""
    path, remedy = root, find_remedy(root, manifest, record.path)
    try:
        for part in record.path.split("/"):
            path = path / part
            if path.is_symlink():
                raise IntegrityError(f"{record.path} goes through a symbolic link; a bundle holds plain files only")
        found = path.is_file()
    except OSError as error:
        raise IntegrityError(f"{record.path[:80]} cannot be a file here ({error.strerror}); {remedy}") from None
    if not found:
        raise IntegrityError(f"{record.path} is missing from the bundle; {remedy}")
    if path.stat().st_size != record.size:
        raise IntegrityError(f"{record.path} has {path.stat().st_size} bytes, expected {record.size}; {remedy}")
    if file_digest(path) != record.sha256:
        raise IntegrityError(f"{record.path} was changed after it was written (its sha256 differs); {remedy}")


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(READ_SIZE):
            digest.update(chunk)
    return digest.hexdigest()

"""manifest.json: what a bundle holds, and the digests by which a reader trusts it. The spec is docs/bundle.md."""

from __future__ import annotations

import hashlib
from pathlib import PurePosixPath
from typing import Literal

import msgspec

from dllm_export.errors import IncompatibleError, IntegrityError
from dllm_export.graphs import DType, ModelShape, TensorSpec, TensorType
from dllm_export.graphs.families import SamplerDefaults, SpecialTokens

Compatible = Literal["none", "versions", "same-capability", "ampere-plus"]
"""What else than its own library and GPU an engine was built for."""

FORMAT = 8
MANIFEST = "manifest.json"
MANIFEST_LIMIT = 64 * 2**20


class FileRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A file of the bundle by its relative path."""

    path: str
    size: int
    sha256: str


class TensorRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An input, weight or output of a graph."""

    name: str
    type: TensorType
    dims: tuple[str | int, ...]


class GraphRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One ONNX graph."""

    file: str
    """Weights are inputs."""
    constant_file: str | None
    """The same graph with weights as initialisers without data, for providers that are faster on constants."""
    contrib_file: str | None = None
    """The same graph with an operator of ONNX Runtime's own for experts, whose kernel on the CPU is the fastest there; None
    where the graph has no experts. The constant form then has it too."""
    inputs: tuple[TensorRecord, ...]
    weights: tuple[TensorRecord, ...]
    outputs: tuple[TensorRecord, ...]


class WeightRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which stored tensor feeds a weight."""

    file: str
    tensor: str


class TokenizerRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Tokenizer files; absent values mean that the checkpoint had none."""

    file: str
    chat_template: str | None = None
    bos: str = ""
    """Text of the beginning-of-sequence token, for the chat template."""


class EngineRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One TensorRT plan and what it fits."""

    graph: str
    file: str
    flavour: Literal["tensorrt", "tensorrt-rtx"]
    version: str
    targets: tuple[str, ...]
    """Compute capabilities, such as 8.9."""
    platform: str
    """Operating system and processor of the build, such as linux-x86_64."""
    compatible: Compatible = "none"
    """What the library was asked to make it run on, too: newer versions, GPUs of the same compute capability, or of 8.0
    and newer. One for newer versions holds code of the library's own, which runs on the host."""
    cuda: str
    """CUDA version of the driver that it was built under, such as 12.8; empty where it was built without a GPU."""
    flags: tuple[str, ...]
    """Names of the builder flags that were set."""
    profiles: tuple[dict[str, tuple[int, int, int]], ...]
    """Size ranges that the plan was tuned for, the narrowest first: dim -> smallest, usual and largest size."""
    key: str
    """Digest of the graph, the library and the options: an engine with this key need not be built again."""
    seconds: float


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything a reader needs to know before it opens another file."""

    format: int
    digest: str
    """sha256 of this file's canonical encoding with an empty digest."""
    family: str
    architecture: str
    dtype: DType
    opset: int
    shape: ModelShape
    tokens: SpecialTokens
    sampler: SamplerDefaults
    topology: Literal["full"] = "full"
    weights: Literal["bound", "embedded"]
    graphs: dict[str, GraphRecord]
    embedded: dict[str, tuple[str, ...]]
    """Graph -> self-contained ONNX files, one per layer (one file for graphs outside the layers)."""
    layer_bindings: tuple[dict[str, WeightRecord], ...]
    model_bindings: dict[str, WeightRecord]
    tokenizer: TokenizerRecord | None
    probe: str
    """safetensors file with the checkpoint's own activations on a fixed input (docs/verification.md)."""
    schedule: str | None = None
    """safetensors file with the noise schedule of a continuous model."""
    assumed: tuple[str, ...]
    """Values that the checkpoint does not state, as sentences."""
    source: dict[str, str]
    """File name -> sha256 of the configuration files the bundle was made from."""
    tools: dict[str, str]
    files: tuple[FileRecord, ...]
    engines: tuple[EngineRecord, ...] = ()


def tensor_records(specs: tuple[TensorSpec, ...]) -> tuple[TensorRecord, ...]:
    """Signature of a graph as the manifest states it."""
    return tuple(TensorRecord(name=spec.name, type=spec.type, dims=spec.dims) for spec in specs)


def encode_manifest(manifest: Manifest) -> bytes:
    """Canonical bytes, with the digest filled in."""
    blank = msgspec.structs.replace(manifest, digest="")
    digest = hashlib.sha256(_encode(blank)).hexdigest()
    return _encode(msgspec.structs.replace(manifest, digest=digest))


def decode_manifest(data: bytes) -> Manifest:
    """The manifest, refused unless its format is known and its bytes are exactly the canonical encoding."""
    if len(data) > MANIFEST_LIMIT:
        raise IntegrityError(f"{MANIFEST} has {len(data)} bytes, more than any bundle needs; the file is damaged")
    try:
        version = msgspec.json.decode(data, type=dict[str, msgspec.Raw]).get("format")
        if version is not None and bytes(version) != str(FORMAT).encode():
            raise IncompatibleError(
                f"{MANIFEST} has format {bytes(version).decode()[:20]}, this version reads format {FORMAT}: "
                f"export again with this version of dllm-export"
            )
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise IntegrityError(f"{MANIFEST} is damaged ({error}); export again") from None
    if encode_manifest(manifest) != data:
        raise IntegrityError(f"{MANIFEST} does not match its own digest; it was changed after the export: export again")
    sizes = (
        getattr(manifest.shape, name) for name in ("layers", "hidden", "heads", "kv_heads", "head_dim", "mlp", "vocab")
    )
    if min(sizes) < 1:
        raise IntegrityError(f"{MANIFEST} states a model shape with a size below 1; export again")
    for path in (record.path for record in manifest.files):
        check_relative(path)
    return manifest


def check_relative(path: str) -> None:
    """Refuse a path that could leave the bundle."""
    parts = PurePosixPath(path).parts
    if not parts or path != "/".join(parts) or ".." in parts or path.startswith("/") or "\\" in path or "\0" in path:
        raise IntegrityError(f"{MANIFEST} names the file {path!r}, which is not a plain path inside the bundle")


def _encode(manifest: Manifest) -> bytes:
    return msgspec.json.format(msgspec.json.encode(manifest, order="deterministic"), indent=1) + b"\n"

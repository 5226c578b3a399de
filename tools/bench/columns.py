"""Which columns there are: how each runs the request, and what it takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from dllm_export.runtime.manifest import EngineRecord
from dllm_export.runtime.session import SessionOptions

Way = Literal["eager", "four-feature", "session"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnKind:
    """A way to run the request."""

    what: str
    way: Way = "session"
    provider: str = "torch"
    place: Literal["cpu", "cuda", "any"] = "any"
    """Where it runs: `any` goes where --device says."""
    captures: int = 0
    compile: bool = False
    flavour: Literal["tensorrt", "tensorrt-rtx"] | None = None

    def session(self, device: str, threads: int) -> SessionOptions:
        """The provider's options."""
        return SessionOptions(
            provider=self.provider,
            device=self.where(device),
            threads=threads,
            captures=self.captures,
            compile=self.compile,
        )

    def where(self, device: str) -> str:
        """cpu or cuda."""
        return device if self.place == "any" else self.place

    def memory(self, weights: int, buffers: int, logits: int, layer_graphs: int) -> int:
        """Bytes that it takes, roughly: weights as often as they are held, and what a step works on."""
        if self.way != "session":
            return weights + 2 * logits + buffers
        # On the CPU onnxruntime packs a copy for every layer graph, and holds an unpacked one beside the mapped file.
        copies = 1 + (1 + layer_graphs if self.provider == "onnxruntime" and self.place == "cpu" else 0)
        return copies * weights + buffers


CAPTURES = 32
COLUMNS: Mapping[str, ColumnKind] = {
    "eager": ColumnKind(what="PyTorch as published, nothing cached; head on all rows", way="eager"),
    "eager-compile": ColumnKind(what="the same through torch.compile as one function", way="eager", compile=True),
    "eager-compile-graph": ColumnKind(
        what="the same, compiled, as one CUDA graph", way="eager", place="cuda", captures=1, compile=True
    ),
    "four-feature": ColumnKind(
        what="PyTorch, dLLM-Cache as published with four features a layer; head on all rows", way="four-feature"
    ),
    "torch": ColumnKind(what="this runtime, graphs run eagerly by PyTorch"),
    "torch-compile": ColumnKind(what="this runtime, graphs through torch.compile", compile=True),
    "torch-graph": ColumnKind(
        what="this runtime, every step of PyTorch one CUDA graph", place="cuda", captures=CAPTURES
    ),
    "torch-compile-graph": ColumnKind(
        what="this runtime, compiled graphs, every step one CUDA graph", place="cuda", captures=CAPTURES, compile=True
    ),
    "onnxruntime": ColumnKind(what="this runtime on ONNX Runtime, CPU", provider="onnxruntime", place="cpu"),
    "onnxruntime-cuda": ColumnKind(
        what="this runtime on ONNX Runtime, CUDA", provider="onnxruntime", place="cuda", captures=CAPTURES
    ),
    "tensorrt": ColumnKind(
        what="this runtime on standard TensorRT",
        provider="tensorrt",
        place="cuda",
        captures=CAPTURES,
        flavour="tensorrt",
    ),
    "tensorrt-calls": ColumnKind(
        what="the same without CUDA graphs: every call is queued by itself",
        provider="tensorrt",
        place="cuda",
        flavour="tensorrt",
    ),
    "tensorrt-rtx": ColumnKind(
        what="this runtime on TensorRT for RTX",
        provider="tensorrt",
        place="cuda",
        captures=CAPTURES,
        flavour="tensorrt-rtx",
    ),
}
"""In the order in which they are measured; the first that ran is what the others are compared with."""


def find_obstacle(kind: ColumnKind, engines: tuple[EngineRecord, ...], dtype: str, *, gpu: bool) -> str:
    """Why a column cannot run here, in one line, as far as that is known without a process; else an empty text."""
    if kind.place == "cuda" and not gpu:
        return "needs an NVIDIA GPU, and nvidia-smi lists none"
    if kind.flavour and not any(engine.flavour == kind.flavour for engine in engines):
        return f"the bundle has no engines: dllm-export build BUNDLE --flavour {kind.flavour}"
    if kind.provider == "onnxruntime" and dtype == "bfloat16":
        return "onnxruntime takes no bfloat16 bundle: export with --dtype float16 or float32"
    return ""

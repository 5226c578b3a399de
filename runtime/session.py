"""The seam between the step loop and a provider: buffers, calls, and programs of calls."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Protocol, get_args

from numpy.typing import NDArray

from dllm_export.errors import IncompatibleError, UsageError
from dllm_export.graphs import TensorType
from dllm_export.runtime.bundle import Bundle
from dllm_export.runtime.options import flag, option

Prepack = Literal["auto", "on", "off"]

Program = Callable[[], None]
"""Runs a fixed sequence of graph calls; prepared once, run at every step with the same plan."""

Fetch = Callable[[], list[NDArray[Any]]]
"""Waits for copies of buffers and gives them; what was queued after them is not waited for."""


class Buffer(Protocol):
    """A tensor in the provider's memory, allocated once."""

    @property
    def dims(self) -> tuple[int, ...]:
        """Its shape."""
        ...

    def write(self, array: NDArray[Any]) -> None:
        """Copy a host array of the same shape in."""
        ...

    def read(self) -> NDArray[Any]:
        """A host copy; waits for the programs that write the buffer."""
        ...


class Mark(Protocol):
    """A point in the work of a provider."""

    def seconds_until(self, later: Any) -> float:
        """Time that the provider took from here to a later mark of the same session, which is waited for."""
        ...


@dataclass(frozen=True, slots=True)
class HostMark:
    """Now, on the host's clock: the mark of a provider whose programs run while they are called."""

    at: float = field(default_factory=time.perf_counter)

    def seconds_until(self, later: HostMark) -> float:
        """Time from this mark to a later one."""
        return later.at - self.at


@dataclass(frozen=True, slots=True)
class GraphCall:
    """One run of a graph with its inputs and outputs by name; weights come from the bundle by (graph, layer)."""

    graph: str
    layer: int | None
    tensors: Mapping[str, Buffer]


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureReport:
    """A captured step: its graph calls in words, and how often it was replayed."""

    calls: str
    replays: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionReport:
    """What a session holds. Sizes in bytes; providers that do not manage device memory themselves report none."""

    provider: str
    library: str
    engines: Mapping[str, str] = field(default_factory=dict)
    """Graph -> file of its engine."""
    contexts: int = 0
    captures: tuple[CaptureReport, ...] = ()
    capture_limit: int = 0
    evicted: int = 0
    memory: Mapping[str, int] = field(default_factory=dict)
    """Purpose (weights, workspace, buffers) -> bytes of device memory held."""
    peak_memory: int = 0
    allocations: int = 0
    """Device allocations since the session was opened."""


FEATURES = frozenset({"key", "value", "delta"})
"""Caches that every layer has."""


class Session(Protocol):
    """A provider with a bundle's graphs and weights open. A context manager; not safe for two threads at once."""

    provider: str
    in_place: frozenset[str]
    """Caches that a call may write while it reads them, so that they need no second copy."""
    few_sizes: bool
    """Whether a size that occurs for the first time costs more than rows that nobody asked for."""
    queues: bool
    """Whether a program returns before the device has run it, so that the next one can be queued behind it."""

    def allocate(self, dims: tuple[int, ...], type: TensorType) -> Buffer:
        """A zeroed buffer."""
        ...

    def prepare(self, calls: Sequence[GraphCall]) -> Program:
        """A program of these calls in this order."""
        ...

    def fetch(self, buffers: Sequence[Buffer]) -> Fetch:
        """Queue copies of several buffers to the host, as they are after the programs so far, and give what waits for them."""
        ...

    def mark(self) -> Mark:
        """The present end of what was given to the provider, on the device's clock where programs are queued."""
        ...

    def inspect(self) -> SessionReport:
        """What the session holds now."""
        ...

    def close(self) -> None:
        """Free graphs, weights and buffers."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionOptions:
    """Which provider runs the graphs, and on what."""

    provider: str = option("onnxruntime", "what runs the graphs", choices=("onnxruntime", "tensorrt", "torch"))
    device: str = option(
        "auto", "where it runs; auto takes cuda for tensorrt and cpu for the others", choices=("auto", "cpu", "cuda")
    )
    threads: int = option(0, "CPU threads; 0 takes all cores")
    prepack: Prepack = option(
        "auto",
        "onnxruntime on the CPU: hand weights over as constants, 10 to 16 % faster, one packed copy per graph "
        "kind; auto does it below 1 GB of weights",
        choices=get_args(Prepack),
    )
    captures: int = option(
        32,
        "CUDA graphs kept, one per kind of step; 0 queues every call by itself (tensorrt; onnxruntime and torch on cuda)",
    )
    allow_host_code: bool = option(
        False,
        "tensorrt: load engines that were built for newer versions, too; they hold code that runs on this machine's CPU, so "
        "only from builders that you trust",
    )
    compile: bool = option(
        False, "torch: run every graph through torch.compile, which takes a C++ compiler and minutes at the first steps"
    )

    def __post_init__(self) -> None:
        for declared in fields(self):
            known = declared.metadata.get("choices")
            if known and getattr(self, declared.name) not in known:
                named = (
                    f"{flag(declared.name)} is {getattr(self, declared.name)!r}, expected one of: {', '.join(known)}"
                )
                raise UsageError(named)
        if self.threads < 0:
            raise UsageError(f"--threads is {self.threads}, expected 0 (all cores) or more")
        if self.captures < 0:
            raise UsageError(f"--captures is {self.captures}, expected 0 (none) or more")
        if self.provider == "tensorrt" and self.device == "cpu":
            raise UsageError("--device cpu does not go with --provider tensorrt, which runs on GPUs: leave it out")
        if self.allow_host_code and self.provider != "tensorrt":
            raise UsageError(
                f"--allow-host-code does not go with --provider {self.provider}, it belongs to tensorrt: leave it out"
            )
        if self.compile and self.provider != "torch":
            raise UsageError(
                f"--compile does not go with --provider {self.provider}, it belongs to torch: leave it out"
            )

    @property
    def place(self) -> str:
        """cpu or cuda."""
        if self.device != "auto":
            return self.device
        return "cuda" if self.provider == "tensorrt" else "cpu"


def available_cores() -> int:
    """Cores that this process may run on, which in a container are fewer than the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def open_session(bundle: Bundle, options: SessionOptions) -> Session:
    """The provider's session, or IncompatibleError with the pip line that installs what is missing."""
    try:
        if options.provider == "onnxruntime":
            from dllm_export.runtime.sessions.onnxruntime import OnnxRuntimeSession

            return OnnxRuntimeSession(bundle, options)
        if options.provider == "tensorrt":
            from dllm_export.runtime.sessions.tensorrt import TensorRtSession

            return TensorRtSession(bundle, options)
        from dllm_export.runtime.sessions.torch import TorchSession

        return TorchSession(bundle, options)
    except ModuleNotFoundError as error:
        lines = {
            "onnxruntime": "pip install 'dllm-export[onnxruntime]'",
            "tensorrt": "pip install 'dllm-export[tensorrt]', or 'dllm-export[tensorrt-rtx]'",
            "torch": "pip install 'dllm-export[export]'",
        }
        package = str(error.name)
        if package.split(".")[0] == "cuda":  # it is called otherwise where it is installed from
            package, lines["onnxruntime"] = "cuda-bindings", "pip install 'dllm-export[onnxruntime-gpu]'"
        raise IncompatibleError(
            f"provider '{options.provider}' needs the package {package}: {lines[options.provider]}"
        ) from None

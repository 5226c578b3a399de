"""PyTorch from the bundle's weights: eager, the reference; compiled; and on CUDA with every step as one captured graph.

The only file here with torch.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from dllm_export.errors import IncompatibleError
from dllm_export.graphs import DType, ModelShape, TensorType
from dllm_export.graphs.torch_ops import CompiledTorchOps, TorchOps
from dllm_export.runtime.bundle import Bundle
from dllm_export.runtime.captures import CapturedProgram, Captures, NamedCapture, describe_calls, report_captures
from dllm_export.runtime.session import (
    FEATURES,
    Buffer,
    Fetch,
    GraphCall,
    HostMark,
    Mark,
    Program,
    SessionOptions,
    SessionReport,
)

TORCH_TYPES: Mapping[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int32": torch.int32,
    "int64": torch.int64,
    "bool": torch.bool,
}


class TorchBuffer:
    """A torch tensor as a Buffer. On a GPU it is written and read through pinned memory, so that writing waits for nothing."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.whole = False
        """Whether it was last written with true everywhere."""
        self._staging: torch.Tensor | None = None
        self._copied: torch.cuda.Event | None = None
        """The end of the last copy to or from the staging memory."""

    @property
    def dims(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def write(self, array: NDArray[Any]) -> None:
        if self.tensor.dtype == torch.bool:
            self.whole = bool(array.all())
        if not self.tensor.is_cuda:
            fill(self.tensor, array)
            return
        host, copied = self._pinned()
        copied.synchronize()  # the last upload may still read what this one overwrites, or an unawaited download write there
        fill(host, array)
        self.tensor.copy_(host, non_blocking=True)
        copied.record()

    def read(self) -> NDArray[Any]:
        return fetch_together([self])()[0]

    def download(self) -> torch.Tensor:
        """Where the values are on the host, once the device has done what it was told before."""
        if not self.tensor.is_cuda:
            return self.tensor.detach()
        host, copied = self._pinned()
        host.copy_(self.tensor, non_blocking=True)
        copied.record()
        return host

    def _pinned(self) -> tuple[torch.Tensor, torch.cuda.Event]:
        if self._staging is None or self._copied is None:
            self._staging = torch.empty_like(self.tensor, device="cpu", pin_memory=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        return self._staging, self._copied


def fill(host: torch.Tensor, array: NDArray[Any]) -> None:
    """Write a tensor on the host. By numpy where it knows the type: PyTorch wakes all its threads to convert a table."""
    if host.dtype == torch.bfloat16:
        host.copy_(torch.from_numpy(np.array(array)))
    else:
        host.numpy()[...] = array


def fetch_together(buffers: Sequence[TorchBuffer]) -> Fetch:
    """Copies of these buffers, queued now; the device is waited for once."""
    hosts = [buffer.download() for buffer in buffers]

    def copy() -> list[NDArray[Any]]:
        return [(host.float() if host.dtype == torch.bfloat16 else host).numpy().copy() for host in hosts]

    if not any(buffer.tensor.is_cuda for buffer in buffers):
        arrays = copy()
        return lambda: arrays
    done = torch.cuda.Event()  # type: ignore[no-untyped-call]
    done.record()

    def wait() -> list[NDArray[Any]]:
        done.synchronize()
        return copy()

    return wait


class TorchMark:
    """A point on the current stream."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._event.record()

    def seconds_until(self, later: TorchMark) -> float:
        """Time from this mark to a later one, which is waited for."""
        later._event.synchronize()
        return float(self._event.elapsed_time(later._event)) / 1e3


class TorchCapture:
    """A CUDA graph of PyTorch calls. `pool` is the memory that all captures of a session share: they run one at a time."""

    def __init__(self, queue: Program, pool: Any) -> None:
        self.replays = 0
        self._graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self._graph, pool=pool):
                queue()
        except RuntimeError as error:
            first = str(error).splitlines()[0]
            raise IncompatibleError(f"PyTorch cannot capture this step ({first}): use --captures 0") from None

    def replay(self) -> None:
        """Queue the whole sequence."""
        self._graph.replay()
        self.replays += 1

    def close(self) -> None:
        """Free the graph."""
        self._graph.reset()


GraphFunction = Callable[[Mapping[str, Any], Mapping[str, torch.Tensor]], None]
UNMASKED = frozenset({"layer_full", "layer_partial", "layer_adaptive", "layer_tracking", "layer_indicated"})
"""Graphs in which the mask goes to attention and nowhere else, unless the model attends by blocks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundCall:
    """A call with its tensors."""

    graph: str
    feeds: Mapping[str, torch.Tensor]
    targets: Mapping[str, torch.Tensor]
    sizes: tuple[str, ...]
    """Inputs that are handed over as numbers."""


def write_results(
    function: Callable[..., Mapping[str, torch.Tensor]],
    ops: TorchOps,
    shape: ModelShape,
    settings: Mapping[str, Any],
    feeds: Mapping[str, Any],
    targets: Mapping[str, torch.Tensor],
) -> None:
    """Run a graph's function and put its results where they belong, which may be where it read from."""
    results = function(ops, shape, feeds, **settings)
    for name, target in targets.items():
        target.copy_(results[name])


def rename(function: FunctionType, name: str) -> FunctionType:
    """A copy with code of its own, to compile for one graph and its sizes.

    PyTorch keeps what it compiled by the code object, and gives up, or compiles for any size, where one has many.
    """
    return FunctionType(function.__code__.replace(co_name=name), function.__globals__, name, function.__defaults__)


class TorchSession:
    """Eager PyTorch unless told otherwise; `dtype` overrides the bundle's compute type (float64 for the oracles)."""

    provider = "torch"
    in_place = FEATURES | {"indicator"}

    def __init__(self, bundle: Bundle, options: SessionOptions, *, dtype: DType | None = None) -> None:
        if options.place == "cuda" and not torch.cuda.is_available():
            raise IncompatibleError("--device cuda: this PyTorch sees no CUDA device; use --device cpu")
        self._bundle, self._device = bundle, torch.device(options.place)
        self._dtype: DType = dtype or bundle.manifest.dtype
        self._weights: dict[tuple[str, int | None], dict[str, torch.Tensor]] = {}
        self._shared: dict[int, torch.Tensor] = {}
        self._compile = options.compile
        self.few_sizes = options.compile or options.place == "cuda"
        self._unmasks = options.compile or options.place == "cuda"  # elsewhere it stays the reference that it is
        self._functions: dict[Hashable, GraphFunction] = {}
        self._captures: Captures[NamedCapture] = Captures(options.captures if options.place == "cuda" else 0)
        self.queues = self._captures.limit > 0
        # The pool itself and not a handle of it: it must outlive the last capture, for there may be another.
        self._pool = torch.cuda.MemPool() if self._captures.limit else None
        if options.threads:  # a setting of the whole process, so it is left alone unless asked for
            torch.set_num_threads(options.threads)

    def __enter__(self) -> TorchSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._captures.clear()
        self._functions.clear()
        self._weights.clear()
        self._shared.clear()

    def allocate(self, dims: tuple[int, ...], type: TensorType) -> TorchBuffer:
        dtype = TORCH_TYPES[self._resolve(type)]
        # int64 tensors hold sizes (`budget`), which the host reads; reading one from the device cannot be captured.
        device = torch.device("cpu") if type == "int64" else self._device
        return TorchBuffer(torch.zeros(dims, dtype=dtype, device=device))

    def prepare(self, calls: Sequence[GraphCall]) -> Program:
        prepared = [self._bind(call) for call in calls]
        masks = {call.tensors["mask"] for call in calls if "mask" in call.tensors}  # mostly one for all layers
        capture = partial(self._capture, pool=self._pool.id if self._pool else None)
        programs: dict[bool, Program] = {}

        def run() -> None:
            whole = self._unmasks and all(isinstance(mask, TorchBuffer) and mask.whole for mask in masks)
            if whole not in programs:
                queue = partial(self._run, prepared, whole=whole)
                programs[whole] = CapturedProgram(self._captures, queue, capture, describe_calls(calls))
            programs[whole]()

        return run

    def fetch(self, buffers: Sequence[Buffer]) -> Fetch:
        return fetch_together([buffer for buffer in buffers if isinstance(buffer, TorchBuffer)])

    def mark(self) -> Mark:
        return TorchMark() if self._device.type == "cuda" else HostMark()

    def inspect(self) -> SessionReport:
        return SessionReport(
            provider=self.provider,
            library=f"torch {torch.__version__}",
            captures=report_captures(self._captures),
            capture_limit=self._captures.limit,
            evicted=self._captures.evicted,
        )

    _capture = staticmethod(TorchCapture)

    def _bind(self, call: GraphCall) -> BoundCall:
        spec, weights = self._bundle.specs[call.graph], self._graph_weights(call.graph, call.layer)
        tensors = {name: buffer.tensor for name, buffer in call.tensors.items() if isinstance(buffer, TorchBuffer)}
        return BoundCall(
            graph=call.graph,
            feeds={**{tensor.name: tensors[tensor.name] for tensor in spec.inputs}, **weights},
            targets={tensor.name: tensors[tensor.name] for tensor in spec.outputs if tensor.name in tensors},
            # A size that is a number is compiled in; one inside a tensor would cut the graph in two.
            sizes=tuple(tensor.name for tensor in spec.inputs if tensor.type == "int64") if self._compile else (),
        )

    def _run(self, calls: Sequence[BoundCall], *, whole: bool) -> None:
        """Queue the calls; a mask that hides nothing is left out where `whole`, in graphs that only hand it to attention."""
        with torch.inference_mode():
            for call in calls:
                feeds: dict[str, Any] = {**call.feeds, **{name: int(call.feeds[name]) for name in call.sizes}}
                if whole and call.graph in UNMASKED and "block" not in feeds:
                    feeds["mask"] = None
                try:
                    self._function(call, feeds)(feeds, call.targets)
                except RuntimeError as error:
                    raise self._explain(call.graph, error) from error

    def _explain(self, graph: str, error: RuntimeError) -> Exception:
        """The error itself, unless it is the compiler's: then what to do about it."""
        if not self._compile or not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            return error
        reason = next((line.strip() for line in str(error).splitlines() if "Error" in line or "ompiler" in line), "")
        return IncompatibleError(
            f"PyTorch cannot compile graph '{graph}' here ({reason or type(error).__name__}): install a C++ compiler, on a "
            f"GPU Triton too, or leave out --compile"
        )

    def _function(self, call: BoundCall, feeds: Mapping[str, Any]) -> GraphFunction:
        """A graph's function of its tensors by name and of where its results go, compiled where asked for.

        On a GPU for these very sizes: seconds for faster kernels. On a CPU, where it takes longer, PyTorch decides.
        """
        sized = self._compile and self._device.type == "cuda"
        dims = tuple(value.shape if isinstance(value, torch.Tensor) else value for value in feeds.values())
        key = (call.graph, tuple(call.targets), dims if sized else feeds.get("mask") is None)
        if key not in self._functions:
            function: Any = self._bundle.specs[call.graph].function
            settings: Mapping[str, Any] = {}
            if isinstance(function, partial):
                function, settings = function.func, function.keywords
            shape = self._bundle.manifest.shape
            # Where rows are only moved there is nothing to fuse, and compiling takes seconds for every size all the same.
            if self._compile and self._bundle.specs[call.graph].weights and call.graph != "embed":
                own = rename(cast("FunctionType", write_results), call.graph)
                write = torch.compile(own, fullgraph=True, dynamic=False if sized else None)
                self._functions[key] = partial(write, function, CompiledTorchOps(), shape, settings)
            else:
                self._functions[key] = partial(write_results, function, TorchOps(), shape, settings)
        return self._functions[key]

    def _resolve(self, type: TensorType) -> str:
        if type == "compute":
            return self._dtype
        return "float64" if type == "float32" and self._dtype == "float64" else type

    def _graph_weights(self, graph: str, layer: int | None) -> dict[str, torch.Tensor]:
        """Weights on the device, one copy for all graphs that share them."""
        scope = layer if graph.startswith("layer_") else None
        key = (graph, scope)
        if key not in self._weights:
            arrays = self._bundle.graph_weights(graph, scope)
            types = {weight.name: weight.type for weight in self._bundle.specs[graph].weights}
            self._weights[key] = {name: self._share(array, types[name]) for name, array in arrays.items()}
        return self._weights[key]

    def _share(self, array: NDArray[Any], type: TensorType) -> torch.Tensor:
        address = array.__array_interface__["data"][0]
        if address not in self._shared:
            host = array.view(np.uint16) if array.dtype.itemsize == 2 else array
            tensor = torch.from_numpy(host)  # over the mapped file: no copy unless device or type differ
            if array.dtype.itemsize == 2:
                tensor = tensor.view(TORCH_TYPES[str(array.dtype)])
            self._shared[address] = tensor.to(self._device, TORCH_TYPES[self._resolve(type)])
        return self._shared[address]

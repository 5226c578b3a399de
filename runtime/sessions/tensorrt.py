"""TensorRT: bound weights and cached features stay in device memory; a step that comes again is one captured graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakSet, WeakValueDictionary

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from dllm_export.errors import DllmExportError, IncompatibleError, ResourceError
from dllm_export.graphs import TensorSpec, TensorType, engine_specs, graph_layers
from dllm_export.runtime.bundle import Bundle
from dllm_export.runtime.captures import CapturedProgram, Captures, NamedCapture, describe_calls, report_captures
from dllm_export.runtime.cuda import (
    REMEDIES,
    DeviceMemory,
    Event,
    PinnedMemory,
    Stream,
    Uploader,
    Usage,
    driver_cuda,
    free_memory,
    gpu_capability,
    gpu_name,
)
from dllm_export.runtime.manifest import EngineRecord
from dllm_export.runtime.session import Buffer, Fetch, GraphCall, SessionOptions, SessionReport
from dllm_export.runtime.tensorrt.compatibility import Host, choose_engines, missing_engine
from dllm_export.runtime.tensorrt.engine import ALIGNMENT, Context, Engine, to_engine_type
from dllm_export.runtime.tensorrt.kernels import KernelCache
from dllm_export.runtime.tensorrt.library import Flavour, TensorRt, current_platform, find_library
from dllm_export.runtime.tensorrt.profiles import choose_profile, measure_sizes
from dllm_export.runtime.tensorrt.stages import split_call, whole_graph

if TYPE_CHECKING:
    import tensorrt as trt

NUMPY_TYPES: Mapping[str, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "int32": np.int32,
    "int64": np.int64,
    "bool": np.bool_,
}


class CudaBuffer:
    """Device memory as a Buffer, with a pinned host mirror once it is written or read."""

    def __init__(self, memory: DeviceMemory, dims: tuple[int, ...], type: Any, stream: Stream) -> None:
        self.memory, self.dims, self._stream = memory, dims, stream
        self._type = np.dtype(type)
        self._size = int(np.prod(dims)) * self._type.itemsize
        self._mirror: tuple[PinnedMemory, Event] | None = None  # with the end of the last copy to or from it

    @property
    def host(self) -> NDArray[Any]:
        """What was written last."""
        pinned, _ = self._mirrored()
        array: NDArray[Any] = pinned.bytes[: self._size].view(self._type)
        return array.reshape(self.dims)

    def _mirrored(self) -> tuple[PinnedMemory, Event]:
        if self._mirror is None:
            self._mirror = PinnedMemory(self._size), Event()
        return self._mirror

    def write(self, array: NDArray[Any]) -> None:
        pinned, copied = self._mirrored()
        copied.wait()  # the last upload may still read the mirror, or a download that nobody waited for write it
        self.host[...] = array
        self._stream.upload(self.memory.address, pinned.address, self._size)
        copied.record(self._stream)

    def read(self) -> NDArray[Any]:
        self.download()
        self._stream.wait()
        copied: NDArray[Any] = self.host.copy()
        return copied

    def download(self) -> None:
        """Queue the copy to `host`."""
        pinned, copied = self._mirrored()
        self._stream.download(pinned.address, self.memory.address, self._size)
        copied.record(self._stream)


@dataclass(frozen=True, slots=True)
class EngineRun:
    """One engine call with everything that it binds; `keep` lives as long as a capture may replay it."""

    context: Context
    addresses: Mapping[str, int]
    keep: tuple[object, ...]


class TensorRtSession:
    """One engine per graph kind serves all layers; contexts and captures are made per shape, at first use."""

    provider = "tensorrt"
    in_place: frozenset[str] = frozenset()
    few_sizes = True

    def __init__(
        self, bundle: Bundle, options: SessionOptions, *, flavours: Sequence[Flavour] = ("tensorrt", "tensorrt-rtx")
    ) -> None:
        self._bundle = bundle
        self.usage = Usage()
        self.stream = Stream()
        self.captures: Captures[NamedCapture] = Captures(options.captures)
        self._weights: dict[int, DeviceMemory] = {}
        self._contexts: WeakValueDictionary[object, Context] = WeakValueDictionary()
        self._buffers: WeakSet[DeviceMemory] = WeakSet()
        self._handed: dict[object, CudaBuffer] = {}
        self._engines: dict[str, Engine] = {}
        self._kernels: KernelCache | None = None
        try:
            self._library, self._host, records = find_engines(bundle, flavours, options)
            self._require_memory(bundle.weight_bytes, 0)  # before the library, which says little when memory is short
            self._engines = self._load_engines(records)
            self.queues = options.captures > 0 and "commit" in self._engines
            scratch = max(engine.scratch_bytes for engine in self._engines.values())
            self._require_memory(bundle.weight_bytes, scratch)
            self._scratch = DeviceMemory(self.usage, "workspace", scratch)
            self._load_weights()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> TensorRtSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- opening
    def _load_engines(self, records: Mapping[str, EngineRecord]) -> dict[str, Engine]:
        library = self._library
        if library.flavour == "tensorrt-rtx":
            self._kernels = KernelCache(self._bundle.path, library.version, gpu_name(), driver_cuda())
        self._runtime: trt.Runtime = library.create(library.module.Runtime)
        if any(record.compatible == "versions" for record in records.values()):
            self._runtime.engine_host_code_allowed = True  # none is chosen unless the user has said so
        specs = engine_specs(self._bundle.specs, staged=library.staged)
        dtype, engines = self._bundle.manifest.dtype, {}
        for graph, record in records.items():
            plan = self._bundle.file(record.file).read_bytes()
            engines[graph] = Engine(library, self._runtime, record, plan, specs[graph], dtype, self._kernels)
        return engines

    def _require_memory(self, weights: int, scratch: int) -> None:
        free, total = free_memory()
        if weights + scratch > free:
            workspace = f" and {scratch / 1e9:.2f} GB for workspace" if scratch else ""
            raise ResourceError(
                f"this bundle needs {weights / 1e9:.2f} GB of device memory for weights{workspace}, {free / 1e9:.2f} GB of "
                f"{total / 1e9:.2f} GB are free: {REMEDIES['workspace']}, or {REMEDIES['weights']}"
            )

    def _load_weights(self) -> None:
        """Every stored tensor once, whichever graphs share it."""
        uploader = Uploader(self.stream)
        try:
            for graph, spec in self._bundle.specs.items():
                layers = graph_layers(self._bundle.manifest.shape, graph)
                for layer in ((None,) if layers is None else layers) if spec.weights else ():
                    for array in self._bundle.graph_weights(graph, layer).values():
                        address = array.__array_interface__["data"][0]
                        if address not in self._weights:
                            self._weights[address] = DeviceMemory(self.usage, "weights", array.nbytes)
                            uploader.send(array, self._weights[address].address)
        finally:
            uploader.close()

    # -- Session
    def allocate(self, dims: tuple[int, ...], type: TensorType) -> CudaBuffer:
        kind = NUMPY_TYPES[self._bundle.manifest.dtype if type == "compute" else type]
        memory = DeviceMemory(self.usage, "buffers", int(np.prod(dims)) * np.dtype(kind).itemsize)
        self._buffers.add(memory)
        self.stream.clear(memory.address, memory.size)
        return CudaBuffer(memory, dims, kind, self.stream)

    def prepare(self, calls: Sequence[GraphCall]) -> CapturedProgram:
        runs = tuple(self._bind(stage) for call in calls for stage in self._stage_calls(call))

        def queue() -> None:
            for run in runs:
                run.context.queue(run.addresses, self.stream)

        return CapturedProgram(self.captures, queue, self.stream.capture, describe_calls(calls))

    def fetch(self, buffers: Sequence[Buffer]) -> Fetch:
        wanted = [buffer for buffer in buffers if isinstance(buffer, CudaBuffer)]
        for buffer in wanted:
            buffer.download()
        done = Event()
        done.record(self.stream)

        def wait() -> list[NDArray[Any]]:
            done.wait()
            return [buffer.host.copy() for buffer in wanted]

        return wait

    def mark(self) -> Event:
        mark = Event(timed=True)
        mark.record(self.stream)
        return mark

    def inspect(self) -> SessionReport:
        """Engines, captures and memory as they are now."""
        return SessionReport(
            provider=self.provider,
            library=f"{self._library.flavour} {self._library.version}",
            engines={graph: engine.record.file for graph, engine in self._engines.items()},
            contexts=len(self._contexts),
            captures=report_captures(self.captures),
            capture_limit=self.captures.limit,
            evicted=self.captures.evicted,
            memory={purpose: size for purpose, size in self.usage.held.items() if size},
            peak_memory=self.usage.peak,
            allocations=self.usage.allocations,
        )

    def close(self) -> None:
        self.captures.clear()
        for memory in (
            *self._weights.values(),
            *self._buffers,
            *([self._scratch] if hasattr(self, "_scratch") else []),
        ):
            memory.free()
        self._weights.clear()
        self._handed.clear()
        if self._kernels is not None:
            self._kernels.close()
        self._engines = {}
        self.stream.close()

    # -- a call as addresses
    def _stage_calls(self, call: GraphCall) -> Iterator[GraphCall]:
        """The call itself, or one for each stage of a graph that this library runs in stages."""
        stages = () if call.graph in self._engines else self._bundle.specs[call.graph].stages
        return split_call(call, self._bundle.specs[call.graph], self._hand_over) if stages else iter((call,))

    def _hand_over(self, graph: str, tensor: TensorSpec, dims: tuple[int, ...]) -> CudaBuffer:
        """What one stage leaves for the next; calls run one after the other, so that all layers share it."""
        key = (graph, tensor.name, dims)
        if key not in self._handed:
            self._handed[key] = self.allocate(dims, tensor.type)
        return self._handed[key]

    def _bind(self, call: GraphCall) -> EngineRun:
        engine = self._engines.get(call.graph)
        if engine is None:
            raise missing_engine(call.graph, self._host, str(self._bundle.path))
        buffers: dict[str, CudaBuffer] = {}
        for name, buffer in call.tensors.items():
            assert isinstance(buffer, CudaBuffer)
            buffers[name] = buffer
        context = self._context(engine, buffers)
        addresses = {
            name: buffer.memory.address for name, buffer in buffers.items() if not engine.is_host(name)
        } | self._weight_addresses(call)
        unused = [self._discarded(context, tensor.name) for tensor in engine.spec.outputs if tensor.name not in buffers]
        addresses |= {name: memory.address for name, memory in unused}
        assert not any(address % ALIGNMENT for address in addresses.values())
        return EngineRun(context, addresses, (*buffers.values(), *(memory for _, memory in unused)))

    def _context(self, engine: Engine, buffers: Mapping[str, CudaBuffer]) -> Context:
        """The context for these sizes: one per engine, shapes and host values, shared by all layers."""
        spec = engine.spec
        host = {
            tensor.name: to_engine_type(buffers[tensor.name].host, engine.type_of(tensor.name))
            for tensor in spec.inputs
            if engine.is_host(tensor.name)
        }
        shapes = {tensor.name: buffers[tensor.name].dims for tensor in spec.inputs if tensor.name not in host}
        key = (spec.name, tuple(shapes.items()), tuple((name, value.tobytes()) for name, value in host.items()))
        context = self._contexts.get(key)
        if context is None:
            sizes = measure_sizes(spec, {name: buffer.dims for name, buffer in buffers.items()})
            profile = choose_profile(spec.name, engine.record.profiles, sizes)
            context = engine.create_context(profile, shapes, host, self._scratch, self.stream)
            self._contexts[key] = context
        return context

    def _weight_addresses(self, call: GraphCall) -> dict[str, int]:
        graph = whole_graph(call.graph)
        arrays = self._bundle.graph_weights(graph, call.layer if graph.startswith("layer_") else None)
        return {
            weight.name: self._weights[arrays[weight.name].__array_interface__["data"][0]].address
            for weight in self._engines[call.graph].spec.weights
        }

    def _discarded(self, context: Context, name: str) -> tuple[str, DeviceMemory]:
        """Memory for an output that nobody reads: engines write all of theirs."""
        kind = NUMPY_TYPES[context.engine.type_of(name)]
        memory = DeviceMemory(self.usage, "buffers", int(np.prod(context.shape_of(name))) * np.dtype(kind).itemsize)
        self._buffers.add(memory)
        return name, memory


def find_engines(
    bundle: Bundle, flavours: Sequence[Flavour], options: SessionOptions
) -> tuple[TensorRt, Host, dict[str, EngineRecord]]:
    """The first installed library that has engines, all of which fit, and those engines; the first reason if none."""
    reasons: list[DllmExportError] = []
    for flavour in flavours:
        library = find_library(flavour)
        if library is None:
            continue
        host = Host(
            flavour=flavour,
            version=library.version,
            capability=gpu_capability(),
            platform=current_platform(),
            cuda=driver_cuda(),
            host_code=options.allow_host_code,
        )
        try:
            specs = engine_specs(bundle.specs, staged=library.staged)
            return library, host, choose_engines(bundle.manifest.engines, specs, host, str(bundle.path))
        except IncompatibleError as error:
            reasons.append(error)
    if not reasons:
        lines = ", or ".join(f"'dllm-export[{flavour}]'" for flavour in flavours)
        raise IncompatibleError(f"provider 'tensorrt' needs TensorRT: pip install {lines}")
    raise reasons[0]

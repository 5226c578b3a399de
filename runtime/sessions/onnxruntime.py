"""ONNX Runtime, CPU and CUDA through one path: every input, output and weight is bound to memory that we own.

On CUDA all sessions share one stream, so that calls of a program follow each other without waiting for the host; each
session is opened for fixed sizes, so that its shape arithmetic is folded away; and each call is captured as a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, InvalidGraph, InvalidProtobuf

from dllm_export.errors import IncompatibleError, IntegrityError
from dllm_export.graphs import GraphSpec, TensorType
from dllm_export.runtime.bundle import Bundle
from dllm_export.runtime.session import (
    FEATURES,
    Buffer,
    Fetch,
    GraphCall,
    HostMark,
    Program,
    SessionOptions,
    SessionReport,
    available_cores,
)
from dllm_export.runtime.tensorrt.profiles import measure_sizes

if TYPE_CHECKING:
    from dllm_export.runtime.cuda import Stream

NUMPY_TYPES: Mapping[str, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "int32": np.int32,
    "int64": np.int64,
    "bool": np.bool_,
}

PREPACK_LIMIT = 10**9
"""Bytes of weights up to which `auto` prepacks."""


class OrtBuffer:
    """An OrtValue as a Buffer; on the CPU it is a view of a numpy array."""

    def __init__(self, host: NDArray[Any], device: str) -> None:
        self._host, self._device = host, device
        self.value = ort.OrtValue.ortvalue_from_numpy(host, device)

    @property
    def dims(self) -> tuple[int, ...]:
        return self._host.shape

    def write(self, array: NDArray[Any]) -> None:
        np.copyto(self._host, array)
        if self._device != "cpu":
            self.value.update_inplace(self._host)

    def read(self) -> NDArray[Any]:
        host: NDArray[Any] = self.value.numpy() if self._device != "cpu" else self._host.copy()
        return host


@dataclass(frozen=True)
class BoundRun:
    """One run of an inference session with everything bound. `options` say whether it waits and what it captures."""

    call: GraphCall
    session: ort.InferenceSession
    binding: ort.IOBinding
    options: ort.RunOptions

    def __call__(self) -> None:
        self.session.run_with_iobinding(self.binding, self.options)


class OnnxRuntimeSession:
    """Bound weights: one inference session per graph kind serves all layers. Prepacked: one per graph and layer."""

    provider = "onnxruntime"
    queues = False  # the last call of a program waits: onnxruntime offers no other way to be told of its end

    def __init__(self, bundle: Bundle, options: SessionOptions) -> None:
        wanted = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[options.place]
        if wanted not in ort.get_available_providers():
            raise IncompatibleError(
                "--device cuda: this onnxruntime has no CUDA provider: pip install 'dllm-export[onnxruntime-gpu]'"
            )
        if bundle.manifest.dtype == "bfloat16":
            raise IncompatibleError(
                "onnxruntime has no bfloat16 kernels on the CPU, and its CUDA ones are not supported here: export with "
                "--dtype float32 (or float16 on a GPU), or use --provider torch"
            )
        self._bundle, self._device, self._provider = bundle, options.place, wanted
        self.few_sizes = options.place == "cuda"
        self._threads = options.threads or available_cores()
        small = bundle.weight_bytes <= PREPACK_LIMIT
        self._prepack = options.place == "cpu" and (options.prepack == "on" or (options.prepack == "auto" and small))
        # Graphs for constants scatter rows, which copies nothing where a cache is its own result; the others merge all rows.
        self.in_place: frozenset[str] = FEATURES if self._prepack else frozenset()
        self._sessions: dict[object, ort.InferenceSession] = {}
        self._weights: dict[int, ort.OrtValue] = {}
        # Programs that differ in a few calls share the others, while any of them lives. A run keeps its buffers alive, so
        # that their addresses name it.
        self._bound: WeakValueDictionary[Hashable, BoundRun] = WeakValueDictionary()
        self._capture_limit, self._captured = options.captures, 0
        self._stream: Stream | None = None
        if self._device == "cpu":
            share_arena()
        if self._device == "cuda":
            from dllm_export.runtime.cuda import Stream

            self._stream = Stream()

    def __enter__(self) -> OnnxRuntimeSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._sessions.clear()
        self._weights.clear()
        if self._stream is not None:
            self._stream.close()

    def allocate(self, dims: tuple[int, ...], type: TensorType) -> OrtBuffer:
        name = self._bundle.manifest.dtype if type == "compute" else type
        # int64 tensors hold sizes (`budget`), which kernels read on the host.
        return OrtBuffer(np.zeros(dims, NUMPY_TYPES[name]), "cpu" if type == "int64" else self._device)

    def prepare(self, calls: Sequence[GraphCall]) -> Program:
        runs = [self._find_bound(call, last=call is calls[-1]) for call in calls]

        def run() -> None:
            for bound in runs:
                bound()

        return run

    def fetch(self, buffers: Sequence[Buffer]) -> Fetch:
        arrays = [buffer.read() for buffer in buffers]
        return lambda: arrays

    def mark(self) -> HostMark:
        return HostMark()

    def inspect(self) -> SessionReport:
        return SessionReport(provider=self.provider, library=f"onnxruntime {ort.__version__}")

    def _find_bound(self, call: GraphCall, *, last: bool) -> BoundRun:
        key = (call.graph, call.layer, last, *((name, id(buffer)) for name, buffer in call.tensors.items()))
        run = self._bound.get(key)
        if run is None:
            self._bound[key] = run = self._bind(call, last=last)
        return run

    def _bind(self, call: GraphCall, *, last: bool) -> BoundRun:
        spec, weights = self._bundle.specs[call.graph], self._graph_weights(call)
        session = self._open_prepacked(call, weights) if self._prepack and weights else self._open_bound(call)
        binding = session.io_binding()
        for tensor in spec.inputs:
            binding.bind_ortvalue_input(tensor.name, self._value(call, tensor.name))
        for tensor in spec.outputs:
            if tensor.name in call.tensors:
                binding.bind_ortvalue_output(tensor.name, self._value(call, tensor.name))
        for name, value in {} if self._prepack else weights.items():
            binding.bind_ortvalue_input(name, value)
        return BoundRun(call, session, binding, self._run_options(capture=self._captures(spec), last=last))

    def _captures(self, spec: GraphSpec) -> bool:
        """Whether calls of a graph are captured. Sizes that arrive as values, such as `budget`, leave host work in it."""
        return self._capture_limit > 0 and not any(tensor.type == "int64" for tensor in spec.inputs)

    def _run_options(self, *, capture: bool, last: bool) -> ort.RunOptions:
        options = ort.RunOptions()
        if self._stream is None:
            # Said, though nothing is captured here: onnxruntime asks every run for it, and not to find it takes 50 us.
            options.add_run_config_entry("gpu_graph_id", "-1")
        else:
            if not last:  # the stream orders the calls; only the last of a program waits for it
                options.add_run_config_entry("disable_synchronize_execution_providers", "1")
            # Every bound call is a capture of its own: a capture holds its addresses.
            self._captured += 1
            options.add_run_config_entry("gpu_graph_id", str(self._captured if capture else -1))
        return options

    def _value(self, call: GraphCall, name: str) -> ort.OrtValue:
        buffer = call.tensors[name]
        assert isinstance(buffer, OrtBuffer)
        return buffer.value

    def _open_bound(self, call: GraphCall) -> ort.InferenceSession:
        sizes: dict[str, int] = {}
        if self._stream is not None:
            dims = {name: buffer.dims for name, buffer in call.tensors.items()}
            sizes = measure_sizes(self._bundle.specs[call.graph], dims)
        key = (call.graph, None, tuple(sorted(sizes.items())))
        if key not in self._sessions:
            self._sessions[key] = self._open(call.graph, self._graph_bytes(call.graph), {}, sizes)
        return self._sessions[key]

    def _graph_bytes(self, graph: str) -> bytes:
        # The own operator for experts is for the CPU: on CUDA the portable form can be captured, and has been built there.
        return self._bundle.graph_bytes(graph, contrib=self._device == "cpu")

    def _open_prepacked(self, call: GraphCall, weights: Mapping[str, ort.OrtValue]) -> ort.InferenceSession:
        key = (call.graph, call.layer)
        if key not in self._sessions:
            self._sessions[key] = self._open(call.graph, self._bundle.constant_graph_bytes(call.graph), weights, {})
        return self._sessions[key]

    def _open(
        self, graph: str, data: bytes, weights: Mapping[str, ort.OrtValue], sizes: Mapping[str, int]
    ) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Each session has its own thread pool; one that went on spinning would take the cores from the next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if self._device == "cpu":
            options.add_session_config_entry("session.use_env_allocators", "1")
            # Packed weights stay out of the arena, which would keep their memory when the session is gone.
            options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
        if weights:
            options.add_external_initializers(list(weights), list(weights.values()))
        for dim, size in sizes.items():
            options.add_free_dimension_override_by_name(dim, size)
        settings = {}
        if self._stream is not None:
            settings = {
                "user_compute_stream": str(self._stream.handle),
                "enable_cuda_graph": str(int(self._captures(self._bundle.specs[graph]))),
            }
        try:
            return ort.InferenceSession(data, options, providers=[(self._provider, settings)])
        except (InvalidProtobuf, InvalidGraph, InvalidArgument, Fail) as error:
            reason = str(error).splitlines()[0]
            raise IntegrityError(f"graph '{graph}' of the bundle does not load in onnxruntime: {reason}") from None

    def _graph_weights(self, call: GraphCall) -> dict[str, ort.OrtValue]:
        """One OrtValue per stored tensor, over the mapped file on the CPU."""
        layer = call.layer if call.graph.startswith("layer_") else None
        arrays = self._bundle.graph_weights(call.graph, layer)
        return {name: self._share(array) for name, array in arrays.items()}

    def _share(self, array: NDArray[Any]) -> ort.OrtValue:
        address = array.__array_interface__["data"][0]
        if address not in self._weights:
            self._weights[address] = OrtBuffer(array, self._device).value
        return self._weights[address]


def share_arena() -> None:
    """One arena for what all our sessions on the CPU work on: they run one after another, so that one's worth is enough.

    It belongs to the process and is made once; sessions that do not ask for it have their own.
    """
    info = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    # Made already, by a session before this one or by another user of onnxruntime here.
    with suppress(Fail, RuntimeError):
        ort.create_and_register_allocator(info, None)

"""A deserialised plan and its execution contexts. What differs between releases is asked for by name, in one place each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dllm_export.errors import IntegrityError
from dllm_export.graphs import DType, GraphSpec, TensorSpec
from dllm_export.runtime.cuda import DeviceMemory, Stream
from dllm_export.runtime.manifest import EngineRecord
from dllm_export.runtime.tensorrt.kernels import KernelCache
from dllm_export.runtime.tensorrt.library import TensorRt

if TYPE_CHECKING:
    import tensorrt as trt

TYPE_NAMES: Mapping[str, str] = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
}
"""TensorRT's names of the types that graphs use."""

ALIGNMENT = 256
"""Bytes that every bound address must be a multiple of."""


class Engine:
    """One plan, accepted only if its tensors are those of the graph that it was listed for."""

    def __init__(
        self,
        library: TensorRt,
        runtime: trt.Runtime,
        record: EngineRecord,
        plan: bytes,
        spec: GraphSpec,
        dtype: DType,
        kernels: KernelCache | None = None,
    ) -> None:
        self.record, self.spec, self._library, self._kernels = record, spec, library, kernels
        engine = library.require(runtime.deserialize_cuda_engine(plan), f"load the engine of graph '{spec.name}'")
        self._engine: trt.ICudaEngine = engine
        self._check_tensors(dtype)
        self._config: Any = None

    # -- what the plan says of itself
    def type_of(self, name: str) -> str:
        """A binding's type as the engine has it: TensorRT 8.6 turns int64 into int32."""
        return TYPE_NAMES.get(self._engine.get_tensor_dtype(name).name, "unknown")

    def is_host(self, name: str) -> bool:
        """Whether the binding's value is read from host memory (a shape, such as `budget`)."""
        return bool(self._engine.get_tensor_location(name) == self._library.module.TensorLocation.HOST)

    @property
    def scratch_bytes(self) -> int:
        """Device memory that a context needs while it runs, for the largest sizes of any profile."""
        for name in ("device_memory_size_v2", "device_memory_size"):
            if hasattr(self._engine, name):
                return int(getattr(self._engine, name))
        return 0

    def _check_tensors(self, dtype: DType) -> None:
        engine, mode = self._engine, self._library.module.TensorIOMode
        found = {engine.get_tensor_name(place) for place in range(engine.num_io_tensors)}
        expected = {tensor.name for tensor in (*self.spec.inputs, *self.spec.weights, *self.spec.outputs)}
        problem = f"tensors {', '.join(sorted(found ^ expected))}" if found != expected else None
        for tensor in () if problem else (*self.spec.inputs, *self.spec.weights, *self.spec.outputs):
            way = mode.OUTPUT if tensor in self.spec.outputs else mode.INPUT
            if engine.get_tensor_mode(tensor.name) != way or not self._matches(tensor, dtype):
                dims = tuple(engine.get_tensor_shape(tensor.name))
                problem = f"'{tensor.name}' is {self.type_of(tensor.name)} {dims}, expected {tensor.type} {tensor.dims}"
                break
        if problem:
            raise IntegrityError(
                f"{self.record.file} is not an engine of graph '{self.spec.name}' ({problem}); build again"
            )

    def _matches(self, tensor: TensorSpec, dtype: DType) -> bool:
        wanted = dtype if tensor.type == "compute" else tensor.type
        allowed = ("int64", "int32") if wanted == "int64" else (wanted,)
        dims = tuple(self._engine.get_tensor_shape(tensor.name))
        fits = len(dims) == len(tensor.dims) and all(
            isinstance(size, str) or size == found for size, found in zip(tensor.dims, dims, strict=True)
        )
        return fits and self.type_of(tensor.name) in allowed

    # -- contexts
    def create_context(
        self,
        profile: int,
        shapes: Mapping[str, tuple[int, ...]],
        host: Mapping[str, NDArray[Any]],
        scratch: DeviceMemory,
        stream: Stream,
    ) -> Context:
        """A context for calls of these input shapes and host values; all contexts of a session share its scratch."""
        context = self._library.require(self._create(), f"create a context of graph '{self.spec.name}'")
        self._give_scratch(context, scratch)
        chosen = context.set_optimization_profile_async(profile, stream.handle)
        self._library.require(chosen, f"use profile {profile} of graph '{self.spec.name}'")
        for name, dims in shapes.items():
            self._library.require(context.set_input_shape(name, dims), f"take {name} of {dims} in '{self.spec.name}'")
        for name, value in host.items():
            taken = context.set_tensor_address(name, value.ctypes.data)
            self._library.require(taken, f"bind {name} of '{self.spec.name}'")
        stream.wait()  # a profile switch queues copies; none may fall into a capture
        missing = context.infer_shapes()
        if missing:
            self._library.require(None, f"infer the shapes of '{self.spec.name}' (still open: {', '.join(missing)})")
        return Context(self, context, host)

    def _create(self) -> Any:
        engine: Any = self._engine
        strategies = getattr(self._library.module, "ExecutionContextAllocationStrategy", None)
        if strategies is None:  # 8.6
            return engine.create_execution_context_without_device_memory()
        if self._library.flavour == "tensorrt-rtx":
            return engine.create_execution_context(self._runtime_config(strategies.USER_MANAGED))
        return engine.create_execution_context(strategies.USER_MANAGED)

    def _runtime_config(self, strategy: Any) -> Any:
        """TensorRT for RTX: compile kernels for a shape at its first use, and leave capturing to us."""
        if self._config is None:
            trt = self._library.module
            config: Any = self._engine.create_runtime_config()  # no other release has all of these names
            config.set_execution_context_allocation_strategy(strategy)
            config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED
            config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
            if self._kernels is not None:
                self._kernels.attach(self._library, config)
            self._config = config
        return self._config

    def _give_scratch(self, context: Any, scratch: DeviceMemory) -> None:
        if hasattr(context, "set_device_memory"):
            context.set_device_memory(scratch.address, scratch.size)
        else:  # 8.6
            context.device_memory = scratch.address


class Context:
    """One set of shapes of one engine, ready to be queued with any addresses."""

    def __init__(self, engine: Engine, context: trt.IExecutionContext, host: Mapping[str, NDArray[Any]]) -> None:
        self.engine, self._context = engine, context
        self._host = host  # the context reads them at every run

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Dims of a tensor at these shapes."""
        return tuple(self._context.get_tensor_shape(name))

    def queue(self, addresses: Mapping[str, int], stream: Stream) -> None:
        """Bind and queue one run."""
        context, graph = self._context, self.engine.spec.name
        for name, address in addresses.items():
            if not context.set_tensor_address(name, address):
                self.engine._library.require(None, f"bind {name} of '{graph}'")
        if not context.execute_async_v3(stream.handle):
            self.engine._library.require(None, f"run graph '{graph}'")


def to_engine_type(value: NDArray[Any], type: str) -> NDArray[Any]:
    """A host value in the type that the engine reads."""
    return np.ascontiguousarray(value.astype({"int32": np.int32, "int64": np.int64}[type]))

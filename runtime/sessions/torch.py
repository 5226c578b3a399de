"""PyTorch from the bundle's weights: eager, the reference; compiled; and on CUDA with every step as one captured graph.

The only file here with torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dllm_export.errors import IncompatibleError
from dllm_export.graphs import DType, TensorType
from dllm_export.graphs.torch_ops import TorchOps
from dllm_export.runtime.bundle import Bundle
from dllm_export.runtime.captures import CapturedProgram, Captures, NamedCapture, describe_calls, report_captures
from dllm_export.runtime.session import GraphCall, Program, SessionOptions, SessionReport

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
    """A torch tensor as a Buffer."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    @property
    def dims(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def write(self, array: NDArray[Any]) -> None:
        self.tensor.copy_(torch.from_numpy(np.array(array)))

    def read(self) -> NDArray[Any]:
        tensor = self.tensor.detach().cpu()
        host: NDArray[Any] = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy().copy()
        return host


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


class TorchSession:
    """Eager PyTorch unless told otherwise; `dtype` overrides the bundle's compute type (float64 for the oracles)."""

    provider = "torch"

    def __init__(self, bundle: Bundle, options: SessionOptions, *, dtype: DType | None = None) -> None:
        if options.place == "cuda" and not torch.cuda.is_available():
            raise IncompatibleError("--device cuda: this PyTorch sees no CUDA device; use --device cpu")
        self._bundle, self._device = bundle, torch.device(options.place)
        self._dtype: DType = dtype or bundle.manifest.dtype
        self._weights: dict[tuple[str, int | None], dict[str, torch.Tensor]] = {}
        self._shared: dict[int, torch.Tensor] = {}
        self._compile = options.compile
        self._functions: dict[str, Callable[..., dict[str, torch.Tensor]]] = {}
        self._captures: Captures[NamedCapture] = Captures(options.captures if options.place == "cuda" else 0)
        self._pool = torch.cuda.graph_pool_handle() if self._captures.limit else None
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
        prepared = [(call, self._graph_weights(call.graph, call.layer)) for call in calls]

        def run() -> None:
            for call, weights in prepared:
                self._run(call, weights)

        return CapturedProgram(self._captures, run, partial(self._capture, pool=self._pool), describe_calls(calls))

    def inspect(self) -> SessionReport:
        return SessionReport(
            provider=self.provider,
            library=f"torch {torch.__version__}",
            captures=report_captures(self._captures),
            capture_limit=self._captures.limit,
            evicted=self._captures.evicted,
        )

    _capture = staticmethod(TorchCapture)

    def _run(self, call: GraphCall, weights: Mapping[str, torch.Tensor]) -> None:
        spec = self._bundle.specs[call.graph]
        tensors = {name: buffer.tensor for name, buffer in call.tensors.items() if isinstance(buffer, TorchBuffer)}
        with torch.inference_mode():
            feeds: dict[str, Any] = {tensor.name: tensors[tensor.name] for tensor in spec.inputs}
            if self._compile:  # a size that is a number is compiled in; one inside a tensor would cut the graph in two
                feeds |= {tensor.name: int(feeds[tensor.name]) for tensor in spec.inputs if tensor.type == "int64"}
            try:
                results = self._function(call.graph)({**feeds, **weights})
            except RuntimeError as error:
                raise self._explain(call.graph, error) from error
            for tensor in spec.outputs:
                if tensor.name in tensors:
                    tensors[tensor.name].copy_(results[tensor.name])

    def _explain(self, graph: str, error: RuntimeError) -> Exception:
        """The error itself, unless it is the compiler's: then what to do about it."""
        if not self._compile or not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            return error
        reason = next((line.strip() for line in str(error).splitlines() if "Error" in line or "ompiler" in line), "")
        return IncompatibleError(
            f"PyTorch cannot compile graph '{graph}' here ({reason or type(error).__name__}): install a C++ compiler, on a "
            f"GPU Triton too, or leave out --compile"
        )

    def _function(self, graph: str) -> Callable[..., dict[str, torch.Tensor]]:
        """A graph's function of its tensors by name, compiled where asked for."""
        if graph not in self._functions:
            function: Any = self._bundle.specs[graph].function
            settings: Mapping[str, Any] = {}
            if isinstance(function, partial):
                function, settings = function.func, function.keywords
            if self._compile:  # what is compiled must be a plain function: PyTorch counts compilations by its code
                function = torch.compile(function, fullgraph=True)
            self._functions[graph] = partial(function, TorchOps(), self._bundle.manifest.shape, **settings)
        return self._functions[graph]

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

"""The reference session: every graph run eagerly by PyTorch from the bundle's weights. The only file here with torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dllm_export.errors import IncompatibleError
from dllm_export.graphs import DType, TensorType
from dllm_export.graphs.torch_ops import TorchOps
from dllm_export.runtime.bundle import Bundle
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


class TorchSession:
    """Eager PyTorch; `dtype` overrides the bundle's compute type (float64 for the exactness oracles)."""

    provider = "torch"

    def __init__(self, bundle: Bundle, options: SessionOptions, *, dtype: DType | None = None) -> None:
        if options.place == "cuda" and not torch.cuda.is_available():
            raise IncompatibleError("--device cuda: this PyTorch sees no CUDA device; use --device cpu")
        self._bundle, self._device = bundle, torch.device(options.place)
        self._dtype: DType = dtype or bundle.manifest.dtype
        self._weights: dict[tuple[str, int | None], dict[str, torch.Tensor]] = {}
        self._shared: dict[int, torch.Tensor] = {}
        if options.threads:  # a setting of the whole process, so it is left alone unless asked for
            torch.set_num_threads(options.threads)

    def __enter__(self) -> TorchSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._weights.clear()
        self._shared.clear()

    def allocate(self, dims: tuple[int, ...], type: TensorType) -> TorchBuffer:
        dtype = TORCH_TYPES[self._resolve(type)]
        return TorchBuffer(torch.zeros(dims, dtype=dtype, device=self._device))

    def prepare(self, calls: Sequence[GraphCall]) -> Program:
        prepared = [(call, self._graph_weights(call.graph, call.layer)) for call in calls]

        def run() -> None:
            for call, weights in prepared:
                self._run(call, weights)

        return run

    def inspect(self) -> SessionReport:
        return SessionReport(provider=self.provider, library=f"torch {torch.__version__}")

    def _run(self, call: GraphCall, weights: Mapping[str, torch.Tensor]) -> None:
        spec = self._bundle.specs[call.graph]
        tensors = {name: buffer.tensor for name, buffer in call.tensors.items() if isinstance(buffer, TorchBuffer)}
        with torch.inference_mode():
            feeds = {tensor.name: tensors[tensor.name] for tensor in spec.inputs}
            results = spec.function(TorchOps(), self._bundle.manifest.shape, {**feeds, **weights})
            for tensor in spec.outputs:
                if tensor.name in tensors:
                    tensors[tensor.name].copy_(results[tensor.name])

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
            self._weights[key] = {name: self._share(array) for name, array in arrays.items()}
        return self._weights[key]

    def _share(self, array: NDArray[Any]) -> torch.Tensor:
        address = array.__array_interface__["data"][0]
        if address not in self._shared:
            host = array.view(np.uint16) if array.dtype.itemsize == 2 else array
            tensor = torch.from_numpy(host)  # over the mapped file: no copy unless device or type differ
            if array.dtype.itemsize == 2:
                tensor = tensor.view(TORCH_TYPES[str(array.dtype)])
            self._shared[address] = tensor.to(self._device, TORCH_TYPES[self._dtype])
        return self._shared[address]

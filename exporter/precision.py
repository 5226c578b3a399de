"""Number types of an engine. Where the library is strongly typed the graph says it all; TensorRT 8.6 must be told."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from dllm_export.errors import IncompatibleError
from dllm_export.graphs import DType, GraphSpec
from dllm_export.runtime.tensorrt.library import TensorRt

if TYPE_CHECKING:
    import tensorrt as trt

COMPUTING = ("ELEMENTWISE", "UNARY", "REDUCE", "SOFTMAX", "ACTIVATION", "SLICE", "CONCATENATION")
"""Kinds of layers that compute, and those that running sums pass through; casts, constants, shuffles and shapes are only
hints to a weakly typed builder, and setting a precision on a cast conflicts with the cast itself."""
COMPUTING_SCOPES = ("norm", "drift", "statistics", "router", "routing")
"""Islands whose sums leave the range of float16, or where rounding would send rows to other experts.
Rotary embedding and score masks stay unpinned: in float16 they round as the keys and probabilities do that come out of
them, and pinned they made a full layer a tenth slower on an H200."""

COUNTING = ("MATRIX_MULTIPLY", "TOPK")
COUNTING_SCOPES = ("router", "routing")
"""Where these count rows, to more than the 2048 that float16 can."""


def set_precision(
    library: TensorRt, network: trt.INetworkDefinition, config: trt.IBuilderConfig, spec: GraphSpec, dtype: DType
) -> tuple[str, ...]:
    """Make the engine compute in the types that the graph states; returns the names of the flags set.

    A weakly typed builder takes casts as hints: it would run the float32 islands of a float16 graph (norm statistics,
    softmax, drift) in float16, where the square of 256 overflows without an inf in sight.
    """
    check_dtype(library, dtype)
    dtype = engine_type(spec, dtype)
    flags = library.module.BuilderFlag
    if dtype == "float32" and hasattr(flags, "TF32"):
        config.clear_flag(flags.TF32)
    if library.strongly_typed or dtype == "float32":
        return ()
    names = ("FP16", "OBEY_PRECISION_CONSTRAINTS")
    for name in names:
        config.set_flag(getattr(flags, name))
    pin_float32(library, network)
    return names


def engine_type(spec: GraphSpec, dtype: DType) -> DType:
    """float32 where nothing is in the compute type: `commit` must order numbers as the host does, to the last bit."""
    tensors = (*spec.inputs, *spec.weights, *spec.outputs)
    return dtype if any(tensor.type == "compute" for tensor in tensors) else "float32"


def check_dtype(library: TensorRt, dtype: DType) -> None:
    """Refuse a type that the library has no numbers for."""
    if not library.strongly_typed and dtype not in ("float32", "float16"):
        raise IncompatibleError(
            f"{library.flavour} {library.version} has no {dtype}: export with --dtype float16, or float32"
        )


def pin_float32(library: TensorRt, network: trt.INetworkDefinition) -> None:
    """Fix the islands to float32."""
    for layer in find_islands(library, network):
        layer.precision = library.module.float32
        layer.set_output_type(0, library.module.float32)


def find_islands(library: TensorRt, network: trt.INetworkDefinition) -> Iterator[trt.ILayer]:
    """Layers of norm, drift, statistics, routers and softmax that the graph has in float32; layers carry their nodes' names."""
    trt = library.module
    islands = (
        (COMPUTING_SCOPES, {getattr(trt.LayerType, name) for name in COMPUTING}),
        (COUNTING_SCOPES, {getattr(trt.LayerType, name) for name in COUNTING}),
    )
    for place in range(network.num_layers):
        layer = network.get_layer(place)
        inside = any(layer.name.startswith(scopes) and layer.type in kinds for scopes, kinds in islands)
        if (inside or layer.type == trt.LayerType.SOFTMAX) and layer.get_output(0).dtype == trt.float32:
            yield layer

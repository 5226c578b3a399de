"""Number types of an engine. Where the library is strongly typed the graph says it all; TensorRT 8.6 must be told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from dllm_export.errors import IncompatibleError
from dllm_export.graphs import DType
from dllm_export.runtime.tensorrt.library import TensorRt

if TYPE_CHECKING:
    import tensorrt as trt

COMPUTING = ("ELEMENTWISE", "UNARY", "REDUCE", "SOFTMAX", "ACTIVATION", "SLICE", "CONCATENATION")
"""Kinds of layers that compute, and those that running sums pass through; casts, constants, shuffles and shapes are only
hints to a weakly typed builder, and setting a precision on a cast conflicts with the cast itself."""
COUNTING = ("MATRIX_MULTIPLY", "TOPK")
"""Kinds that count rows to more than the 2048 that float16 can."""

PINNED: Mapping[str, tuple[str, ...]] = {
    "norm": COMPUTING,
    "drift": COMPUTING,
    "statistics": (*COMPUTING, "SELECT"),  # the scores that graph `commit` ranks pass through one
    "router": (*COMPUTING, *COUNTING),
    "routing": (*COMPUTING, *COUNTING),
}
"""Scope -> kinds of layers, of islands whose sums leave the range of float16, or where rounding would send rows to other
experts or commit others. Rotary embedding and score masks stay unpinned: in float16 they round as the keys and probabilities
do that come out of them, and pinned they made a full layer a tenth slower on an H200."""


def set_precision(
    library: TensorRt, network: trt.INetworkDefinition, config: trt.IBuilderConfig, dtype: DType
) -> tuple[str, ...]:
    """Make the engine compute in the types that the graph states; returns the names of the flags set.

    A weakly typed builder takes casts as hints: it would run the float32 islands of a float16 graph (norm statistics,
    softmax, drift) in float16, where the square of 256 overflows without an inf in sight.
    """
    check_dtype(library, dtype)
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


def check_dtype(library: TensorRt, dtype: DType) -> None:
    """Refuse a type that the library has no numbers for."""
    if not library.strongly_typed and dtype not in ("float32", "float16"):
        raise IncompatibleError(
            f"{library.flavour} {library.version} has no {dtype}: export with --dtype float16, or float32"
        )


def pin_float32(library: TensorRt, network: trt.INetworkDefinition) -> None:
    """Fix norm, drift, statistics, routers and softmax to float32 where the graph declares it; layers carry their nodes'
    names."""
    trt = library.module
    pinned = {scope: {getattr(trt.LayerType, kind) for kind in kinds} for scope, kinds in PINNED.items()}
    for place in range(network.num_layers):
        layer = network.get_layer(place)
        kinds = next((kinds for scope, kinds in pinned.items() if layer.name.startswith(scope)), set())
        inside = layer.type == trt.LayerType.SOFTMAX or layer.type in kinds
        if inside and layer.get_output(0).dtype == trt.float32:
            layer.precision = trt.float32
            layer.set_output_type(0, trt.float32)

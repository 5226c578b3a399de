"""GraphSpec -> ONNX model: kilobytes, weights as inputs or as references into a safetensors file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx
from onnx import ModelProto, TensorProto, ValueInfoProto, helper

from dllm_export.errors import DllmExportError
from dllm_export.exporter.contrib_ops import CONTRIB, ContribOps
from dllm_export.exporter.onnx_ops import IR_VERSION, OPSET, OnnxOps, Value
from dllm_export.graphs import DType, GraphSpec, ModelShape, TensorSpec

ELEMENT_TYPES: Mapping[str, int] = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
    "bool": TensorProto.BOOL,
}


@dataclass(frozen=True, slots=True)
class ExternalTensor:
    """Where a weight's bytes lie: a file beside or below the ONNX file, and the range in it."""

    location: str
    offset: int
    length: int


def build_onnx(
    spec: GraphSpec,
    shape: ModelShape,
    dtype: DType,
    weights: Mapping[str, ExternalTensor] | None = None,
    *,
    contrib: bool = False,
) -> ModelProto:
    """The checked ONNX form of a graph. Without `weights` they are inputs; with them, external initialisers.

    `contrib` lets it use ONNX Runtime's own operators where it has one for what takes many of the standard's.
    """
    ops = ContribOps() if contrib else OnnxOps()
    declared = (*spec.inputs, *spec.weights)
    values = {tensor.name: Value(tensor.name, element_type(tensor, dtype), tensor.dims) for tensor in declared}
    results = spec.function(ops, shape, values)
    rename = {results[tensor.name].name: tensor.name for tensor in spec.outputs}
    if len(rename) != len(spec.outputs) or any(name in values for name in rename):
        raise DllmExportError(f"graph '{spec.name}': an output is an input or another output; give it its own node")
    for node in ops.nodes:
        node.input[:] = [rename.get(name, name) for name in node.input]
        node.output[:] = [rename.get(name, name) for name in node.output]
    inputs, initializers = declared, list(ops.initializers)
    if weights is not None:
        inputs = spec.inputs
        initializers += [external_initializer(tensor, dtype, weights[tensor.name]) for tensor in spec.weights]
    graph = helper.make_graph(
        ops.nodes,
        spec.name,
        [value_info(tensor, dtype) for tensor in inputs],
        [value_info(tensor, dtype) for tensor in spec.outputs],
        initializers,
    )
    own = any(node.domain == CONTRIB for node in ops.nodes)
    domains = [helper.make_opsetid("", OPSET), *([helper.make_opsetid(CONTRIB, 1)] if own else [])]
    model = helper.make_model(graph, opset_imports=domains, ir_version=IR_VERSION, producer_name="dllm-export")
    if weights is None:
        onnx.checker.check_model(model, full_check=True)
    return model


def element_type(tensor: TensorSpec, dtype: DType) -> int:
    """ONNX element type of a tensor in an export of this compute type."""
    return ELEMENT_TYPES[dtype if tensor.type == "compute" else tensor.type]


def value_info(tensor: TensorSpec, dtype: DType) -> ValueInfoProto:
    """Name, type and dims as ONNX states them."""
    return helper.make_tensor_value_info(tensor.name, element_type(tensor, dtype), list(tensor.dims))


def external_initializer(tensor: TensorSpec, dtype: DType, place: ExternalTensor) -> TensorProto:
    """An initialiser whose bytes lie in another file."""
    proto = TensorProto(name=tensor.name, data_type=element_type(tensor, dtype), dims=[int(dim) for dim in tensor.dims])
    proto.data_location = TensorProto.EXTERNAL
    for key, value in (("location", place.location), ("offset", place.offset), ("length", place.length)):
        proto.external_data.add(key=key, value=str(value))
    return proto

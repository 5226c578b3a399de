"""Every graph: two readings that agree, and an ONNX form that every consumer accepts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper

from dllm_export.exporter.onnx_graph import build_onnx
from dllm_export.exporter.options import ExportType
from dllm_export.graphs import LAYER_GRAPHS, TOP_TOKENS, Experts, ModelShape, graph_specs
from dllm_export.runtime.bundle import Bundle

Feeds = dict[str, NDArray[Any]]
DrawFeeds = Callable[..., Feeds]
RunGraph = Callable[[str, ModelShape, str, Feeds], Feeds]

PLAIN = ModelShape(
    layers=2,
    hidden=32,
    heads=4,
    kv_heads=4,
    head_dim=8,
    mlp=48,
    vocab=71,
    max_length=64,
    norm_eps=1e-5,
    rope_theta=1e4,
    indicator_rank=5,
)
SHAPES = {
    "plain": PLAIN,
    "gqa": replace(PLAIN, kv_heads=2),
    "mqa": replace(PLAIN, kv_heads=1),
    "bias": replace(PLAIN, qkv_bias=True),
    "tied": replace(PLAIN, tied_head=True),
    "query and key norms": replace(PLAIN, kv_heads=2, head_dim=12, qk_norm=True, rope_float32=False),
    "rope in the compute type": replace(PLAIN, rope_float32=False),
    "scaled": replace(PLAIN, embedding_scale=3.0, logits_scale=0.25),
    "wide vocabulary": replace(PLAIN, vocab=5000),
    "tiny vocabulary": replace(PLAIN, vocab=20),
    "layer norm": replace(PLAIN, norm="layer"),
    "gelu": replace(PLAIN, mlp_kind="gelu"),
    "biases": replace(PLAIN, mlp_bias=True, head_bias=True, qkv_bias=True),
    "dit": replace(PLAIN, norm="layer", mlp_kind="gelu", mlp_bias=True, head_bias=True, rope_float32=False),
    "timed": replace(PLAIN, norm="layer", mlp_kind="gelu", mlp_bias=True, head_bias=True, conditioning=6),
    "experts": replace(PLAIN, experts=Experts(count=8, per_token=2, mlp=12)),
    "grouped experts": replace(
        PLAIN,
        rope_fraction=0.5,
        rope_float32=False,
        experts=Experts(
            count=8,
            per_token=3,
            mlp=10,
            router="sigmoid",
            renormalise=True,
            scale=2.5,
            bias=True,
            groups=4,
            groups_kept=2,
            shared=14,
            dense_layers=1,
        ),
    ),
}
GRAPHS = tuple(graph_specs(PLAIN))
PICKING = ("layer_adaptive", "layer_tracking", "layer_indicated")
DTYPES = get_args(ExportType)
ELEMENT_TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
    "bool": TensorProto.BOOL,
}
GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "graphs.json"

OPERATORS = {
    *("Add", "And", "Cast", "Concat", "Div", "Equal", "Exp", "Expand", "Floor", "Gather"),
    *("GatherElements", "Greater", "LessOrEqual", "Log", "MatMul", "Max", "Min", "Squeeze", "Tanh"),
    *(
        "MaxPool",
        "Mul",
        "Range",
        "Reciprocal",
        "ReduceMax",
        "ReduceMean",
        "ReduceSum",
        "Relu",
        "Reshape",
        "Shape",
        "Sigmoid",
        "Slice",
    ),
    *("Not", "Softmax", "Sqrt", "Sub", "TopK", "Transpose", "Unsqueeze", "Where"),
}
"""Operators that TensorRT 8.6 to 11, TensorRT for RTX and ONNX Runtime all run without a plugin or a slow fallback."""

every_graph = pytest.mark.parametrize("graph", GRAPHS)


def build(shape: ModelShape, graph: str, dtype: Any = "float32") -> ModelProto:
    return build_onnx(graph_specs(shape)[graph], shape, dtype)


@every_graph
@pytest.mark.parametrize("name", SHAPES)
def test_both_readings_of_a_graph_agree(name: str, graph: str, draw_feeds: DrawFeeds, run_graph: RunGraph) -> None:
    feeds = draw_feeds(SHAPES[name], graph, seed=len(name))
    expected, found = (run_graph(reading, SHAPES[name], graph, feeds) for reading in ("float64", "onnxruntime"))
    for output, value in expected.items():
        if value.dtype.kind == "f":
            np.testing.assert_allclose(found[output], value, rtol=1e-3, atol=2e-5, err_msg=output)
        else:
            np.testing.assert_array_equal(found[output], value, err_msg=output)


def test_what_a_noise_level_conditions_by_is_the_same_in_both_readings(
    draw_feeds: DrawFeeds, run_graph: RunGraph
) -> None:
    feeds = draw_feeds(SHAPES["timed"], "condition")
    expected, found = (
        run_graph(reading, SHAPES["timed"], "condition", feeds)["condition_out"]
        for reading in ("float64", "onnxruntime")
    )
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=2e-5)


@every_graph
@pytest.mark.parametrize("full_precision", [True, False])
def test_a_graph_in_half_precision_stays_close(
    full_precision: bool, graph: str, draw_feeds: DrawFeeds, run_graph: RunGraph
) -> None:
    shape = replace(SHAPES["gqa"], rope_float32=full_precision)
    feeds = {
        name: array.astype(np.float16).astype(np.float64) if array.dtype == np.float64 else array
        for name, array in draw_feeds(shape, graph).items()
    }
    expected, found = (run_graph(reading, shape, graph, feeds) for reading in ("float64", "onnxruntime-float16"))
    for output, value in expected.items():
        if value.dtype.kind == "f":
            np.testing.assert_allclose(found[output], value, rtol=5e-3, atol=3e-2, err_msg=output)


@every_graph
def test_a_graph_runs_with_other_sizes(graph: str, draw_feeds: DrawFeeds, run_graph: RunGraph) -> None:
    for sizes in ({"S": 5, "X": 5, "Q": 3, "N": 4}, {"S": 30, "X": 1, "Q": 1, "N": 1}):
        feeds = draw_feeds(PLAIN, graph, **sizes)
        if "budget" in feeds:
            feeds["budget"] = np.array([sizes["Q" if "kept" in feeds else "X"]])
        expected, found = (run_graph(reading, PLAIN, graph, feeds) for reading in ("float32", "onnxruntime"))
        for output, value in expected.items():
            np.testing.assert_allclose(found[output], value, rtol=1e-3, atol=2e-5, err_msg=output)


@every_graph
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_graph_is_valid_onnx_of_operators_that_every_consumer_knows(dtype: str, graph: str) -> None:
    model = build(SHAPES["gqa"], graph, dtype)
    onnx.checker.check_model(model, full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 17)]
    assert {node.op_type for node in model.graph.node} <= OPERATORS
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions


@every_graph
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_graph_holds_no_weight(dtype: str, graph: str) -> None:
    """At the size of LLaDA-8B, where one forgotten weight would be megabytes."""
    model = build(
        replace(PLAIN, hidden=4096, heads=32, kv_heads=32, head_dim=128, mlp=12288, vocab=126464), graph, dtype
    )
    assert model.ByteSize() < 64 * 1024
    assert all(np.prod(tensor.dims) <= 8 for tensor in model.graph.initializer)
    assert not any(tensor.external_data for tensor in model.graph.initializer)
    assert not any(node.op_type == "Constant" for node in model.graph.node)


def test_the_graphs_of_a_bundle_are_kilobytes(tiny_bundle: Bundle) -> None:
    for name, record in tiny_bundle.manifest.graphs.items():
        assert tiny_bundle.file(record.file).stat().st_size < 64 * 1024, name
        onnx.checker.check_model(str(tiny_bundle.file(record.file)), full_check=True)


@every_graph
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tensor_of_a_graph_has_the_name_type_and_dims_of_its_spec(dtype: str, graph: str) -> None:
    types = {**ELEMENT_TYPES, "compute": ELEMENT_TYPES[dtype]}
    spec, model = graph_specs(PLAIN)[graph], build(PLAIN, graph, dtype).graph
    for declared, infos in (((*spec.inputs, *spec.weights), model.input), (spec.outputs, model.output)):
        expected = [(tensor.name, types[tensor.type], list(tensor.dims)) for tensor in declared]
        assert [signature(info) for info in infos] == expected


def signature(info: onnx.ValueInfoProto) -> tuple[str, int, list[str | int]]:
    tensor = info.type.tensor_type
    return info.name, tensor.elem_type, [dim.dim_param or dim.dim_value for dim in tensor.shape.dim]


@pytest.mark.parametrize(("full_precision", "casts"), [(True, True), (False, False)])
def test_rope_leaves_the_compute_type_only_where_the_model_does(full_precision: bool, casts: bool) -> None:
    model = build(replace(PLAIN, rope_float32=full_precision), "layer_full", "float16")
    inside = [node for node in model.graph.node if node.name.startswith("rope/")]
    widened = [node for node in inside if node.op_type == "Cast" and node.attribute[0].i == TensorProto.FLOAT]
    assert inside
    assert bool(widened) is casts


@pytest.mark.parametrize("scope", ["norm/", "attention/", "statistics/", "drift/", "relevance/"])
def test_sums_over_many_numbers_are_taken_in_float32(scope: str) -> None:
    """Statistics, softmax and drift in half precision would overflow or round rows together."""
    for graph in {"statistics/": ["head"], "drift/": PICKING, "relevance/": ["layer_compact"]}.get(
        scope, ["layer_full"]
    ):
        check_sums(build(PLAIN, graph, "float16"), scope)


def check_sums(model: ModelProto, scope: str) -> None:
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    types = {info.name: info.type.tensor_type.elem_type for info in (*inferred.value_info, *inferred.output)}
    sums = {"ReduceMean", "ReduceSum", "ReduceMax", "Softmax"}
    inside = [node for node in inferred.node if node.name.startswith(scope) and node.op_type in sums]
    assert inside
    assert {types[node.output[0]] for node in inside} == {TensorProto.FLOAT}


def test_signatures_are_those_that_bundles_were_written_with(tmp_path: Path) -> None:
    """A bundle of today must open tomorrow: names, types and dims change only together with the format number."""
    current = {
        name: {graph: signatures(build(SHAPES[name], graph)) for graph in graph_specs(SHAPES[name])}
        for name in ("plain", "bias", "tied", "query and key norms", "dit", "timed")
    }
    text = json.dumps(current, indent=1) + "\n"
    (tmp_path / "graphs.json").write_text(text)
    remedy = f"raise FORMAT in runtime/manifest.py and copy {tmp_path}/graphs.json to {GOLDEN}"
    assert GOLDEN.read_text(encoding="utf-8") == text, f"signatures changed: if that is meant, {remedy}"


def signatures(model: ModelProto) -> dict[str, list[str]]:
    def line(info: onnx.ValueInfoProto) -> str:
        name, kind, dims = signature(info)
        return f"{name} {helper.tensor_dtype_to_np_dtype(kind)} [{', '.join(map(str, dims))}]"

    return {
        "inputs": [line(info) for info in model.graph.input],
        "outputs": [line(info) for info in model.graph.output],
    }


def test_the_head_returns_no_more_candidates_than_there_are_tokens() -> None:
    for shape, top in ((PLAIN, TOP_TOKENS), (SHAPES["tiny vocabulary"], 20)):
        assert graph_specs(shape)["head"].tensor("top_tokens").dims[-1] == top


@pytest.mark.parametrize("graph", LAYER_GRAPHS)
def test_no_two_products_of_weights_take_the_same_flattened_rows(graph: str, llada_8b: ModelShape) -> None:
    """TensorRT 8.6 joins such products and copies bound weights side by side for it, at every call."""
    spec = graph_specs(llada_8b)[graph]
    weights, nodes = {weight.name for weight in spec.weights}, build_onnx(spec, llada_8b, "float16").graph.node
    flattened = {node.output[0]: node.input[0] for node in nodes if node.op_type == "Reshape"}
    products = [node.input for node in nodes if node.op_type == "MatMul" and node.input[1] in weights]
    rows = [flattened[x] for x, _ in products if x in flattened]
    assert {weight for _, weight in products} >= {"qk", "v", "out", "gate_up", "down"}
    assert len(rows) == len(set(rows))

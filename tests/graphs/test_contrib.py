"""The form of a graph for ONNX Runtime on the CPU gives what the graph is defined to give (experts: test_experts.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from dllm_export.exporter.contrib_ops import CONTRIB
from dllm_export.exporter.onnx_graph import build_onnx
from dllm_export.graphs import ModelShape, graph_specs
from dllm_export.runtime.session import FEATURES

Array = NDArray[Any]
Feeds = dict[str, Array]

PLAIN = ModelShape(
    layers=2, hidden=32, heads=4, kv_heads=4, head_dim=8, mlp=48, vocab=97, max_length=64, norm_eps=1e-5, rope_theta=1e4
)  # fmt: skip
SHAPES = {
    "all rows": PLAIN,
    "blocks": replace(PLAIN, block=3),
    "groups of heads": replace(PLAIN, kv_heads=2),
    "half of a head turns": replace(PLAIN, rope_fraction=0.5),
}
GRAPHS = ("layer_full", "layer_partial", "layer_adaptive", "layer_tracking")


def run_contrib(shape: ModelShape, graph: str, feeds: Feeds) -> Feeds:
    spec = graph_specs(shape)[graph]
    model = build_onnx(spec, shape, "float32", contrib=True)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    types = {"compute": "float32"}
    given = {
        tensor.name: feeds[tensor.name].astype(types.get(tensor.type, tensor.type))
        for tensor in (*spec.inputs, *spec.weights)
    }
    names = [tensor.name for tensor in spec.outputs]
    return dict(zip(names, session.run(names, given), strict=True))


def assert_same(found: Feeds, expected: Feeds) -> None:
    for name, value in expected.items():
        # float32 against float64, in another order of sums
        np.testing.assert_allclose(found[name], value, rtol=1e-3, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("case", SHAPES)
def test_it_gives_what_the_graph_gives(
    case: str, graph: str, seed: int, draw_feeds: Callable[..., Feeds], run_graph: Callable[..., Feeds]
) -> None:
    feeds = draw_feeds(SHAPES[case], graph, seed=seed)
    assert_same(run_contrib(SHAPES[case], graph, feeds), run_graph("float64", SHAPES[case], graph, feeds))


def test_rows_that_are_named_twice_or_are_not_fresh_end_where_they_belong(
    draw_feeds: Callable[..., Feeds], run_graph: Callable[..., Feeds]
) -> None:
    feeds = draw_feeds(PLAIN, "layer_partial")
    feeds["index"] = np.array([[3, 7, 3, 9], [11, 4, 4, 4]], np.int32)
    feeds["hidden"][0, 2] = feeds["hidden"][0, 0]
    feeds["hidden"][1, 2:] = feeds["hidden"][1, 1]
    feeds["slot"] = np.zeros((2, 12), np.int32)
    feeds["slot"][0, [3, 7, 9]], feeds["slot"][1, [11, 4]] = [0, 1, 3], [0, 1]
    feeds["fresh"] = np.zeros((2, 12), np.bool_)
    feeds["fresh"][0, [3, 9]] = feeds["fresh"][1, [11, 4]] = True
    expected = run_graph("float64", PLAIN, "layer_partial", feeds)
    assert (expected["key_out"][0, 7] == feeds["key"][0, 7]).all(), "this row runs and its key is not kept"
    assert_same(run_contrib(PLAIN, "layer_partial", feeds), expected)


CACHING = ("layer_partial", "layer_adaptive", "layer_tracking", "layer_indicated")


@pytest.mark.parametrize("graph", CACHING)
@pytest.mark.parametrize("case", SHAPES)
def test_a_scatter_into_a_cache_waits_for_every_node_that_reads_it(case: str, graph: str) -> None:
    """What makes it safe to bind one buffer as a cache and as its result: ONNX Runtime may take other nodes in any order."""
    shape = replace(SHAPES[case], indicator_rank=4)
    model = build_onnx(graph_specs(shape)[graph], shape, "float32", contrib=True)
    maker = {name: node for node in model.graph.node for name in node.output}
    written = {name.removesuffix("_out"): maker[name] for name in (tensor.name for tensor in model.graph.output)}
    for cache in sorted(FEATURES & {tensor.name for tensor in model.graph.input}):
        scatter = written[cache]
        assert scatter.op_type == "ScatterND"
        assert scatter.input[0] == cache
        before, ahead = {scatter.name}, list(scatter.input)
        while ahead:
            node = maker.get(ahead.pop())
            if node is not None and node.name not in before:
                before.add(node.name)
                ahead += node.input
        views = {cache}  # a reshaped cache is the same memory
        for node in model.graph.node:
            views |= set(node.output) if node.op_type == "Reshape" and node.input[0] in views else set()
        readers = {node.name for node in model.graph.node if views & set(node.input)}
        assert readers
        assert readers <= before


OWN = {
    ("all rows", "float32"): {"MultiHeadAttention", "RotaryEmbedding"},
    ("all rows", "float16"): {"RotaryEmbedding"},
    ("blocks", "float32"): {"MultiHeadAttention", "RotaryEmbedding"},
    ("groups of heads", "float32"): {"RotaryEmbedding"},
    ("half of a head turns", "float32"): {"MultiHeadAttention"},
    ("half of a head turns", "float16"): set[str](),
}


@pytest.mark.parametrize(("case", "dtype"), OWN)
def test_its_own_operators_are_used_where_they_have_kernels(case: str, dtype: str) -> None:
    shape = SHAPES[case]
    model = build_onnx(graph_specs(shape)["layer_full"], shape, dtype, contrib=True)  # type: ignore[arg-type]
    own = {node.op_type for node in model.graph.node if node.domain == CONTRIB}
    assert own == OWN[case, dtype]
    assert (CONTRIB in {opset.domain for opset in model.opset_import}) is bool(own)

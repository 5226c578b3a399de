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

Array = NDArray[Any]
Feeds = dict[str, Array]

PLAIN = ModelShape(
    layers=2, hidden=32, heads=4, kv_heads=4, head_dim=8, mlp=48, vocab=97, max_length=64, norm_eps=1e-5, rope_theta=1e4
)  # fmt: skip
SHAPES = {
    "all rows": PLAIN,
    "blocks": replace(PLAIN, block=3),
    "groups of heads": replace(PLAIN, kv_heads=2),
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


def test_its_own_operators_are_used_where_they_have_kernels() -> None:
    for case, own in (("all rows", True), ("blocks", True), ("groups of heads", False)):
        for dtype in ("float32", "float16"):
            shape = SHAPES[case]
            model = build_onnx(graph_specs(shape)["layer_full"], shape, dtype, contrib=True)  # type: ignore[arg-type]
            domains = {opset.domain for opset in model.opset_import}
            assert (CONTRIB in domains) is (own and dtype == "float32"), (case, dtype)

"""What a weakly typed builder is told, found in networks that TensorRT for RTX parsed: it is given the same graphs."""

from __future__ import annotations

import pytest

from dllm_export.exporter.onnx_graph import build_onnx
from dllm_export.exporter.plans import make_builder, parse_graph
from dllm_export.exporter.precision import engine_type, find_islands
from dllm_export.graphs import graph_specs
from dllm_export.runtime.tensorrt.library import load_tensorrt
from dllm_export.tools.gpu_check import TINY

ISLANDS = {
    "embed": set(),
    "layer_full": {"norm", "attention"},
    "layer_adaptive": {"norm", "drift", "attention"},
    "head": {"norm", "statistics"},
}
"""Graph -> scopes of which something is computed in float32."""


@pytest.mark.parametrize("graph", ISLANDS)
def test_islands_are_found_in_the_network(graph: str) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX has wheels for Linux on x86-64 only")
    library = load_tensorrt("tensorrt-rtx")
    network = make_builder(library).create_network(library.network_flags())
    parse_graph(library, network, build_onnx(graph_specs(TINY)[graph], TINY, "float16").SerializeToString(), graph)
    found = {layer.name for layer in find_islands(library, network)}
    assert {name.partition("/")[0] for name in found} == ISLANDS[graph]
    if graph == "head":
        kinds = {name.partition("/")[2].partition("_")[0] for name in found}
        assert {"Sub", "Exp", "ReduceSum", "Log", "Div"} <= kinds


def test_only_the_graph_without_a_compute_type_is_built_in_float32() -> None:
    wide = {name for name, spec in graph_specs(TINY).items() if engine_type(spec, "float16") == "float32"}
    assert wide == {"commit"}

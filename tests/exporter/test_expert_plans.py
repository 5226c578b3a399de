"""TensorRT for RTX builds the layers of a model with experts for both of its newest kinds of GPU."""

from __future__ import annotations

import pytest

from dllm_export.exporter.build_options import BuildOptions
from dllm_export.exporter.onnx_graph import build_onnx
from dllm_export.exporter.plans import build_plan
from dllm_export.exporter.ranges import dim_ranges
from dllm_export.graphs import DType, Experts, ModelShape, graph_specs
from dllm_export.runtime.tensorrt.library import load_tensorrt

pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX has wheels for Linux on x86-64 only")

SHAPE = ModelShape(
    layers=2,
    hidden=128,
    heads=4,
    kv_heads=2,
    head_dim=32,
    mlp=256,
    vocab=500,
    max_length=1024,
    norm_eps=1e-6,
    rope_theta=1e4,
    rope_float32=False,
    rope_fraction=0.5,
    qk_norm=True,
    indicator_rank=16,
    experts=Experts(
        count=16,
        per_token=4,
        mlp=64,
        router="sigmoid",
        renormalise=True,
        scale=2.5,
        bias=True,
        groups=4,
        groups_kept=2,
        shared=64,
        dense_layers=1,
    ),
)
GRAPHS = ("layer_full", "layer_partial", "layer_adaptive", "layer_shadow", "layer_full_dense")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("graph", GRAPHS)
def test_a_graph_with_experts_builds_for_both_kinds_of_gpu(graph: str, dtype: DType) -> None:
    library, spec = load_tensorrt("tensorrt-rtx"), graph_specs(SHAPE)[graph]
    onnx = build_onnx(spec, SHAPE, dtype).SerializeToString()
    ranges = [dim_ranges(spec, SHAPE.max_length, BuildOptions())]
    plan, _ = build_plan(library, onnx, spec, dtype, ranges, ("8.9", "12.0"))
    assert len(plan) > 1000

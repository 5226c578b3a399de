"""Graphs in two stages: together they are the whole graph, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from dllm_export.exporter.onnx_graph import build_onnx
from dllm_export.graphs import GraphSpec, ModelShape, TensorSpec, engine_specs, graph_specs
from dllm_export.graphs.torch_ops import TorchOps
from dllm_export.runtime.session import GraphCall
from dllm_export.runtime.tensorrt.stages import split_call, whole_graph

PLAIN = ModelShape(
    layers=2,
    hidden=32,
    heads=4,
    kv_heads=2,
    head_dim=12,
    mlp=48,
    vocab=97,
    max_length=64,
    norm_eps=1e-5,
    rope_theta=1e4,
    qkv_bias=True,
    qk_norm=True,
    indicator_rank=5,
)
LAYER_NORM = replace(PLAIN, norm="layer", mlp_kind="gelu", mlp_bias=True)
SHAPES = (PLAIN, LAYER_NORM, replace(LAYER_NORM, conditioning=6))
STAGED = {name: spec for name, spec in graph_specs(PLAIN).items() if spec.stages}


@dataclass(slots=True)
class Memory:
    """A buffer in host memory."""

    array: np.ndarray

    @property
    def dims(self) -> tuple[int, ...]:
        return self.array.shape

    def write(self, array: np.ndarray) -> None:
        self.array = array

    def read(self) -> np.ndarray:
        return self.array


def run_torch(shape: ModelShape, spec: GraphSpec, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    tensors = {tensor.name: torch.from_numpy(feeds[tensor.name]) for tensor in (*spec.inputs, *spec.weights)}
    results = spec.function(TorchOps(), shape, tensors)
    return {tensor.name: results[tensor.name].numpy() for tensor in spec.outputs}


def run_onnx(shape: ModelShape, spec: GraphSpec, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # no fusion rounds otherwise
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(build_onnx(spec, shape, "float32").SerializeToString(), options)
    names = [tensor.name for tensor in spec.outputs]
    given = {tensor.name: feeds[tensor.name] for tensor in (*spec.inputs, *spec.weights)}
    return dict(zip(names, session.run(names, given), strict=True))


def run_stages(run: Any, spec: GraphSpec, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The graph as TensorRT 8.6 runs it: stage after stage over the buffers of one call."""
    sizes = {"B": 2, "S": 12, "X": 7, "Q": feeds["budget"][0] if "budget" in feeds else 4}

    def empty(tensor: TensorSpec) -> Memory:
        dims = tuple(sizes[dim] if isinstance(dim, str) else dim for dim in tensor.dims)
        return Memory(np.zeros(dims, np.float32))

    outputs = {tensor.name: empty(tensor) for tensor in spec.outputs}
    inputs = {tensor.name: Memory(feeds[tensor.name]) for tensor in spec.inputs}
    handed: dict[tuple[str, tuple[int, ...]], Memory] = {}

    def hand_over(graph: str, tensor: TensorSpec, dims: tuple[int, ...]) -> Memory:
        return handed.setdefault((tensor.name, dims), Memory(np.zeros(dims, np.float32)))

    stages = {stage.name: stage for stage in spec.stages}
    for call in split_call(GraphCall(spec.name, 1, {**inputs, **outputs}), spec, hand_over):
        stage = stages[call.graph]
        memory: dict[str, Any] = dict(call.tensors)
        given = {tensor.name: memory[tensor.name].array for tensor in stage.inputs}
        for name, array in run(stage, {**feeds, **given}).items():
            assert memory[name].dims == array.shape, name
            memory[name].array = array
    return {name: memory.array for name, memory in outputs.items()}


@pytest.mark.parametrize("run", [run_torch, run_onnx])
@pytest.mark.parametrize("shape", SHAPES, ids=["plain", "layer norm", "timed"])
@pytest.mark.parametrize("graph", sorted(STAGED))
def test_the_stages_of_a_graph_are_the_graph(graph: str, shape: ModelShape, run: Any, draw_feeds: Any) -> None:
    run = partial(run, shape)
    types = {"compute": np.float32, "float32": np.float32, "int32": np.int32, "int64": np.int64, "bool": np.bool_}
    spec, drawn = graph_specs(shape)[graph], draw_feeds(shape, graph)
    feeds = {
        tensor.name: np.ascontiguousarray(drawn[tensor.name].astype(types[tensor.type]))
        for tensor in (*spec.inputs, *spec.weights)
    }
    whole, stages = run(spec, feeds), run_stages(run, spec, feeds)
    assert whole.keys() == stages.keys()
    for name, array in whole.items():
        np.testing.assert_array_equal(array, stages[name], err_msg=name)


def test_every_weight_and_output_belongs_to_a_stage() -> None:
    assert STAGED
    for name, spec in (item for shape in SHAPES for item in graph_specs(shape).items() if item[1].stages):
        weights = [weight for stage in spec.stages for weight in stage.weights]
        assert sorted(weights, key=repr) == sorted(spec.weights, key=repr), "each weight in one stage"
        assert {tensor for tensor in spec.outputs} <= {tensor for stage in spec.stages for tensor in stage.outputs}
        assert [whole_graph(stage.name) for stage in spec.stages] == [name] * 2


def test_engines_are_built_of_whole_graphs_or_of_stages() -> None:
    specs = graph_specs(PLAIN)
    assert engine_specs(specs, staged=False) == specs
    staged = engine_specs(specs, staged=True)
    assert staged.keys() & STAGED.keys() == set()
    assert {whole_graph(name) for name in staged} == specs.keys()
